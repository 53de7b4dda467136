package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/creack/pty"
	"golang.org/x/term"
)

// guest answers commands as the tests below need it.
func guest(cmd shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
	name := ""
	if len(cmd.Args) > 0 {
		name = cmd.Args[0]
	}
	switch name {
	case "print": // the command itself
		b, _ := json.Marshal(cmd)
		out.Write(agent.FrameStdout, b)
	case "both":
		out.Write(agent.FrameStdout, []byte("out\xff\x00"))
		out.Write(agent.FrameStderr, []byte("err"))
		return shed.ExitStatus{Code: 143, Signal: "TERM"}
	case "missing":
		return shed.ExitStatus{Code: 127, Error: "missing: no such program"}
	case "yes":
		for out.Write(agent.FrameStdout, bytes.Repeat([]byte("y\n"), 1000)) == nil {
		}
	case "cat":
		for {
			kind, b, err := in.Read()
			if err != nil || kind == agent.FrameStdinEOF {
				return shed.ExitStatus{}
			}
			apitest.Ack(out, len(b))
			out.Write(agent.FrameStdout, b)
		}
	default: // what comes, as text
		if cmd.TTY != nil {
			fmt.Fprintf(out.Stream(agent.FrameStdout), "%s %v\r\n", cmd.TTY.Term, cmd.TTY.Size)
		} else {
			out.Write(agent.FrameStdout, []byte("ready\n"))
		}
		for {
			kind, b, err := in.Read()
			if err != nil {
				return shed.ExitStatus{}
			}
			fmt.Fprintf(out.Stream(agent.FrameStdout), "%d %q\r\n", kind, b)
			if string(b) == "q" || kind == agent.FrameSignal {
				return shed.ExitStatus{Code: 42}
			}
		}
	}
	return shed.ExitStatus{}
}

func serveGuest(t *testing.T) *apitest.Fake {
	t.Helper()
	fake := &apitest.Fake{Run: guest}
	fake.Add(shed.Shed{Name: "web"})
	serve(t, fake)
	return fake
}

func TestExecArguments(t *testing.T) {
	serveGuest(t)
	for _, test := range []struct {
		args []string
		want shed.Command
	}{
		{[]string{"exec", "web", "print", "-la", "--json", "a b", "", "$HOME"}, shed.Command{Args: []string{"print", "-la", "--json", "a b", "", "$HOME"}}},
		{[]string{"exec", "web", "--", "print", "--", "-h"}, shed.Command{Args: []string{"print", "--", "-h"}}},
		{[]string{"exec", "--", "web", "print"}, shed.Command{Args: []string{"print"}}},
		{[]string{"exec", "here/web", "print", "exec", "-s", "x"}, shed.Command{Args: []string{"print", "exec", "-s", "x"}}},
		{[]string{"-s", "here", "exec", "-w", "/tmp", "-e", "A=b,c", "-e", "B=", "-u", "root", "web", "print"},
			shed.Command{Args: []string{"print"}, Dir: "/tmp", Env: []string{"A=b,c", "B="}, User: "root"}},
	} {
		code, stdout, stderr := shedCLI(test.args...)
		var got shed.Command
		if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != 0 || stderr != "" || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%q: %d, %q, %q", test.args, code, stdout, stderr)
		}
	}
	expect(t, "exec web both", 143, "out\xff\x00", "err")
	expect(t, "exec web missing", 127, "", "shed: missing: no such program\n")
	expect(t, "exec none true", 255, "", "shed: there is no shed \"none\"\n")
}

func TestExecStreams(t *testing.T) {
	serveGuest(t)
	sent := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{1}).Read(sent)
	var out, errOut bytes.Buffer
	if code := run([]string{"exec", "web", "cat"}, bytes.NewReader(sent), &out, &errOut); code != 0 || !bytes.Equal(out.Bytes(), sent) {
		t.Errorf("%d, %d bytes came back, %q", code, out.Len(), errOut.String())
	}
}

func TestExecDoesNotWaitForStdin(t *testing.T) {
	serveGuest(t)
	stdin, w := io.Pipe() // never closed while the command runs
	defer w.Close()
	if code := run([]string{"exec", "web", "both"}, stdin, io.Discard, io.Discard); code != 143 {
		t.Errorf("exit code %d", code)
	}
}

func TestExecSignals(t *testing.T) {
	serveGuest(t)
	for sig, name := range signals {
		stdin, w := io.Pipe()
		r, stdout := io.Pipe()
		code := make(chan int)
		go func() {
			n := run([]string{"exec", "web", "wait"}, stdin, stdout, io.Discard)
			stdout.Close()
			code <- n
		}()
		lines := bufio.NewScanner(r)
		lines.Scan()
		syscall.Kill(os.Getpid(), sig.(syscall.Signal))
		lines.Scan()
		if want := fmt.Sprintf("%d %q", agent.FrameSignal, name); lines.Text() != want {
			t.Errorf("%v: got %q", sig, lines.Text())
		}
		if n := <-code; n != 42 {
			t.Errorf("%v: exit code %d", sig, n)
		}
		w.Close()
	}
}

// In a pipeline whose reader has gone away, exec ends without a word.
func TestExecBrokenPipe(t *testing.T) {
	serveGuest(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "exec", "web", "yes")
	cmd.Env = append(os.Environ(), "SHED_TEST_CLI=1")
	cmd.Stdout = w
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := io.ReadFull(r, make([]byte, 2)); err != nil {
		t.Error(err)
	}
	r.Close()
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 141 || stderr.Len() != 0 {
		t.Errorf("exit code %d, stderr %q", code, stderr.String())
	}
}

// session is a CLI that runs in a terminal.
type session struct {
	t     *testing.T
	user  *os.File // the user's side
	tty   *os.File
	out   *bufio.Reader
	code  chan int
	state *term.State
}

func newSession(t *testing.T, args ...string) *session {
	t.Helper()
	user, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		tty.Close()
		user.Close()
	})
	if err := pty.Setsize(user, &pty.Winsize{Rows: 33, Cols: 99}); err != nil {
		t.Fatal(err)
	}
	state, err := term.GetState(int(tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, user: user, tty: tty, out: bufio.NewReader(user), code: make(chan int, 1), state: state}
	go func() { s.code <- run(args, tty, tty, tty) }()
	return s
}

// until reads what is shown up to and including text.
func (s *session) until(text string) string {
	s.t.Helper()
	var got strings.Builder
	for !strings.HasSuffix(got.String(), text) {
		b, err := s.out.ReadByte()
		if err != nil {
			s.t.Fatalf("%v after %q", err, got.String())
		}
		got.WriteByte(b)
	}
	return got.String()
}

// end checks the exit code, and that the terminal is as it was.
func (s *session) end(code int) {
	s.t.Helper()
	if got := <-s.code; got != code {
		s.t.Errorf("exit code %d, want %d", got, code)
	}
	state, err := term.GetState(int(s.tty.Fd()))
	if err != nil || !reflect.DeepEqual(state, s.state) {
		s.t.Errorf("the terminal was not restored: %v", err)
	}
}

func TestConsole(t *testing.T) {
	serveGuest(t)
	t.Setenv("TERM", "shed-term")
	s := newSession(t, "console", "web")
	if got := s.until("\r\n"); got != "shed-term {33 99}\r\n" {
		t.Errorf("it began with %q", got)
	}
	io.WriteString(s.user, "\x03") // a byte like any other, in raw mode
	if got := s.until("\r\n"); got != "0 \"\\x03\"\r\n" {
		t.Errorf("Ctrl-C became %q", got)
	}
	if err := pty.Setsize(s.user, &pty.Winsize{Rows: 10, Cols: 20}); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(os.Getpid(), syscall.SIGWINCH)
	if got := s.until("\r\n"); got != "2 \"{\\\"rows\\\":10,\\\"cols\\\":20}\"\r\n" {
		t.Errorf("the new size became %q", got)
	}
	io.WriteString(s.user, "q")
	s.end(42)
}

func TestConsoleEndedBySignal(t *testing.T) {
	serveGuest(t)
	s := newSession(t, "console", "web")
	s.until("\r\n")
	syscall.Kill(os.Getpid(), syscall.SIGTERM)
	s.end(128 + 15)
}

func TestExecFromTerminal(t *testing.T) {
	serveGuest(t)
	s := newSession(t, "exec", "web", "wait")
	if got := s.until("1 \"\"\r\r\n"); !strings.HasPrefix(got, "ready\r\n") { // no stdin, and no raw mode
		t.Errorf("got %q", got)
	}
	syscall.Kill(os.Getpid(), syscall.SIGINT)
	s.end(42)
	s = newSession(t, "exec", "-i", "web", "wait")
	s.until("ready\r\n")
	io.WriteString(s.user, "line\n")
	s.until("0 \"line\\n\"\r\r\n")
	syscall.Kill(os.Getpid(), syscall.SIGINT)
	s.end(42)
	s = newSession(t, "exec", "-t", "web", "wait")
	s.until("{33 99}\r\n")
	io.WriteString(s.user, "q")
	s.end(42)
}

func TestDeleteAsks(t *testing.T) {
	fake := serveGuest(t)
	s := newSession(t, "delete", "web", "none")
	if said := s.until("there is no shed \"none\"\r\n"); strings.Contains(said, "[y/N]") {
		t.Errorf("it asked about a shed that isn't there: %q", said)
	}
	s.end(3)
	s = newSession(t, "delete", "web")
	s.until("[y/N] ")
	io.WriteString(s.user, "\n")
	s.until("nothing was done\r\n")
	s.end(1)
	s = newSession(t, "delete", "web")
	s.until("Delete web? What was written there is lost. [y/N] ")
	io.WriteString(s.user, "y\n")
	s.end(0)
	if list, _ := fake.List(t.Context()); len(list) != 0 {
		t.Errorf("there is still %v", list)
	}
}

func TestDisplay(t *testing.T) {
	proceed := make(chan struct{})
	fake := &apitest.Fake{Before: func(_ context.Context, op, _ string, p shed.Progress) error {
		if op == "start" {
			p.Report(shed.Event{Phase: "boot"})
			p.Report(shed.Event{Phase: "boot", Done: true, Elapsed: time.Millisecond})
			p.Report(shed.Event{Phase: "pull", Message: "pulling debian:12"})
			p.Report(shed.Event{Phase: "pull", Message: "unpacking"})
			p.Report(shed.Event{Phase: "pull", Current: 5 << 20, Total: 10 << 20, Unit: "bytes"})
			<-proceed
			p.Report(shed.Event{Phase: "pull", Current: 10 << 20, Total: 10 << 20, Unit: "bytes"})
			p.Report(shed.Event{Phase: "pull", Done: true, Elapsed: time.Second})
		}
		return nil
	}}
	fake.Add(shed.Shed{Name: "web"})
	serve(t, fake)
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "1")
	s := newSession(t, "start", "web")
	s.until("\r\x1b[J✓ start web: boot  0.0s\r\n")
	s.until("\r\x1b[K") // drawn
	s.until(" start web: pulling debian:12: unpacking  5.0 MiB/10 MiB  ")
	close(proceed)
	s.until("\r\x1b[J✓ start web: pulling debian:12  10 MiB  1.0s\r\n")
	if got := s.until("web\r\n"); !strings.HasSuffix(got, "\r\x1b[Jweb\r\n") {
		t.Errorf("the display was not cleared: %q", got)
	}
	s.end(0)
}
