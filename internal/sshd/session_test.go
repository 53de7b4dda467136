package sshd

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
)

func TestExec(t *testing.T) {
	ts := newTestServer(t)
	for _, c := range []struct {
		script string
		want   result
	}{
		{"echo out; echo err >&2; exit 7", result{"out\n", "err\n", 7}},
		{"true", result{"", "", 0}},
		{"exit 255", result{"", "", 255}},
		{`printf '%s|' a "b  c" '$HOME'`, result{"a|b  c|$HOME|", "", 0}},
		{"no-such-command-here 2>/dev/null", result{"", "", 127}},
		{"kill -TERM $$", result{"", "", 255}}, // what ssh makes of any signal
	} {
		if got := ts.box(c.script); got != c.want {
			t.Errorf("%s: %+v", c.script, got)
		}
	}
}

func TestBinaryBothWays(t *testing.T) {
	ts := newTestServer(t)
	data := make([]byte, 8<<20)
	rand.Read(data)
	cmd := ts.ssh(ts.ident, "box", "127.0.0.1", "cat")
	cmd.Stdin = bytes.NewReader(data)
	got := ts.run(cmd)
	if got.code != 0 || got.stdout != string(data) {
		t.Errorf("exit code %d, %d bytes, same: %v, %s", got.code, len(got.stdout), got.stdout == string(data), got.stderr)
	}
}

// The end of the input is not the end of the output.
func TestStdinEOF(t *testing.T) {
	ts := newTestServer(t)
	cmd := ts.ssh(ts.ident, "box", "127.0.0.1", "wc -c; echo after; exit 4")
	cmd.Stdin = strings.NewReader("12345")
	if got := ts.run(cmd); strings.Fields(got.stdout)[0] != "5" || !strings.HasSuffix(got.stdout, "after\n") || got.code != 4 {
		t.Errorf("%+v", got)
	}
	// A command that doesn't want its input ends all the same.
	cmd = ts.ssh(ts.ident, "box", "127.0.0.1", "exec <&-; echo done")
	cmd.Stdin = io.LimitReader(rand.Reader, 4<<20)
	if got := ts.run(cmd); got.stdout != "done\n" || got.code != 0 {
		t.Errorf("%+v", got)
	}
}

func TestLoginShell(t *testing.T) {
	ts := newTestServer(t)
	cmd := ts.ssh(ts.ident, "box", "127.0.0.1")
	cmd.Stdin = strings.NewReader("echo $0; exit 5\n")
	if got := ts.run(cmd); got.stdout != "-sh\n" || got.code != 5 {
		t.Errorf("%+v", got)
	}
}

func TestEnvironment(t *testing.T) {
	ts := newTestServer(t)
	got := ts.box(`echo "$LC_TEST|$EVIL|$COLORTERM"`, "-o", "SetEnv=LC_TEST=x EVIL=y COLORTERM=truecolor")
	if got.stdout != "x|y|truecolor\n" {
		t.Errorf("%+v", got)
	}
	if got := ts.box("echo $SSH_CLIENT / $SSH_CONNECTION"); !regexp.MustCompile(`^127.0.0.1 (\d+) (\d+) / 127.0.0.1 \d+ 127.0.0.1 \d+\n$`).MatchString(got.stdout) {
		t.Errorf("%+v", got)
	}
}

func TestTerminal(t *testing.T) {
	ts := newTestServer(t)
	cmd := ts.ssh(ts.ident, "box", "-tt", "127.0.0.1",
		`trap 'stty size; exit 6' WINCH; echo "term $TERM"; stty size; while :; do sleep 0.05; done`)
	cmd.Env = append(cmd.Env, "TERM=vt220")
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	lines := bufio.NewScanner(terminal)
	expect := func(want string) {
		t.Helper()
		for lines.Scan() {
			if strings.TrimSpace(lines.Text()) == want {
				return
			}
		}
		t.Fatalf("no line %q before the end: %v", want, lines.Err())
	}
	expect("term vt220")
	expect("24 80")
	if err := pty.Setsize(terminal, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	expect("50 132")
	io.Copy(io.Discard, terminal)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 6 {
		t.Errorf("exit code %d", code)
	}
}

func TestSignals(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	start := func(script string) (*ssh.Session, *bufio.Reader) {
		t.Helper()
		s, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(script); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(out)
		if line, err := r.ReadString('\n'); line != "ready\n" {
			t.Fatalf("%q, %v", line, err)
		}
		return s, r
	}
	var exit *ssh.ExitError

	s, _ := start("echo ready; exec sleep 1000")
	if err := s.Signal(ssh.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(); !errors.As(err, &exit) || exit.Signal() != "TERM" {
		t.Errorf("TERM: %v", err)
	}

	s, _ = start("trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done")
	if err := s.Signal(ssh.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(); !errors.As(err, &exit) || exit.Signal() != "" || exit.ExitStatus() != 9 {
		t.Errorf("USR1: %v", err)
	}
}

func TestClientKilled(t *testing.T) {
	ts := newTestServer(t)
	cmd := ts.ssh(ts.ident, "box", "127.0.0.1", "echo ready; exec sleep 100000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	cmd.Process.Signal(os.Kill)
	cmd.Wait()
	<-ts.sheds.ended
}

// The end of one channel ends its command and leaves the connection alone.
func TestChannelClosed(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	s, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("sleep 100000"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	<-ts.sheds.ended
	s, err = client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.Output("echo still here"); string(out) != "still here\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}

// A command that reads nothing holds up neither its channel's requests nor other channels.
func TestDeafCommand(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("deaf")
	s, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	stdin, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "started\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if _, err := stdin.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if err := s.WindowChange(i, i); err != nil {
			t.Fatal(err)
		}
		if err := s.Signal(ssh.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	other, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start("x"); err != nil {
		t.Fatal(err)
	}
	client.Close()
	<-ts.sheds.ended
	<-ts.sheds.ended
}

func TestManyChannels(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.maxChannels = 200 })
	client := ts.mustDial("box")
	var open []ssh.Channel
	for range 200 {
		ch, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		open = append(open, ch)
	}
	_, _, err := client.OpenChannel("session", nil)
	var refused *ssh.OpenChannelError
	if !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
		t.Errorf("one too many: %v", err)
	}
	var wg sync.WaitGroup
	for i, ch := range open {
		if i >= 40 {
			ch.Close()
			continue
		}
		wg.Go(func() {
			ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ S string }{"cat; echo end"}))
			if !ok || err != nil {
				t.Errorf("exec: %v, %v", ok, err)
				return
			}
			data := bytes.Repeat([]byte{byte(i)}, 300_000)
			wg.Go(func() {
				ch.Write(data)
				ch.CloseWrite()
			})
			got, err := io.ReadAll(ch)
			if err != nil || string(got) != string(data)+"end\n" {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
}

func TestErrorsInSession(t *testing.T) {
	ts := newTestServer(t)
	for user, want := range map[string]string{
		"nope": "shed: no shed named \"nope\"\nhint: see 'shed list'\n",
		"sick": "shed: shed \"sick\" did not boot\nhint: see its log\n",
		"../x": "shed: no shed named \"../x\"\nhint: ",
		"a b":  "shed: no shed named \"a b\"\nhint: ",
		"BOX":  "shed: no shed named \"BOX\"\nhint: ",
	} {
		got := ts.run(ts.ssh(ts.ident, user, "127.0.0.1", "echo never"))
		if got.stdout != "" || !strings.HasPrefix(got.stderr, want) || got.code != 255 {
			t.Errorf("%q: %+v", user, got)
		}
	}
	for _, user := range []string{"", "x\x00y", "x\x1b[31m", "\xff", strings.Repeat("x", 20_000)} {
		client, err := ts.dial(user, ts.signer)
		if err != nil {
			t.Errorf("%.10q: %v", user, err)
			continue
		}
		s, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		s.Stderr = &stderr
		err = s.Run("echo never")
		var exit *ssh.ExitError
		if !errors.As(err, &exit) || exit.ExitStatus() != 255 || !strings.HasPrefix(stderr.String(), "shed: no shed named ") ||
			stderr.Len() > 500 || !utf8.Valid(stderr.Bytes()) || bytes.ContainsAny(stderr.Bytes(), "\x00\x1b") {
			t.Errorf("%.10q: %v, %q", user, err, stderr.String())
		}
		client.Close()
	}
	// With a terminal, lines end as a raw one needs it.
	cmd := ts.ssh(ts.ident, "nope", "-tt", "127.0.0.1", "true")
	if got := ts.run(cmd); !strings.HasPrefix(got.stderr, "shed: no shed named \"nope\"\r\nhint: see 'shed list'\r\n") {
		t.Errorf("%+v", got)
	}
}

func TestRefusedRequests(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	open := func() (ssh.Channel, func(string, []byte) bool) {
		t.Helper()
		ch, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		return ch, func(name string, payload []byte) bool {
			t.Helper()
			ok, err := ch.SendRequest(name, true, payload)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return ok
		}
	}
	str := func(s string) []byte { return ssh.Marshal(struct{ S string }{s}) }

	ch, send := open()
	for name, payload := range map[string][]byte{
		"subsystem":       str("netconf"),
		"x11-req":         []byte("garbage"),
		"break":           nil,
		"no such request": nil,
		"exec":            {0xff, 0xff, 0xff, 0xff, 1},
		"pty-req":         []byte("\x00\x00\x00\x01"),
		"env":             []byte("\x00\x00\x00\x04LANG"),
		"window-change":   ssh.Marshal(struct{ A, B, C, D uint32 }{1, 2, 3, 4}), // no terminal
		"signal":          str("TERM"),                                          // no command
	} {
		if send(name, payload) {
			t.Errorf("%s was accepted", name)
		}
	}
	for i := range maxEnv + 1 {
		if got := send("env", ssh.Marshal(envPayload{"LC_X", "y"})); got != (i < maxEnv) {
			t.Fatalf("variable %d accepted: %v", i+1, got)
		}
	}
	// After all of that the channel still works, once.
	if !send("exec", str("echo $LC_X; read x")) {
		t.Fatal("exec was refused")
	}
	for name, payload := range map[string][]byte{
		"shell": nil, "exec": str("true"), "signal": str("TERMINATE"),
		"env": ssh.Marshal(envPayload{"LANG", "C"}), "pty-req": ssh.Marshal(ptyPayload{Term: "xterm"}),
	} {
		if send(name, payload) {
			t.Errorf("%s was accepted after the start", name)
		}
	}
	ch.CloseWrite()
	if out, err := io.ReadAll(ch); string(out) != "y\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}

	_, send = open()
	if !send("exec", str("")) {
		t.Error("the empty command was refused")
	}

	for kind, want := range map[string]ssh.RejectionReason{
		"direct-tcpip": ssh.ConnectionFailed, "direct-streamlocal@openssh.com": ssh.ConnectionFailed, "x11": ssh.UnknownChannelType,
	} {
		_, _, err := client.OpenChannel(kind, nil)
		var refused *ssh.OpenChannelError
		if !errors.As(err, &refused) || refused.Reason != want || refused.Message == "" {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if ok, _, err := client.SendRequest("keepalive@openssh.com", true, nil); !ok || err != nil {
		t.Errorf("keepalive: %v, %v", ok, err)
	}
	for _, name := range []string{"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com", "no such request"} {
		for _, payload := range [][]byte{nil, []byte("garbage"), ssh.Marshal(hostPortPayload{"localhost", 1 << 16}), str(""), str("not/absolute")} {
			if ok, _, err := client.SendRequest(name, true, payload); ok || err != nil {
				t.Errorf("%s %q: %v, %v", name, payload, ok, err)
			}
		}
	}
}

func TestSharedConnection(t *testing.T) {
	ts := newTestServer(t)
	dir := socketDir(t)
	master := ts.ssh(ts.ident, "box", "-M", "-S", dir+"/s", "127.0.0.1", "echo ready; cat")
	stdin, err := master.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := master.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			cmd := exec.Command("ssh", "-F", "/dev/null", "-S", dir+"/s", "127.0.0.1", "echo a; exit 3")
			out, _ := cmd.Output()
			if string(out) != "a\n" || cmd.ProcessState.ExitCode() != 3 {
				t.Errorf("%q, %v", out, cmd.ProcessState)
			}
		})
	}
	wg.Wait()
	stdin.Close()
	if err := master.Wait(); err != nil {
		t.Error(err)
	}
}
