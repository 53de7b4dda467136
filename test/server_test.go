//go:build linux

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/porttest"
	"github.com/charliek/shed/internal/proclock"
)

// patience is how long something may take that is bound to happen. It is far
// more than any machine needs: a test that waits so long has failed.
const patience = 3 * time.Minute

// server is a shed-server with a directory of its own, where all is that it and its clients need.
type server struct {
	dir               string // short: sockets are in it
	state             string
	config            string
	clientConfig      string
	socket            string
	logFile           string
	httpPort, sshPort int

	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd has ended
}

// newServer prepares a server. extra is added to its configuration.
func newServer(extra string) (*server, error) {
	dir, err := os.MkdirTemp("", "shed-e2e-")
	if err != nil {
		return nil, err
	}
	s := &server{
		dir: dir, state: filepath.Join(dir, "st"), config: filepath.Join(dir, "server.yaml"),
		clientConfig: filepath.Join(dir, "client.yaml"), socket: filepath.Join(dir, "s.sock"),
		logFile: filepath.Join(dir, "server.log"),
	}
	live.add(s)
	if err := s.prepare(extra); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *server) prepare(extra string) error {
	if err := os.Mkdir(s.state, 0o700); err != nil {
		return err
	}
	for _, port := range []*int{&s.httpPort, &s.sshPort} {
		var err error
		if *port, err = porttest.Unused(); err != nil {
			return err
		}
	}
	config := fmt.Sprintf("name: e2e\nhttp_port: %d\nssh_port: %d\nsocket: %s\nstate_dir: %s\nenv_file: %s\n"+
		"qemu: {default_cpus: 1, default_memory_mb: 512}\n%s",
		s.httpPort, s.sshPort, s.socket, s.state, filepath.Join(s.dir, "env"), extra)
	if err := os.WriteFile(s.config, []byte(config), 0o600); err != nil {
		return err
	}
	return os.WriteFile(s.clientConfig, fmt.Appendf(nil, "servers:\n  here: {socket: %s}\n", s.socket), 0o600)
}

// start runs the server and returns when it answers.
func (s *server) start() error {
	if s.cmd != nil {
		return errors.New("the server runs already")
	}
	log, err := os.OpenFile(s.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(binDir, "shed-server"), "-c", s.config, "serve")
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "HOME="+s.dir)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd, s.ended = cmd, make(chan struct{})
	go func() {
		cmd.Wait()
		close(s.ended)
	}()
	if err := s.waitReady(); err != nil {
		s.kill()
		return fmt.Errorf("%w; its log:\n%s", err, s.log())
	}
	return s.writeKnownHosts()
}

func (s *server) waitReady() error {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.socket)
		},
	}}
	return eventually(func() error {
		select {
		case <-s.ended:
			return permanent{errors.New("the server ended: " + s.cmd.ProcessState.String())}
		default:
		}
		resp, err := client.Get("http://shed/api/info")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET /api/info: %s", resp.Status)
		}
		return nil
	})
}

// writeKnownHosts pins the server's host key for the ssh clients of the test.
func (s *server) writeKnownHosts() error {
	b, err := os.ReadFile(filepath.Join(s.state, "ssh_host_ed25519_key"))
	if err != nil {
		return err
	}
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return err
	}
	line := knownhosts.Line([]string{fmt.Sprintf("[127.0.0.1]:%d", s.sshPort)}, key.PublicKey())
	return os.WriteFile(filepath.Join(s.dir, "known_hosts"), []byte(line+"\n"), 0o600)
}

// stop asks the server to end, as a service manager does.
func (s *server) stop() error {
	if s.cmd == nil {
		return errors.New("the server does not run")
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-s.ended:
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("the server did not end on SIGTERM; its log:\n%s", s.log()), s.kill())
	}
	code := s.cmd.ProcessState.ExitCode()
	s.cmd = nil
	if code != 0 {
		return fmt.Errorf("the server ended with %d; its log:\n%s", code, s.log())
	}
	return nil
}

// kill ends the server with SIGKILL. If none runs, that is no error.
func (s *server) kill() error {
	if s.cmd == nil {
		return nil
	}
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-s.ended
	s.cmd = nil
	return nil
}

func (s *server) log() string {
	b, err := os.ReadFile(s.logFile)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// shed runs the CLI and returns its output. An error has what it said.
func (s *server) shed(ctx context.Context, args ...string) (stdout string, err error) {
	var out, errOut strings.Builder
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "shed"), args...)
	cmd.Env = append(os.Environ(), "SHED_CONFIG="+s.clientConfig)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("shed %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// list returns what `shed list` says.
func (s *server) list(ctx context.Context) ([]*shed.Shed, error) {
	out, err := s.shed(ctx, "list", "--json")
	if err != nil {
		return nil, err
	}
	var sheds []*shed.Shed
	if err := json.Unmarshal([]byte(out), &sheds); err != nil {
		return nil, fmt.Errorf("shed list --json: %w: %s", err, out)
	}
	return sheds, nil
}

// process is a process that belongs to a shed.
type process struct {
	pid  int
	kind string // "vmm" or "keeper"
	shed string // its name
}

func (p process) String() string { return fmt.Sprintf("%s of %s (pid %d)", p.kind, p.shed, p.pid) }

// processes finds the keepers and monitors of this server's sheds by their command lines, whatever
// the records say.
func (s *server) processes() ([]process, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	name := regexp.MustCompile(regexp.QuoteMeta(filepath.Join(s.state, "sheds")) + `/([a-z0-9-]+)`)
	var found []process
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		m := name.FindSubmatch(b)
		if m == nil {
			continue
		}
		p := process{kind: "vmm", shed: string(m[1])}
		if _, err := fmt.Sscanf(file, "/proc/%d/", &p.pid); err != nil {
			return nil, err
		}
		if args := strings.Split(string(b), "\x00"); len(args) > 1 && args[1] == "keep" {
			p.kind = "keeper"
		} else if !strings.Contains(args[0], "qemu-system-") {
			continue
		}
		found = append(found, p)
	}
	return found, nil
}

// findProcess returns the only process of that kind that a shed has.
func (s *server) findProcess(kind, shed string) (process, error) {
	all, err := s.processes()
	if err != nil {
		return process{}, err
	}
	var found []process
	for _, p := range all {
		if p.kind == kind && p.shed == shed {
			found = append(found, p)
		}
	}
	if len(found) != 1 {
		return process{}, fmt.Errorf("shed %s has %d processes of kind %s, not one: %v", shed, len(found), kind, found)
	}
	if kind == "vmm" {
		holder, err := proclock.Find(filepath.Join(s.state, "sheds", shed, "run", "vmm.lock"), 0)
		if err != nil {
			return process{}, err
		}
		if holder.PID() != found[0].pid {
			return process{}, fmt.Errorf("process %d has the lock run/vmm.lock of %s, and not %v", holder.PID(), shed, found[0])
		}
	}
	return found[0], nil
}

// kill ends the process with SIGKILL and waits until it is gone.
func (s *server) killProcess(p process) error {
	if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%v: %w", p, err)
	}
	return eventually(func() error {
		all, err := s.processes()
		if err != nil {
			return err
		}
		for _, other := range all {
			if other == p {
				return fmt.Errorf("%v is still there", p)
			}
		}
		return nil
	})
}

// checkProcesses fails if a shed has two of a kind, or none of its own.
func (s *server) checkProcesses() error {
	all, err := s.processes()
	if err != nil {
		return err
	}
	seen := map[process]bool{}
	for _, p := range all {
		if _, err := os.Stat(filepath.Join(s.state, "sheds", p.shed, "shed.json")); err != nil {
			return fmt.Errorf("the %v runs, of which there is no record: %w", p, err)
		}
		p.pid = 0
		if seen[p] {
			return fmt.Errorf("two of one kind: %v", all)
		}
		seen[p] = true
	}
	return nil
}

// endAll ends the server and all keepers and monitors.
func (s *server) endAll() error {
	if err := s.kill(); err != nil {
		return err
	}
	return eventually(func() error {
		all, err := s.processes()
		if err != nil {
			return err
		}
		for _, p := range all {
			if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		if len(all) > 0 {
			return fmt.Errorf("still there: %v", all)
		}
		return nil
	})
}

// close ends all that runs, removes all files, and fails if the server was unwell.
func (s *server) close() error {
	defer live.remove(s)
	err := s.endAll()
	if log := s.log(); strings.Contains(log, "panic:") || strings.Contains(log, "fatal error:") {
		err = errors.Join(err, fmt.Errorf("the server panicked:\n%s", log))
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// permanent is an error that waiting doesn't change.
type permanent struct{ error }

// eventually calls f until it returns nil or a permanent error, and for as long as patience lasts.
func eventually(f func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		var p permanent
		if err == nil || errors.As(err, &p) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v in vain: %w", patience, err)
		}
	}
}

// hostServices are what sheds find on the host's loopback.
type hostServices struct {
	http, echo, closed net.Listener
}

// listen starts an HTTP server that says hello, one that echoes, and one that sheds may not reach.
func listen() (*hostServices, error) {
	h := &hostServices{}
	for _, l := range []*net.Listener{&h.http, &h.echo, &h.closed} {
		var err error
		if *l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			h.close()
			return nil, err
		}
	}
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello from the host") })
	go http.Serve(h.http, hello)
	go http.Serve(h.closed, hello)
	go func() {
		for {
			conn, err := h.echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	return h, nil
}

func (h *hostServices) close() {
	for _, l := range []net.Listener{h.http, h.echo, h.closed} {
		if l != nil {
			l.Close()
		}
	}
}

func port(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }
