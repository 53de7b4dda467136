//go:build linux

package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

func TestParseTmux(t *testing.T) {
	got := parseTmux("2:1700000000:1700000100:0:%1:default:bash\n" +
		"2:1700000000:1700000050:1:%3:default:a:b c\n" +
		"0:1700000001:1700000002:1:%4:my odd|name é:node\n" +
		"with a newline\n" +
		"x:1:1:1:%9:bad:sh\n" +
		"0:1:1:1:%9::sh\n\n")
	want := []tmuxSession{
		{shed.Session{Name: "default", Keeper: shed.KeptByTmux, Command: "a:b c", Attached: 2, CreatedAt: time.Unix(1700000000, 0), ActiveAt: time.Unix(1700000100, 0)}, "%3"},
		{shed.Session{Name: "my odd|name é", Keeper: shed.KeptByTmux, Command: "node", CreatedAt: time.Unix(1700000001, 0), ActiveAt: time.Unix(1700000002, 0)}, "%4"},
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v\nwant\n%+v", got, want)
	}
	if n := len(parseTmux(strings.Repeat("0:1:1:1:%4:s:sh\n", 10))); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

func FuzzParseTmux(f *testing.F) {
	f.Add("2:1700000000:1700000100:1:%1:default:bash\n0:1:1:0:%2:x:y\n")
	f.Fuzz(func(t *testing.T, out string) {
		for _, s := range parseTmux(out) {
			if s.Name == "" || s.pane != "" && !strings.HasPrefix(s.pane, "%") {
				t.Errorf("%+v", s)
			}
		}
		lastLine(out)
	})
}

func TestParseStat(t *testing.T) {
	session, state, ok := parseStat("7 (a) S 1) b) Z 1 7 42 34816 7 4194560")
	if session != 42 || state != "Z" || !ok {
		t.Errorf("%d %q %v", session, state, ok)
	}
	if _, _, ok := parseStat("7 (a"); ok {
		t.Error("parsed what is no stat")
	}
}

func TestTmuxTerm(t *testing.T) {
	home := t.TempDir()
	if err := os.MkdirAll(filepath.Join(home, ".terminfo/x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".terminfo/x/xterm-of-mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for term, want := range map[string]string{
		"xterm-of-mine": "xterm-of-mine", "": keptTerm, "xterm-nobody-has": keptTerm, "x/../xterm-of-mine": keptTerm,
	} {
		if got := tmuxTerm(environ{"TERM=" + term}, home); got != want {
			t.Errorf("%q: %q, want %q", term, got, want)
		}
	}
}

func TestTmux(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "main")
	if s := sessionsOf(t, c); len(s) != 0 {
		t.Fatalf("%+v", s)
	}
	if code := refusedAttach(t, c, "main", shed.AttachJoin); code != shed.CodeNoSession { // nor has tmux a server
		t.Errorf("%q", code)
	}
	one := attachTo(t, c, "main", shed.AttachAny, true)
	one.typeIn("PS1='$ '; clear; echo $SHED_NAME $((40+2)); stty size\n")
	one.await("it 42")
	awaitThat(t, func() error {
		if s := sessionsOf(t, c); len(s) != 1 || s[0].LastLine != "$" {
			return fmt.Errorf("no prompt: %+v", s)
		}
		return nil
	})
	one.detach()

	// Users see the same sessions, and theirs are listed too.
	p := start(t, c, shed.Command{Script: "tmux ls -F '#S'; tmux new-session -d -s 'my own'"})
	if got := finish(t, p); got.stdout != "main\n" || got.Code != 0 {
		t.Errorf("%+v", got)
	}
	sessions := sessionsOf(t, c)
	if len(sessions) != 2 || sessions[0].Name != "main" || sessions[1].Name != "my own" {
		t.Fatalf("%+v", sessions)
	}
	if s := sessions[0]; s.Keeper != shed.KeptByTmux || s.Attached != 0 || s.Command != "bash" || s.LastLine != "$" ||
		time.Since(s.CreatedAt) > time.Hour || s.ActiveAt.Before(s.CreatedAt) {
		t.Errorf("%+v", s)
	}

	// A connection that breaks types nothing into the session.
	two := attachTo(t, c, "main", shed.AttachJoin, true)
	two.await("it 42")
	two.Close()
	if code := refusedAttach(t, c, "main", shed.AttachNew); code != shed.CodeConflict {
		t.Errorf("%q", code)
	}
	// A name is not taken for the begin of another.
	if code := refusedAttach(t, c, "mai", shed.AttachJoin); code != shed.CodeNoSession {
		t.Errorf("%q", code)
	}
	if err := killSession(t, c, "mai"); agent.ReplyCode(err) != shed.CodeNoSession {
		t.Errorf("killing a session that isn't there: %v", err)
	}
	if err := killSession(t, c, "main"); err != nil {
		t.Fatal(err)
	}
	if s := sessionsOf(t, c); len(s) != 1 || s[0].Name != "my own" {
		t.Errorf("%+v", s)
	}
	if got := finish(t, start(t, c, shed.Command{Script: "tmux kill-server"})); got.Code != 0 {
		t.Errorf("%+v", got)
	}
}

// What runs in a window that is called like the session to be killed goes on.
func TestTmuxKillOnly(t *testing.T) {
	c := newSessionShed(t)
	script := "new() { tmux new-session -dPF '#{pane_pid}' \"$@\" 'exec sleep 1000'; }\nnew -s one -n main; new -s main -n x; new -s two -n main"
	for _, name := range []string{"one", "main", "two"} {
		endSession(t, c, name)
	}
	pids := strings.Fields(finish(t, start(t, c, shed.Command{Script: script})).stdout)
	if err := killSession(t, c, "main"); err != nil || len(pids) != 3 {
		t.Fatalf("%q, %v", pids, err)
	}
	for _, pid := range []string{pids[0], pids[2]} {
		if n, err := strconv.Atoi(pid); err != nil || processName(n) == "" {
			t.Errorf("what runs in another session was ended: %v", err)
		}
	}
}

// Sessions last whatever the user's configuration says, and whether it is right.
func TestTmuxConfiguration(t *testing.T) {
	home := t.TempDir()
	c := shedWith(t, agent.Setup{Workspace: home, Env: []string{"HOME=" + home, "TMUX_TMPDIR=" + home}})
	endSession(t, c, "s")
	config := "set -g destroy-unattached on\nset -s exit-unattached on\nset -g status-left LEFT\nset -g no-such-option x\n"
	if err := os.WriteFile(filepath.Join(home, ".tmux.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		term := attachTo(t, c, "s", shed.AttachAny, true)
		term.await("LEFT")
		term.detach()
		awaitAttached(t, c, 0)
	}
}

// A tmux that hangs, or says too much, gets an error for an answer.
func TestTmuxBroken(t *testing.T) {
	u := &sessionUser{m: &machine{}, a: &account{home: "/"}, env: environ{"PATH=" + t.TempDir()}}
	script := filepath.Join(u.env.get("PATH"), "tmux")
	for _, body := range []string{"exec /bin/sleep 1000", "exec /usr/bin/yes", "echo it is broken >&2; exit 1"} {
		if err := os.WriteFile(script, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := u.tmuxSessions(ctx); err == nil {
			t.Errorf("%s: no error", body)
		}
	}
}

// A pane that is gone keeps nobody from seeing the others.
func TestTmuxLines(t *testing.T) {
	a, err := lookupUser(fmt.Sprint(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	u := &sessionUser{m: &machine{}, a: a, env: environ{"PATH=" + defaultPath, "TMUX_TMPDIR=" + t.TempDir(), "SHELL=/bin/sh"}}
	tmux := func(args ...string) string {
		t.Helper()
		out, err := u.tmux(t.Context(), args...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return strings.TrimSpace(out)
	}
	one := tmux("-f", os.DevNull, "new-session", "-dPF", "#{pane_id}", "echo first; sleep 1000")
	defer tmux("kill-server")
	two := tmux("new-session", "-dPF", "#{pane_id}", "echo second; sleep 1000")
	awaitThat(t, func() error {
		got, err := u.tmuxLines(t.Context(), []tmuxSession{{pane: "%998"}, {pane: one}, {pane: "%999"}, {pane: two}, {pane: "%999"}})
		if want := []string{"", "first", "", "second", ""}; err != nil || !slices.Equal(got, want) {
			return fmt.Errorf("%q, %v; want %q", got, err, want)
		}
		return nil
	})
}
