//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed/internal/api"
)

// server is a shed-server, and what its user has.
type server struct {
	bin    string // directory of the programs
	state  string
	env    []string // of the CLI
	home   string   // of the CLI's user, with a key that may log in
	cmd    *exec.Cmd
	client *api.Client
}

// newHome makes a home directory with a key for SSH.
func newHome(dir string) (string, error) {
	ssh := filepath.Join(dir, ".ssh")
	if err := os.MkdirAll(ssh, 0o700); err != nil {
		return "", err
	}
	_, _, err := timed(exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(ssh, "id_ed25519")))
	return dir, err
}

// startServer starts a server that keeps all it has below dir, which must be there: its state in dir/state. The key in
// home may log in.
func startServer(bin, dir, home string) (*server, error) {
	s := &server{bin: bin, state: filepath.Join(dir, "state"), home: home}
	socket := filepath.Join(dir, "s.sock")
	config, client := filepath.Join(dir, "server.yaml"), filepath.Join(dir, "config.yaml")
	s.env = append(os.Environ(), "SHED_CONFIG="+client, "HOME="+home, "SSH_AUTH_SOCK=")
	key, err := os.ReadFile(filepath.Join(home, ".ssh", "id_ed25519.pub"))
	if err != nil {
		return nil, err
	}
	files := map[string]string{
		config: fmt.Sprintf("name: bench\nhttp_port: 0\nssh_port: 0\nsocket: %s\nstate_dir: %s\nenv_file: \"\"\nauth: {authorized_keys: [%q]}\n",
			socket, s.state, strings.TrimSpace(string(key))),
		client: fmt.Sprintf("servers:\n  bench: {socket: %s}\n", socket),
	}
	for file, text := range files {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	log, err := os.Create(filepath.Join(dir, "server.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command(filepath.Join(bin, "shed-server"), "-c", config, "serve")
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.client = api.NewUnixClient(socket, "bench")
	err = eventually(func() error {
		_, err := s.client.Info(context.Background())
		return err
	})
	if err != nil {
		s.close()
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("the server did not start: %w\n%s", err, text)
	}
	return s, nil
}

// eventually tries f for ten seconds, and returns its last error.
func eventually(f func() error) error {
	var err error
	for range 200 {
		if err = f(); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// close deletes the server's sheds and ends it.
func (s *server) close() {
	sheds, err := s.client.List(context.Background())
	if err == nil {
		for _, shed := range sheds {
			s.client.Delete(context.Background(), shed.Name, nil)
		}
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.cmd.Wait()
}

// shed runs the CLI and returns how long it took as a whole process.
func (s *server) shed(args ...string) (time.Duration, error) {
	_, d, err := s.output(nil, args...)
	return d, err
}

func (s *server) output(stdin io.Reader, args ...string) (string, time.Duration, error) {
	cmd := s.command(args...)
	cmd.Stdin = stdin
	return timed(cmd)
}

// command is the CLI, not started yet.
func (s *server) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, "shed"), args...)
	cmd.Env = s.env
	return cmd
}

// timed runs cmd and returns its output and how long it took.
func timed(cmd *exec.Cmd) (string, time.Duration, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	d := time.Since(start)
	if err != nil {
		return "", d, fmt.Errorf("%s %s: %w: %s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, stderr.String())
	}
	return stdout.String(), d, nil
}
