//go:build linux

package guest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	cmd := shed.Command{
		Attach: &shed.Attach{Session: name, Mode: mode},
		TTY:    &shed.TTY{Term: "xterm-256color", Size: shed.Size{Rows: 24, Cols: 80}},
		Env:    []string{"HISTFILE="},
	}
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

func TestKept(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "main")
	one := attachTo(t, c, "main", shed.AttachAny, false)
	one.typeIn("PS1='$ '; clear; echo $SHED_NAME $((40+2)); shopt -q login_shell && echo login; stty size\n")
	one.await("it 42")
	one.await("login")
	one.await("24 80")
	if err := one.Resize(shed.Size{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	one.sized("30 100")
	awaitThat(t, func() error {
		if text := one.text(); !strings.HasSuffix(text, "\n$") {
			return fmt.Errorf("no prompt:\n%s", text)
		}
		return nil
	})
	before := one.text()
	one.detach()

	sessions := sessionsOf(t, c)
	if len(sessions) != 1 {
		t.Fatalf("%+v", sessions)
	}
	s := sessions[0]
	if s.Name != "main" || s.Keeper != shed.KeptByAgent || s.Attached != 0 || s.Command == "" || s.LastLine != "$" ||
		time.Since(s.CreatedAt) > time.Hour || s.ActiveAt.Before(s.CreatedAt) {
		t.Errorf("%+v", s)
	}

	two := attachTo(t, c, "main", shed.AttachJoin, false)
	if err := two.Resize(shed.Size{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	two.await("30 100")
	if got := two.text(); got != before {
		t.Errorf("repainted:\n%s\nwas:\n%s", got, before)
	}
	two.typeIn("exit 3\n")
	raw, status := two.end()
	if status.Code != 0 || !strings.HasSuffix(raw, "[exited]\r\n") {
		t.Errorf("%+v %q", status, raw)
	}
	awaitThat(t, func() error {
		if s := sessionsOf(t, c); len(s) > 0 {
			return fmt.Errorf("still there: %+v", s)
		}
		return nil
	})
}

// The session outlives a connection that breaks, and nothing is typed into it for that.
func TestKeptOutlivesConnection(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	for i := range 3 {
		term := attachTo(t, c, "s", shed.AttachAny, false)
		term.typeIn(fmt.Sprintf("V=${V}%d; echo v=$V.\n", i))
		term.await("v=" + "012"[:i+1] + ".")
		term.Close()
	}
	awaitThat(t, func() error {
		if s := sessionsOf(t, c); len(s) != 1 || s[0].Attached != 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

func TestKeptModes(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	none := attachTo(t, c, "s", shed.AttachJoin, false)
	if raw, status := none.end(); status.Code != 1 || !strings.Contains(raw, "can't find session") {
		t.Errorf("%+v %q", status, raw)
	}
	one := attachTo(t, c, "s", shed.AttachNew, false)
	one.typeIn("echo $((40+2))\n")
	one.await("42")
	again := attachTo(t, c, "s", shed.AttachNew, false)
	if raw, status := again.end(); status.Code != 1 || !strings.Contains(raw, "duplicate session") {
		t.Errorf("%+v %q", status, raw)
	}
	one.detach()
}

// Two clients see the same, in the size of the one that was used last. One that is stuck
// holds up neither the other nor the session.
func TestKeptTwoClients(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	one := attachTo(t, c, "s", shed.AttachAny, false)
	one.typeIn("PS1='$ '; echo $((40+2))\n")
	one.await("42")
	two := attachTo(t, c, "s", shed.AttachAny, false)
	if err := two.Resize(shed.Size{Rows: 10, Cols: 40}); err != nil {
		t.Fatal(err)
	}
	two.sized("10 40")
	one.await("10 40")
	one.sized("24 80")
	if s := sessionsOf(t, c); len(s) != 1 || s[0].Attached != 2 {
		t.Errorf("%+v", s)
	}

	stuck, err := net.Dial("unix", socketOf(t, c, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer stuck.Close()
	if err := agent.WriteMessage(stuck, keptRequest{Attach: &shed.Size{Rows: 200, Cols: 200}}); err != nil {
		t.Fatal(err)
	}
	awaitThat(t, func() error {
		if s := sessionsOf(t, c); len(s) != 1 || s[0].Attached != 3 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	one.typeIn("seq 20000; echo e''nd\n")
	one.await("end")
	two.typeIn("exit\n")
	if raw, status := one.end(); status.Code != 0 || !strings.Contains(raw, "[exited]") {
		t.Errorf("%+v %q", status, raw)
	}
}

func socketOf(t *testing.T, c *agent.Client, name string) string {
	t.Helper()
	p := start(t, c, shed.Command{Args: []string{"sh", "-c", `tr '\0' '\n' </proc/$(pgrep -f "^shed-session keep .* ` + name + `$" | tail -n 1)/cmdline`}})
	lines := strings.Split(finish(t, p).stdout, "\n")
	if len(lines) < 4 {
		t.Fatalf("%q", lines)
	}
	return filepath.Join(lines[2], lines[3])
}

// A session is ended with all that runs in it, be it deaf to the end of a terminal.
func TestKeptKill(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	term := attachTo(t, c, "s", shed.AttachAny, false)
	term.typeIn("sh -c 'trap \"\" HUP TERM; echo pid=$$.; while :; do sleep 1; done'\n")
	var pid int
	awaitThat(t, func() error {
		_, after, _ := strings.Cut(term.text(), "\npid=")
		_, err := fmt.Sscanf(after, "%d.", &pid)
		return err
	})
	if err := killSession(t, c, "s"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, 0); err != unix.ESRCH {
		awaitThat(t, func() error { // it may still have to be reaped
			if err := unix.Kill(pid, 0); err != unix.ESRCH && processName(pid) != "" {
				return fmt.Errorf("%d: %v", pid, err)
			}
			return nil
		})
	}
	if _, status := term.end(); status.Code != 0 {
		t.Errorf("%+v", status)
	}
	if err := killSession(t, c, "s"); err == nil {
		t.Error("a session that isn't there was killed")
	}
	if s := sessionsOf(t, c); len(s) != 0 {
		t.Errorf("%+v", s)
	}
}

// A session whose process hangs is listed, and can be killed.
func TestKeptFrozen(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	term := attachTo(t, c, "s", shed.AttachAny, false)
	term.typeIn("echo $((40+2)) $PPID.\n")
	var keeper int
	awaitThat(t, func() error {
		_, after, _ := strings.Cut(term.text(), "\n42 ")
		_, err := fmt.Sscanf(after, "%d.", &keeper)
		return err
	})
	if err := unix.Kill(keeper, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if s := sessionsOf(t, c); len(s) != 1 || s[0].Name != "s" {
		t.Errorf("%+v", s)
	}
	if err := killSession(t, c, "s"); err != nil {
		t.Fatal(err)
	}
	if raw, status := term.end(); status.Code != 1 || !strings.Contains(raw, "[lost session s") {
		t.Errorf("%+v %q", status, raw)
	}
	again := attachTo(t, c, "s", shed.AttachAny, false)
	again.typeIn("echo $((50+2))\n")
	again.await("52")
}

// A keeper that was killed leaves its socket.
func TestKeptStaleSocket(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	one, err := listenKept(dir, "s")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenKept(dir, "s"); err == nil || err.Error() != keptTaken {
		t.Errorf("%v", err)
	}
	if err := one.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "s")); err == nil {
		t.Error("the socket is still there")
	}
}

func TestDetachKeys(t *testing.T) {
	for _, test := range []struct {
		in, pass string
		detach   bool
	}{
		{"abc", "abc", false},
		{"a\x02dxyz", "a", true},
		{"\x02x\x02\x02d", "\x02x\x02d", false},
		{"\x02\x02\x02d", "\x02", true},
	} {
		for _, size := range []int{1, 100} {
			var d detachKeys
			var pass []byte
			detach := false
			for in := []byte(test.in); len(in) > 0 && !detach; {
				n := min(size, len(in))
				var p []byte
				p, detach = d.filter(in[:n])
				pass, in = append(pass, p...), in[n:]
			}
			if string(pass) != test.pass || detach != test.detach {
				t.Errorf("%q by %d: %q %v", test.in, size, pass, detach)
			}
		}
	}
}

// What the client of a kept session sends may be anything.
func FuzzKeeper(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x0d{\"attach\":{}}\x00\x00\x00\x00\x01a\x02\x00\x00\x00\x12{\"rows\":1,\"cols\":1}"))
	f.Add([]byte("\x00\x00\x00\x0f{\"status\":true}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k := &keeper{name: "s", input: newStdinQueue()}
		k.screen = newScreen(shed.Size{}, func([]byte) {})
		defer k.screen.close()
		var err error
		if k.tty, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
			t.Fatal(err)
		}
		defer k.tty.Close()
		k.shell = shellOf(t)
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			k.serve(t.Context(), theirs)
		}()
		go io.Copy(io.Discard, ours)
		ours.SetWriteDeadline(time.Now().Add(time.Minute))
		ours.Write(b)
		ours.Close()
		<-done
		if len(k.viewers) != 0 {
			t.Error("a viewer is left")
		}
	})
}

// shellOf returns a command that stands for a session's shell: this process.
func shellOf(t *testing.T) *exec.Cmd {
	t.Helper()
	p, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return &exec.Cmd{Process: p}
}
