//go:build linux

package guest

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// terminal is a terminal that shows a session.
type terminal struct {
	t *testing.T
	shed.Process

	mu     sync.Mutex
	screen *screen
	raw    strings.Builder
	ended  chan struct{}
}

// attachTo attaches to a session with a terminal of 80x24, where there is no tmux unless withTmux.
func attachTo(t *testing.T, c *agent.Client, name string, mode shed.AttachMode, withTmux bool) *terminal {
	t.Helper()
	cmd := attachCommand(name, mode)
	if !withTmux {
		cmd.Env = append(cmd.Env, "PATH="+binWithout(t, "tmux"))
	}
	term := &terminal{t: t, Process: startAsIs(t, c, cmd), ended: make(chan struct{})}
	term.screen = newScreen(cmd.TTY.Size, func([]byte) {})
	t.Cleanup(func() {
		term.Close()
		<-term.ended
		term.screen.close()
	})
	go func() {
		defer close(term.ended)
		b := make([]byte, 4096)
		for {
			n, err := term.Stdout().Read(b)
			term.mu.Lock()
			term.screen.write(b[:n])
			term.raw.Write(b[:n])
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term
}

func attachCommand(name string, mode shed.AttachMode) shed.Command {
	return shed.Command{
		Attach: &shed.Attach{Session: name, Mode: mode},
		TTY:    &shed.TTY{Term: "xterm-256color", Size: shed.Size{Rows: 24, Cols: 80}},
		Env:    []string{"HISTFILE="},
	}
}

// refusedAttach expects that nothing is attached to, and returns the code of the reason.
func refusedAttach(t *testing.T, c *agent.Client, name string, mode shed.AttachMode) shed.Code {
	t.Helper()
	s, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err = agent.Exec(t.Context(), s, attachCommand(name, mode)); err == nil {
		t.Fatalf("attached to %q", name)
	}
	return agent.ReplyCode(err)
}

// binWithout returns a directory of all programs in /usr/bin and /bin but one.
func binWithout(t *testing.T, program string) string {
	t.Helper()
	bin := t.TempDir()
	for _, dir := range []string{"/usr/bin", "/bin"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != program {
				os.Symlink(filepath.Join(dir, e.Name()), filepath.Join(bin, e.Name()))
			}
		}
	}
	return bin
}

func (term *terminal) typeIn(s string) {
	term.t.Helper()
	if _, err := io.WriteString(term.Stdin(), s); err != nil {
		term.t.Fatal(err)
	}
}

// text returns what the terminal shows, without blank lines at the end.
func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return textOf(term.screen)
}

func textOf(s *screen) string {
	return strings.TrimRight(s.e.String(), " \n")
}

// await waits until the terminal shows s.
func (term *terminal) await(s string) {
	term.t.Helper()
	awaitThat(term.t, func() error {
		if text := term.text(); !strings.Contains(text, s) {
			return fmt.Errorf("no %q on the screen:\n%s", s, text)
		}
		return nil
	})
}

// awaitNumber waits until the terminal shows a number and a dot after before, and returns it.
func (term *terminal) awaitNumber(before string) (n int) {
	term.t.Helper()
	awaitThat(term.t, func() error {
		_, after, _ := strings.Cut(term.text(), before)
		_, err := fmt.Sscanf(after, "%d.", &n)
		return err
	})
	return n
}

// awaitThat waits far longer than anything takes.
func awaitThat(t *testing.T, try func() error) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// sized waits until the session has a size, of which it is told aside from what is typed.
func (term *terminal) sized(size string) {
	term.t.Helper()
	term.typeIn("until stty size | grep -qx '" + size + "'; do sleep 0.01; done; clear; echo; stty size\n")
	term.await("\n" + size)
}

// end waits for the end of the command that shows the session, and returns all that it wrote.
func (term *terminal) end() (string, shed.ExitStatus) {
	term.t.Helper()
	<-term.ended
	status, err := term.Wait()
	if err != nil {
		term.t.Fatal(err)
	}
	return term.raw.String(), status
}

func (term *terminal) detach() {
	term.t.Helper()
	// tmux takes keys that arrive within a millisecond for pasted text, which does nothing but be typed.
	for ended := false; !ended; {
		io.WriteString(term.Stdin(), "\x02")
		time.Sleep(50 * time.Millisecond)
		io.WriteString(term.Stdin(), "d") // fails where the first time was enough
		select {
		case <-term.ended:
			ended = true
		case <-time.After(2 * time.Second):
		}
	}
	raw, status := term.end()
	if status.Code != 0 || !strings.Contains(raw, "[detached (from session") {
		term.t.Fatalf("%+v %q", status, raw)
	}
}

func sessionsOf(t *testing.T, c *agent.Client) []shed.Session {
	t.Helper()
	s, err := c.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := agent.Call(context.Background(), s, agent.Request{Sessions: &agent.Sessions{}}); err != nil {
		t.Fatal(err)
	}
	var sessions []shed.Session
	if err := agent.ReadMessage(s, &sessions); err != nil {
		t.Fatal(err)
	}
	return sessions
}

// awaitAttached waits until the only session is shown by n terminals.
func awaitAttached(t *testing.T, c *agent.Client, n int) {
	t.Helper()
	awaitThat(t, func() error {
		if s := sessionsOf(t, c); len(s) != 1 || s[0].Attached != n {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

func killSession(t *testing.T, c *agent.Client, name string) error {
	t.Helper()
	s, err := c.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return agent.Call(context.Background(), s, agent.Request{KillSession: &agent.KillSession{Name: name}})
}

// endSession ends a session with the test, which leaves nothing behind.
func endSession(t *testing.T, c *agent.Client, name string) {
	t.Cleanup(func() {
		for _, s := range sessionsOf(t, c) {
			if s.Name == name {
				if err := killSession(t, c, name); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// newSessionShed has neither the host's tmux server nor its shells' configuration.
func newSessionShed(t *testing.T) *agent.Client {
	dir := t.TempDir()
	return shedWith(t, agent.Setup{Workspace: t.TempDir(), Env: []string{"SHED_NAME=it", "TMUX_TMPDIR=" + dir}})
}
