//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

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
	awaitAttached(t, c, 0)
}

func TestKeptModes(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	if code := refusedAttach(t, c, "s", shed.AttachJoin); code != shed.CodeNoSession {
		t.Errorf("%q", code)
	}
	one := attachTo(t, c, "s", shed.AttachNew, false)
	one.typeIn("echo $((40+2))\n")
	one.await("42")
	if code := refusedAttach(t, c, "s", shed.AttachNew); code != shed.CodeConflict {
		t.Errorf("%q", code)
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
	awaitAttached(t, c, 3)
	one.typeIn("seq 20000; echo e''nd\n")
	one.await("end")
	two.typeIn("exit\n")
	if raw, status := one.end(); status.Code != 0 || !strings.Contains(raw, "[exited]") {
		t.Errorf("%+v %q", status, raw)
	}
}

// socketOf returns the socket of a session of newSessionShed's.
func socketOf(t *testing.T, c *agent.Client, name string) string {
	t.Helper()
	p := start(t, c, shed.Command{Args: []string{"sh", "-c", `printf %s "$TMUX_TMPDIR"`}})
	dirs := filepath.Dir(finish(t, p).stdout) // all of this test's
	sockets, err := filepath.Glob(filepath.Join(dirs, "*", "sessions-*", name))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets of session %s: %q, %v", name, sockets, err)
	}
	return sockets[0]
}

// A session is ended with all that runs in it, be it deaf to the end of a terminal.
func TestKeptKill(t *testing.T) {
	c := newSessionShed(t)
	endSession(t, c, "s")
	term := attachTo(t, c, "s", shed.AttachAny, false)
	term.typeIn("sh -c 'trap \"\" HUP TERM; echo pid=$$.; while :; do sleep 1; done'\n")
	pid := term.awaitNumber("\npid=")
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
	if err := killSession(t, c, "s"); agent.ReplyCode(err) != shed.CodeNoSession {
		t.Errorf("killing a session that isn't there: %v", err)
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
	keeper := term.awaitNumber("\n42 ")
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

// What is drawn in parts is what is drawn at once, characters of several runes included.
func TestDrawInParts(t *testing.T) {
	size := shed.Size{Rows: 100, Cols: 80}
	noReply := func([]byte) {}
	text := strings.Repeat(strings.Repeat("\U0001F469\u200D\U0001F469\u200D\U0001F467e\u0301 ", 7)+"|\r\n", 90)
	whole, k := newScreen(size, noReply), &keeper{screen: newScreen(size, noReply)}
	defer whole.close()
	defer k.screen.close()
	whole.write([]byte(text))
	k.draw([]byte(text))
	if got, want := textOf(k.screen), textOf(whole); got != want || !strings.Contains(want, "|") {
		t.Errorf("in parts\n%s\nat once\n%s", got, want)
	}
}

// Where nobody can connect to a session's process for now, the session is there all the same.
func TestKeptBusy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	for {
		conn, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break // that was too many
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	u := &sessionUser{kept: dir}
	if there, err := u.hasKept("s"); there || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("hasKept: %v, %v", there, err)
	}
	if s := u.keptSession("s"); s == nil || s.Name != "s" {
		t.Errorf("it is listed as %+v", s)
	}
	if conn, err := connectKept(dir, "s", shed.AttachAny); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("connectKept: %v, %v", conn, err)
	}
	if l, err := listenKept(dir, "s"); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("listenKept: %v, %v", l, err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("its socket: %v", err)
	}
}

// What is drawn in parts looks as if it had been drawn at once.
func TestPartsTearNoCharacter(t *testing.T) {
	for _, char := range []string{"\u00e9", "\u4e16", "\U0001f44d", "e\u0301", "\U0001f469\u200d\U0001f4bb"} {
		for offset := range len(char) {
			text := strings.Repeat("a", offset) + strings.Repeat(char, 600)
			size := shed.Size{Rows: 100, Cols: 79}
			k := &keeper{screen: newScreen(size, func([]byte) {})}
			k.draw([]byte(text))
			whole := newScreen(size, func([]byte) {})
			whole.write([]byte(text))
			if got, want := textOf(k.screen), textOf(whole); got != want {
				t.Errorf("%q after %d bytes: %q, want %q", char, offset, got, want)
			}
			k.screen.close()
			whole.close()
		}
	}
	long := "e" + strings.Repeat("\u0301", drawnAtOnce)
	if n := partOf([]byte(long + "e")); n != len(long) {
		t.Errorf("%d bytes of a character of %d", n, len(long))
	}
}
