//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
)

// tmuxAttach returns the command line that shows a session. What the user has in tmux's configuration holds, but for
// the two options by which sessions end when nobody is attached: not to is what shed's are for.
func tmuxAttach(a shed.Attach) []string {
	args := []string{"tmux", "-u"} // the terminals at hand all have UTF-8, whatever the locale in the shed
	switch a.Mode {
	case shed.AttachNew:
		args = append(args, "new-session", "-s", a.Session)
	case shed.AttachJoin:
		args = append(args, "attach-session", "-t", "="+a.Session)
	default:
		args = append(args, "new-session", "-A", "-s", a.Session)
	}
	return append(args, ";", "set-option", "-s", "exit-unattached", "off", ";", "set-option", "destroy-unattached", "off")
}

// tmuxTerm returns what tmux is to take its client's terminal for. It fails with one that the
// image has no description of, and newer terminals are in few images.
func tmuxTerm(env environ, home string) string {
	term := env.get("TERM")
	dirs := []string{filepath.Join(home, ".terminfo"), "/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo", "/usr/lib/terminfo"}
	dirs = append(filepath.SplitList(env.get("TERMINFO_DIRS")), dirs...)
	if dir := env.get("TERMINFO"); dir != "" {
		dirs = append([]string{dir}, dirs...)
	}
	if term != "" && !strings.Contains(term, "/") {
		for _, dir := range dirs {
			for _, sub := range []string{term[:1], fmt.Sprintf("%x", term[0])} {
				if _, err := os.Stat(filepath.Join(dir, sub, term)); err == nil {
					return term
				}
			}
		}
	}
	return keptTerm
}

// tmuxFormat has what is asked of each window. No name of a session has a colon.
const tmuxFormat = "#{session_attached}:#{session_created}:#{window_activity}:#{window_active}:#{pane_id}:#{session_name}:#{pane_current_command}"

// tmuxSession is a session with its current pane.
type tmuxSession struct {
	shed.Session
	pane string
}

// parseTmux parses lines of tmuxFormat: windows, of which a session has at least one.
func parseTmux(out string) []tmuxSession {
	var sessions []tmuxSession
	for line := range strings.Lines(out) {
		fields := strings.SplitN(strings.TrimRight(line, "\r\n"), ":", 7)
		if len(fields) < 7 || !strings.HasPrefix(fields[4], "%") || fields[5] == "" {
			continue // such as the rest of a command's name with a newline in it
		}
		attached, err1 := strconv.Atoi(fields[0])
		created, err2 := strconv.ParseInt(fields[1], 10, 64)
		active, err3 := strconv.ParseInt(fields[2], 10, 64)
		if errors.Join(err1, err2, err3) != nil {
			continue
		}
		i := slices.IndexFunc(sessions, func(s tmuxSession) bool { return s.Name == fields[5] })
		if i < 0 {
			if i = len(sessions); i == maxSessions {
				break
			}
			sessions = append(sessions, tmuxSession{Session: shed.Session{
				Name: fields[5], Keeper: shed.KeptByTmux, Attached: attached, CreatedAt: time.Unix(created, 0),
			}})
		}
		s := &sessions[i]
		if at := time.Unix(active, 0); at.After(s.ActiveAt) {
			s.ActiveAt = at
		}
		if fields[3] == "1" {
			s.pane, s.Command = fields[4], fields[6]
		}
	}
	return sessions
}

var errNoTmux = errors.New("there is no tmux in the shed")

// tmux runs the user's tmux, as a client that has UTF-8. It returns errNoTmux where there is none.
func (u *sessionUser) tmux(ctx context.Context, args ...string) (stdout string, err error) {
	path, err := lookPath("tmux", u.env.get("PATH"), u.a.home)
	if err != nil {
		return "", errNoTmux
	}
	return u.run(ctx, path, append([]string{"-u"}, args...)...)
}

// noTmuxServer says whether tmux says so: it has a server as long as it has sessions.
func noTmuxServer(err error) bool {
	return tmuxSays(err, "no server running on", "error connecting to", "server exited", "lost server")
}

func tmuxSays(err error, parts ...string) bool {
	return slices.ContainsFunc(parts, func(s string) bool { return strings.Contains(err.Error(), s) })
}

// noTmuxSession says whether err, of a call of tmux about one session, means that there is none of that name.
func noTmuxSession(ctx context.Context, err error) bool {
	return errors.Is(err, errNoTmux) || ctx.Err() == nil && (noTmuxServer(err) || tmuxSays(err, "can't find session"))
}

// hasTmux says whether tmux has the session.
func (u *sessionUser) hasTmux(ctx context.Context, name string) (bool, error) {
	_, err := u.tmux(ctx, "has-session", "-t", "="+name)
	if err != nil && noTmuxSession(ctx, err) {
		return false, nil
	}
	return err == nil, err
}

// tmuxSessions returns the user's sessions in tmux, whoever made them.
func (u *sessionUser) tmuxSessions(ctx context.Context) ([]shed.Session, error) {
	out, err := u.tmux(ctx, "list-windows", "-a", "-F", tmuxFormat)
	if err != nil {
		if errors.Is(err, errNoTmux) || ctx.Err() == nil && noTmuxServer(err) {
			return nil, nil
		}
		return nil, err
	}
	var sessions []shed.Session
	for panes := range slices.Chunk(parseTmux(out), tmuxPanes) {
		lines, err := u.tmuxLines(ctx, panes)
		if err != nil {
			return nil, err
		}
		for i, s := range panes {
			s.LastLine = lines[i]
			sessions = append(sessions, s.Session)
		}
	}
	return sessions, nil
}

// tmuxPanes is of how many panes one call of tmux gets the screens: its command line has a limit.
const tmuxPanes = 50

// tmuxLines returns the last lines of panes. One that is gone by now has none.
func (u *sessionUser) tmuxLines(ctx context.Context, panes []tmuxSession) ([]string, error) {
	mark := fmt.Sprintf("shed-%x", rand.Uint64()) // which no program can write
	lines := make([]string, len(panes))
	for i := 0; i < len(panes); {
		var args []string
		for _, s := range panes[i:] {
			args = append(args, "capture-pane", "-p", "-t", s.pane, ";", "display-message", "-p", "-t", s.pane, mark, ";")
		}
		out, err := u.tmux(ctx, args...)
		if ctx.Err() != nil {
			return nil, err
		}
		screens := strings.Split(out, mark+"\n")
		for _, screen := range screens[:len(screens)-1] {
			lines[i] = lastLine(screen)
			i++
		}
		i++ // what tmux stopped at, if it did
	}
	return lines, nil
}

// lastLine returns the last line that has something in it.
func lastLine(text string) string {
	last := ""
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			last = line
		}
	}
	return last
}

// killTmux ends a session in tmux.
func (u *sessionUser) killTmux(ctx context.Context, name string) error {
	// Without the colon, a window of that name would be meant too, in whichever session.
	out, err := u.tmux(ctx, "list-panes", "-s", "-t", "="+name+":", "-F", "#{pane_pid}")
	if err != nil {
		if noTmuxSession(ctx, err) {
			return noSession(name)
		}
		return err
	}
	var leaders []int
	for _, s := range strings.Fields(out) {
		if pid, err := strconv.Atoi(s); err == nil && u.owns(pid) {
			leaders = append(leaders, pid)
		}
	}
	if _, err := u.tmux(ctx, "kill-session", "-t", "="+name); err != nil {
		return err
	}
	var ended sync.WaitGroup
	for _, leader := range leaders {
		ended.Go(func() { endTerminal(leader) })
	}
	ended.Wait()
	return nil
}
