//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	// sessionsTimeout is how long what keeps the sessions may take to tell about them.
	sessionsTimeout = 10 * time.Second
	// keptTimeout is how long the process of one session may take to tell about itself.
	keptTimeout = time.Second
	// killTimeout is how long it may take to tell what is to be ended, before that is done by force.
	killTimeout = 3 * time.Second

	maxSessions     = 1000    // that are told of
	maxLastLine     = 1000    // bytes
	maxOutput       = 1 << 20 // of a program that tells about sessions, in bytes
	maxSessionField = 100     // bytes of a session's name, or of what runs in it
)

// sessionUser is whom sessions belong to, with what it takes to get at them.
type sessionUser struct {
	m    *machine
	a    *account
	env  environ // of a login
	kept string  // directory with the sockets of the kept sessions
}

func (m *machine) sessionUser(a *account, env environ) *sessionUser {
	return &sessionUser{m: m, a: a, env: env, kept: filepath.Join(m.kept, fmt.Sprintf("sessions-%d", a.uid))}
}

// defaultSessionUser returns the default user, who has the sessions.
func (m *machine) defaultSessionUser() (*sessionUser, error) {
	setup, err := m.currentSetup()
	if err != nil {
		return nil, err
	}
	a, base, err := commandUser(setup, "", false)
	if err != nil {
		return nil, err
	}
	return m.sessionUser(a, m.loginEnv(a, base, setup.Image)), nil
}

// attach makes cmd what shows a session. Its directory is where a new one begins.
func (u *sessionUser) attach(cmd *exec.Cmd, a shed.Attach) error {
	kept, err := u.hasKept(a.Session)
	if err != nil {
		return err
	}
	tmux, err := lookPath("tmux", u.env.get("PATH"), cmd.Dir)
	if err == nil && !kept {
		cmd.Path, cmd.Args = tmux, tmuxAttach(a)
		cmd.Env = u.env.with("TERM=" + tmuxTerm(u.env, u.a.home))
		return nil
	}
	if err := os.MkdirAll(u.m.kept, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(u.kept, 0o700); err == nil {
		err = os.Chown(u.kept, int(u.a.uid), int(u.a.gid))
		if err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	cmd.Path, cmd.Args = selfExe, []string{sessionName, "attach", u.kept, a.Session, string(a.Mode)}
	cmd.Env = u.env
	return nil
}

// checkAttach returns the error that a's mode has for the session as it is.
func (m *machine) checkAttach(a shed.Attach) error {
	if a.Mode == shed.AttachAny {
		return nil
	}
	u, err := m.defaultSessionUser()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), sessionsTimeout)
	defer cancel()
	there, err := u.hasKept(a.Session)
	if err != nil {
		return err
	}
	if !there {
		if there, err = u.hasTmux(ctx, a.Session); err != nil {
			return err
		}
	}
	switch {
	case there && a.Mode == shed.AttachNew:
		return shed.Errorf(shed.CodeConflict, "there is a session %q", a.Session)
	case !there && a.Mode == shed.AttachJoin:
		return noSession(a.Session)
	}
	return nil
}

func noSession(name string) error {
	return shed.Errorf(shed.CodeNoSession, "there is no session %q", name)
}

// listSessions answers agent.Sessions.
func (m *machine) listSessions(s *agent.Stream) {
	sessions, err := m.sessions()
	if !answer(s, err) {
		return
	}
	if err := agent.WriteMessage(s, sessions); err != nil {
		s.Reset()
		return
	}
	s.Close()
}

func (m *machine) sessions() ([]shed.Session, error) {
	u, err := m.defaultSessionUser()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), sessionsTimeout)
	defer cancel()
	var sessions []shed.Session
	var asked sync.WaitGroup
	asked.Go(func() { sessions = u.keptSessions() })
	byTmux, err := u.tmuxSessions(ctx)
	asked.Wait()
	if err != nil {
		return nil, err
	}
	sessions = append(sessions, byTmux...)
	sessions = sessions[:min(len(sessions), maxSessions)]
	for i := range sessions {
		s := &sessions[i]
		s.Name, s.Command = printable(s.Name, maxSessionField), printable(s.Command, maxSessionField)
		s.LastLine = printable(s.LastLine, maxLastLine)
	}
	return sessions, nil
}

// killSession ends a session, whatever keeps it, and what runs in it.
func (m *machine) killSession(name string) error {
	if err := shed.ValidateSession(name); err != nil {
		return err
	}
	u, err := m.defaultSessionUser()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), sessionsTimeout)
	defer cancel()
	kept, err := u.hasKept(name)
	if err != nil {
		return err
	}
	if kept {
		return u.killKept(ctx, name)
	}
	return u.killTmux(ctx, name)
}

// owns says whether a process is the user's: it is a process of the user's that names those to end, which must
// not get others' ended.
func (u *sessionUser) owns(pid int) bool {
	fi, err := os.Stat(procFile(pid, ""))
	return err == nil && fi.Sys().(*syscall.Stat_t).Uid == u.a.uid
}

// hasKept says whether there is a kept session.
func (u *sessionUser) hasKept(name string) (bool, error) {
	conn, err := dialKept(u.kept, name)
	if errors.Is(err, errNotKept) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking for the session %s: %w", name, err)
	}
	return true, conn.Close()
}

// keptSessions asks the process of each kept session. One that gives no answer is listed too: it may have to be killed.
func (u *sessionUser) keptSessions() []shed.Session {
	dir, err := os.Open(u.kept)
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxSessions)
	sessions := make([]*shed.Session, len(names))
	var asked sync.WaitGroup
	for i, name := range names {
		if shed.ValidateSession(name) == nil {
			asked.Go(func() { sessions[i] = u.keptSession(name) })
		}
	}
	asked.Wait()
	var there []shed.Session
	for _, s := range sessions {
		if s != nil {
			there = append(there, *s)
		}
	}
	return there
}

// keptSession returns nil if there is no such session.
func (u *sessionUser) keptSession(name string) *shed.Session {
	conn, err := dialKept(u.kept, name)
	if errors.Is(err, errNotKept) {
		return nil
	}
	var status keptStatus
	if err == nil {
		defer conn.Close()
		status, err = askKept(conn, keptTimeout)
	}
	if err != nil {
		status.Session = shed.Session{}
		if fi, err := os.Stat(filepath.Join(u.kept, name)); err == nil {
			status.Session.CreatedAt, status.Session.ActiveAt = fi.ModTime(), fi.ModTime()
		}
	}
	status.Session.Name, status.Session.Keeper = name, shed.KeptByAgent
	return &status.Session
}

func askKept(conn net.Conn, timeout time.Duration) (keptStatus, error) {
	conn.SetDeadline(time.Now().Add(timeout))
	defer conn.SetDeadline(time.Time{})
	if err := agent.WriteMessage(conn, keptRequest{Status: true}); err != nil {
		return keptStatus{}, err
	}
	var reply agent.Reply
	if err := agent.ReadMessage(conn, &reply); err != nil {
		return keptStatus{}, err
	}
	if reply.Error != "" {
		return keptStatus{}, errors.New(reply.Error)
	}
	var status keptStatus
	err := agent.ReadMessage(conn, &status)
	return status, err
}

// killKept ends a kept session, and returns when its process has ended.
func (u *sessionUser) killKept(ctx context.Context, name string) error {
	conn, err := dialKept(u.kept, name)
	if errors.Is(err, errNotKept) {
		return noSession(name) // any more
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	status, err := askKept(conn, killTimeout)
	if err != nil {
		// Without its terminal the shell ends too.
		return errors.Join(u.killPeer(conn), os.Remove(filepath.Join(u.kept, name)))
	}
	if u.owns(status.Leader) {
		endTerminal(status.Leader)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.Read(make([]byte, 1)) // until it is closed
	return ctx.Err()
}

// killPeer kills the user's process that conn leads to.
func (u *sessionUser) killPeer(conn net.Conn) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(cerr, err); err != nil {
		return err
	}
	if pid := int(cred.Pid); u.owns(pid) {
		unix.Kill(pid, unix.SIGKILL)
	}
	return nil
}

// run runs a program as the user, in its home, and returns what it prints. An error has what it says
// on stderr.
func (u *sessionUser) run(ctx context.Context, path string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Dir = u.env, u.a.workDir("")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: u.a.credential(), Setsid: true}
	cmd.WaitDelay = time.Second
	out, errOut := &limitedBuffer{}, &limitedBuffer{}
	cmd.Stdout, cmd.Stderr = out, errOut
	if err := u.m.startInCgroup(cmd, cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	if ctx.Err() != nil {
		err = fmt.Errorf("%s gave no answer within %v", filepath.Base(path), sessionsTimeout)
	}
	if said := strings.TrimSpace(errOut.b.String()); err != nil && said != "" {
		err = fmt.Errorf("%s: %s (%w)", filepath.Base(path), said, err)
	}
	return out.b.String(), err
}

// limitedBuffer takes no more than maxOutput bytes: whoever writes more fails.
type limitedBuffer struct{ b bytes.Buffer }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if l.b.Len()+len(p) > maxOutput {
		return 0, errors.New("more output than is taken")
	}
	return l.b.Write(p)
}
