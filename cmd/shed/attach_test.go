package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/creack/pty"
)

// sessionGuest says how it was attached to and shows what comes, as text. "q" leaves the session.
func sessionGuest(cmd shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
	w := out.Stream(agent.FrameStdout)
	fmt.Fprintf(w, "<%s %s %v>", cmd.Attach.Session, cmd.Attach.Mode, cmd.TTY.Size)
	for {
		kind, b, err := in.Read()
		if err != nil {
			return shed.ExitStatus{}
		}
		if kind == agent.FrameStdin {
			apitest.Ack(out, len(b))
		}
		fmt.Fprintf(w, "<%d %q>", kind, b)
		switch string(b) {
		case "q":
			return shed.ExitStatus{}
		case "x":
			return shed.ExitStatus{Code: 1}
		case "e":
			return shed.ExitStatus{Code: 127, Error: "no such shell"}
		}
	}
}

// restarting is a server that can be ended and started again.
type restarting struct {
	t      *testing.T
	fake   *apitest.Fake
	socket string
	stop   func()
}

func serveSessions(t *testing.T) *restarting {
	t.Helper()
	s := &restarting{t: t, fake: &apitest.Fake{Run: sessionGuest}, socket: filepath.Join(t.TempDir(), "s")}
	s.fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	writeConfig(t, "servers:\n  here:\n    socket: "+s.socket+"\n")
	s.start()
	return s
}

func (s *restarting) start() {
	s.t.Helper()
	s.stop = serveOn(s.t, s.socket, s.fake, api.Config{})
}

func TestAttach(t *testing.T) {
	serveSessions(t)
	s := newSession(t, "attach", "web")
	if got := s.until(">"); got != "<default  {33 99}>" {
		t.Errorf("it began with %q", got)
	}
	io.WriteString(s.user, "\x03\x1a")
	s.until(`<0 "\x03\x1a">`)
	if err := pty.Setsize(s.user, &pty.Winsize{Rows: 10, Cols: 20}); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(os.Getpid(), syscall.SIGWINCH)
	s.until(`<2 "{\"rows\":10,\"cols\":20}">`)
	io.WriteString(s.user, "q")
	s.end(0)
	if got := s.rest(); got != `<0 "q">` {
		t.Errorf("it ended with %q", got)
	}
}

// rest returns what is shown after the end of the program.
func (s *session) rest() string {
	io.WriteString(s.tty, "\x00")
	return strings.TrimSuffix(s.until("\x00"), "\x00")
}

func TestAttachNames(t *testing.T) {
	server := serveSessions(t)
	attach := func(want string, args ...string) {
		t.Helper()
		s := newSession(t, append([]string{"attach", "web"}, args...)...)
		if got := s.until(">"); got != want {
			t.Errorf("%q: %s, want %s", args, got, want)
		}
		io.WriteString(s.user, "q")
		s.end(0)
	}
	attach("<default new {33 99}>", "--new")
	attach("<x new {33 99}>", "--new", "-S", "x")
	attach("<x  {33 99}>", "--session", "x")
	server.fake.AddSession(shed.Session{Shed: "other", Name: "2"})
	server.fake.AddSession(shed.Session{Shed: "web", Name: "default"})
	server.fake.AddSession(shed.Session{Shed: "web", Name: "3"})
	attach("<2 new {33 99}>", "--new")

	// One that somebody else takes in between is passed over, but nothing is tried for ever.
	conflicts := 0
	server.fake.Before = func(_ context.Context, op, _ string, _ shed.Progress) error {
		if op == "exec" && conflicts == 0 {
			conflicts++
			server.fake.AddSession(shed.Session{Shed: "web", Name: "2"})
			return shed.Errorf(shed.CodeConflict, "shed \"web\" has a session \"2\"")
		}
		return nil
	}
	attach("<4 new {33 99}>", "--new")
	server.fake.Before = func(_ context.Context, op, _ string, _ shed.Progress) error {
		if op == "exec" {
			return shed.Errorf(shed.CodeConflict, "shed \"web\" is being created")
		}
		return nil
	}
	s := newSession(t, "attach", "web", "--new")
	s.until("shed: shed \"web\" is being created\r\n")
	s.end(255)
}

func TestAttachUsage(t *testing.T) {
	serveSessions(t)
	expect(t, "attach web", 2, "", "shed: shed attach needs a terminal\nhint: run a command with: shed exec web CMD\n")
	for args, want := range map[string]string{
		"attach":                    "shed attach needs NAME",
		"attach a b":                `shed attach takes only NAME, got "b"`,
		"attach --json web":         "no --json",
		"attach web -S a.b":         `"a.b" can't be the name of a session`,
		"attach web --new -S $(id)": `"$(id)" can't be the name of a session`,
		"attach web --session=":     `"" can't be the name of a session`,
	} {
		s := newSession(t, strings.Fields(args)...)
		s.until(want)
		s.end(2)
	}
	s := newSession(t, "attach", "none")
	s.until("there is no shed \"none\"\r\n")
	s.end(255)
}

// The size may change while the shed is being started.
func TestAttachResizedMeanwhile(t *testing.T) {
	server := serveSessions(t)
	var s *session
	ready := make(chan struct{})
	server.fake.Before = func(_ context.Context, op, _ string, _ shed.Progress) error {
		if op != "exec" {
			return nil
		}
		<-ready
		return pty.Setsize(s.user, &pty.Winsize{Rows: 10, Cols: 20})
	}
	s = newSession(t, "attach", "web")
	close(ready)
	s.until(`<default  {33 99}><2 "{\"rows\":10,\"cols\":20}">`)
	io.WriteString(s.user, "q")
	s.end(0)
}

const lostLine = saneTerminal + "\r\nshed: the connection to web was lost: unexpected EOF; trying again, Ctrl-C gives up\r\n"

// lose attaches, and ends the server.
func (s *restarting) lose() *session {
	s.t.Helper()
	session := newSession(s.t, "attach", "web")
	session.until("<default  {33 99}>")
	s.stop()
	if got := session.until("gives up\r\n"); got != lostLine {
		s.t.Errorf("it said %q", got)
	}
	session.until("does not answer: dial unix " + s.socket + ": connect: no such file or directory\r\n")
	return session
}

func TestAttachComesBack(t *testing.T) {
	server := serveSessions(t)
	s := server.lose()
	io.WriteString(s.user, "lost keys\r")
	if err := pty.Setsize(s.user, &pty.Winsize{Rows: 10, Cols: 20}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // and again
		server.start()
		if got := s.until(">"); got != "<default join {10 20}>" {
			t.Errorf("it came back with %q", got)
		}
		io.WriteString(s.user, "k")
		s.until(`<0 "k">`)
		server.stop()
		s.until("gives up\r\n")
		s.until("does not answer")
		s.until("\r\n")
	}
	server.start()
	s.until("<default join {10 20}>")
	io.WriteString(s.user, "q")
	s.until(`<0 "q">`)
	s.end(0)
}

func TestAttachGivesUp(t *testing.T) {
	server := serveSessions(t)
	for end, code := range map[os.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, syscall.SIGHUP: 129, syscall.SIGQUIT: 131, nil: 255} {
		s := server.lose()
		if end != nil {
			syscall.Kill(os.Getpid(), end.(syscall.Signal))
			s.end(code)
			if got := s.rest(); got != "" {
				t.Errorf("%v: it said %q", end, got)
			}
		} else {
			io.WriteString(s.user, "abc\x03")
			s.until("shed: gave up; session \"default\" of web is left as it is\r\n")
			s.end(code)
		}
		server.start()
	}
}

func TestAttachEndedBySignal(t *testing.T) {
	serveSessions(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		s := newSession(t, "attach", "web")
		s.until(">")
		syscall.Kill(os.Getpid(), sig)
		s.end(128 + int(sig))
		if got := s.rest(); got != saneTerminal {
			t.Errorf("%v: it ended with %q", sig, got)
		}
	}
}

// What the shed or the session has come to meanwhile ends it, and nothing is started again.
func TestAttachFindsChange(t *testing.T) {
	for _, test := range []struct {
		err  *shed.Error
		want string
	}{
		{shed.Errorf(shed.CodeConflict, "shed \"web\" is stopped"), "shed: shed \"web\" is stopped, and with it what ran in it\r\nhint: start it with a new session: shed attach web\r\n"},
		{shed.Errorf(shed.CodeNotFound, "no shed named \"web\""), "shed: no shed named \"web\"\r\n"},
		{shed.Errorf(shed.CodeNoSession, "gone"), "shed: session \"default\" of web ended while the connection was lost\r\n"},
	} {
		server := serveSessions(t)
		s := server.lose()
		attempts := 0
		server.fake.Before = func(_ context.Context, op, _ string, _ shed.Progress) error {
			switch op {
			case "start":
				t.Error("it was started")
			case "exec":
				if attempts++; attempts < 3 { // others are tried again
					return shed.Errorf(shed.CodeInternal, "not yet")
				}
				return test.err
			}
			return nil
		}
		server.start()
		if got := s.until(test.want); got != "shed: not yet\r\n"+test.want {
			t.Errorf("it said %q", got)
		}
		s.end(255)
	}
}

func TestAttachEnds(t *testing.T) {
	server := serveSessions(t)
	for key, want := range map[string]string{
		"x": saneTerminal + "shed: what showed session \"default\" of web ended with exit code 1\r\nhint: what still runs there: shed sessions web\r\n",
		"e": saneTerminal + "shed: session \"default\" of web: no such shell\r\n",
	} {
		s := newSession(t, "attach", "web")
		s.until(">")
		io.WriteString(s.user, key)
		s.until(want)
		s.end(255)
	}
	// A session that ends as it should may nevertheless have been ended with its shed.
	for _, key := range []string{"q", "x"} {
		for what, change := range map[string]func(context.Context) error{
			"shed \"web\" is stopped, and with it what ran in it\r\n": func(ctx context.Context) error {
				_, err := server.fake.Stop(ctx, "web", nil)
				return err
			},
			"shed \"web\" was deleted\r\n": func(ctx context.Context) error { return server.fake.Delete(ctx, "web", nil) },
		} {
			s := newSession(t, "attach", "web")
			s.until(">")
			if err := change(t.Context()); err != nil {
				t.Fatal(err)
			}
			io.WriteString(s.user, key)
			s.until(what)
			s.end(255)
			server.fake.Delete(t.Context(), "web", nil)
			server.fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
		}
	}
}
