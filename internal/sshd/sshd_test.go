package sshd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// localSheds has a shed named "box", whose commands run on this machine, one named
// "deaf", whose commands never read what is sent to them, and one that can't be started.
type localSheds struct {
	shed.Sheds
	ended    chan struct{} // receives whenever a command has ended
	execs    sync.WaitGroup
	accepted agent.Acceptances
}

func (l *localSheds) Dial(ctx context.Context, name string, to shed.Endpoint) (net.Conn, error) {
	if name != "box" {
		return nil, shed.Errorf(shed.CodeNotFound, "no shed named %q", name)
	}
	if to.Network == "accepted" {
		return l.accepted.Take(to.Address)
	}
	return (&net.Dialer{}).DialContext(ctx, to.Network, to.Address)
}

func (l *localSheds) Listen(_ context.Context, name string, on shed.Endpoint) (net.Conn, error) {
	if name != "box" {
		return nil, shed.Errorf(shed.CodeNotFound, "no shed named %q", name)
	}
	dir := ""
	if on.Network == "unix" && on.Address == "" {
		var err error
		if dir, err = os.MkdirTemp("", "agent"); err != nil {
			return nil, err
		}
		on.Address = dir + "/s"
	}
	listener, err := net.Listen(on.Network, on.Address)
	if err != nil {
		return nil, err
	}
	host, guest := net.Pipe()
	l.execs.Go(func() {
		l.accepted.Serve(guest, listener)
		if dir != "" {
			os.RemoveAll(dir)
		}
	})
	return host, nil
}

func (l *localSheds) Exec(_ context.Context, name string, cmd shed.Command) (net.Conn, error) {
	host, guest := net.Pipe()
	switch name {
	case "box":
		l.execs.Go(func() {
			serveExec(guest, cmd)
			l.ended <- struct{}{}
		})
		return host, nil
	case "deaf":
		l.execs.Go(func() { agent.NewFrameWriter(guest).Write(agent.FrameStdout, []byte("started\n")) })
		return &notifyingConn{Conn: host, closed: sync.OnceFunc(func() { l.ended <- struct{}{} })}, nil
	case "sick":
		return nil, shed.Errorf(shed.CodeBoot, "shed %q did not boot", name).WithHint("see its log")
	default:
		return nil, shed.Errorf(shed.CodeNotFound, "no shed named %q", name).WithHint("see 'shed list'")
	}
}

type notifyingConn struct {
	net.Conn
	closed func()
}

func (c *notifyingConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

// serveExec is the guest's side of the exec protocol.
func serveExec(conn net.Conn, cmd shed.Command) {
	defer conn.Close()
	w := agent.NewFrameWriter(conn)
	exit := func(status shed.ExitStatus) {
		b, _ := json.Marshal(status)
		w.Write(agent.FrameExit, b)
	}

	c := exec.Command("/bin/sh", "-c", cmd.Script)
	if cmd.Login {
		c = exec.Command("/bin/sh")
		c.Args[0] = "-sh"
	}
	if cmd.Subsystem != "" {
		c = exec.Command("echo", "subsystem", cmd.Subsystem)
	}
	c.Env = append(os.Environ(), cmd.Env...)
	var stdin io.WriteCloser
	var outputs []func()
	var terminal *os.File
	var err error
	if cmd.TTY != nil {
		c.Env = append(c.Env, "TERM="+cmd.TTY.Term)
		terminal, err = pty.StartWithSize(c, &pty.Winsize{Rows: cmd.TTY.Rows, Cols: cmd.TTY.Cols})
		if err == nil {
			defer terminal.Close()
			stdin = terminal
			outputs = append(outputs, func() { io.Copy(w.Stream(agent.FrameStdout), terminal) })
		}
	} else {
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		stdin, _ = c.StdinPipe()
		stdout, _ := c.StdoutPipe()
		stderr, _ := c.StderrPipe()
		err = c.Start()
		outputs = append(outputs,
			func() { io.Copy(w.Stream(agent.FrameStdout), stdout) },
			func() { io.Copy(w.Stream(agent.FrameStderr), stderr) })
	}
	if err != nil {
		exit(shed.ExitStatus{Code: 126, Error: err.Error()})
		return
	}

	input := make(chan []byte, 4096) // nil is its end
	var reaped atomic.Bool
	var readers, writers sync.WaitGroup
	readers.Go(func() {
		for b := range input {
			if b != nil {
				stdin.Write(b)
				w.Write(agent.FrameStdinAck, binary.BigEndian.AppendUint32(nil, uint32(len(b))))
			} else if terminal == nil {
				stdin.Close()
			}
		}
	})
	readers.Go(func() {
		defer close(input)
		for r := agent.NewFrameReader(conn); ; {
			t, b, err := r.Read()
			if err != nil {
				if !reaped.Load() {
					syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
				}
				return
			}
			switch t {
			case agent.FrameStdin:
				input <- bytes.Clone(b)
			case agent.FrameStdinEOF:
				input <- nil
			case agent.FrameResize:
				var size shed.Size
				json.Unmarshal(b, &size)
				pty.Setsize(terminal, &pty.Winsize{Rows: size.Rows, Cols: size.Cols})
			case agent.FrameSignal:
				syscall.Kill(-c.Process.Pid, unix.SignalNum("SIG"+string(b)))
			}
		}
	})
	for _, f := range outputs {
		writers.Go(f)
	}
	writers.Wait()
	c.Wait()
	reaped.Store(true)
	status := shed.ExitStatus{Code: c.ProcessState.ExitCode()}
	if ws := c.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		status.Code = 128 + int(ws.Signal())
		status.Signal = strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG")
	}
	exit(status)
	conn.Close()
	readers.Wait()
}

// testServer is a running Server and one client that may log in.
type testServer struct {
	*Server
	t       *testing.T
	dir     string
	addr    string
	keyFile string // authorized_keys, with the client's key
	ident   string // the client's private key
	signer  ssh.Signer
	sheds   *localSheds
	logged  *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newTestServer starts a server. When the test ends, it is stopped, and all its
// goroutines have to end.
func newTestServer(t *testing.T, change ...func(*Server)) *testServer {
	t.Helper()
	for _, tool := range []string{"ssh", "ssh-keygen"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("this test needs OpenSSH's client (package openssh-client): %v", err)
		}
	}
	before := runtime.NumGoroutine()
	ts := &testServer{t: t, dir: t.TempDir(), logged: &lockedBuffer{}, sheds: &localSheds{ended: make(chan struct{}, 10_000)}}
	if err := os.Chmod(ts.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", ts.dir) // what is above it doesn't make the keys there unsafe
	ts.ident, ts.signer = ts.newKey("id")
	ts.keyFile = filepath.Join(ts.dir, "authorized_keys")
	ts.authorize(string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey())))

	hostKey, err := LoadOrCreateHostKey(filepath.Join(ts.dir, "host_key"))
	if err != nil {
		t.Fatal(err)
	}
	ts.Server = New(Config{
		Sheds:          ts.sheds,
		HostKey:        hostKey,
		AuthorizedKeys: AuthorizedKeys{Files: []string{filepath.Join(ts.dir, "missing"), ts.keyFile}},
		Log:            slog.New(slog.NewTextHandler(ts.logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	for _, f := range change {
		f(ts.Server)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	_, port, _ := net.SplitHostPort(ts.addr)
	known := "[127.0.0.1]:" + port + " " + string(ssh.MarshalAuthorizedKey(hostKey.PublicKey()))
	if err := os.WriteFile(filepath.Join(ts.dir, "known_hosts"), []byte(known), 0o600); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- ts.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		ts.sheds.execs.Wait()
		// The last instructions of a goroutine come after whoever waits for it knows. One
		// that stays is shown by the stacks when the test's own time is up.
		for runtime.NumGoroutine() > before {
			time.Sleep(time.Millisecond)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", ts.logged)
		}
	})
	return ts
}

// newKey makes a key with ssh-keygen and returns its file.
func (ts *testServer) newKey(name string) (path string, signer ssh.Signer) {
	ts.t.Helper()
	path = filepath.Join(ts.dir, name)
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path).CombinedOutput(); err != nil {
		ts.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		ts.t.Fatal(err)
	}
	signer, err = ssh.ParsePrivateKey(b)
	if err != nil {
		ts.t.Fatal(err)
	}
	return path, signer
}

// authorize makes text the file of authorized keys, at once: a server that finds half of it ends connections.
func (ts *testServer) authorize(text string) {
	ts.t.Helper()
	whole := ts.keyFile + ".new"
	err := os.WriteFile(whole, []byte(text), 0o600)
	if err == nil {
		err = os.Rename(whole, ts.keyFile)
	}
	if err != nil {
		ts.t.Fatal(err)
	}
}

// ssh returns OpenSSH's client, which logs in as user with the key ident.
func (ts *testServer) ssh(ident, user string, args ...string) *exec.Cmd {
	_, port, _ := net.SplitHostPort(ts.addr)
	all := []string{"-F", "/dev/null", "-p", port, "-i", ident, "-l", user,
		"-o", "UserKnownHostsFile=" + filepath.Join(ts.dir, "known_hosts"),
		"-o", "GlobalKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes"}
	cmd := exec.Command("ssh", append(all, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return cmd
}

// result is what a command left behind.
type result struct {
	stdout, stderr string
	code           int
}

func (ts *testServer) run(cmd *exec.Cmd) result {
	ts.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		ts.t.Fatal(err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// box runs a script in the shed "box".
func (ts *testServer) box(script string, options ...string) result {
	ts.t.Helper()
	return ts.run(ts.ssh(ts.ident, "box", append(options, "127.0.0.1", script)...))
}

func clientConfig(user string, keys ...ssh.Signer) *ssh.ClientConfig {
	return &ssh.ClientConfig{
		User:            user,
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(keys...)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	}
}

// dial logs in with Go's client.
func (ts *testServer) dial(user string, keys ...ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", ts.addr, clientConfig(user, keys...))
}

func (ts *testServer) mustDial(user string) *ssh.Client {
	ts.t.Helper()
	c, err := ts.dial(user, ts.signer)
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { c.Close() })
	return c
}

// startOn runs a script on a new channel of conn, whose requests are left to the caller.
func (ts *testServer) startOn(conn ssh.Conn, script string) (ssh.Channel, <-chan *ssh.Request) {
	ts.t.Helper()
	ch, requests, err := conn.OpenChannel("session", nil)
	if err != nil {
		ts.t.Fatal(err)
	}
	if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ S string }{script})); !ok || err != nil {
		ts.t.Fatal(ok, err)
	}
	return ch, requests
}

// memoryKey makes a key that is in no file.
func memoryKey(t testing.TB) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerFromKey(newPrivateKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newPrivateKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
