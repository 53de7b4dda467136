package client

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/charliek/shed/internal/porttest"
	"github.com/charliek/shed/internal/sshd"
)

// home gives the test a home directory with a key, and no OpenSSH. It returns the public half of the key.
func home(t *testing.T) (dir, public string) {
	t.Helper()
	dir = t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("SHED_CONFIG", "")
	t.Setenv("SSH_AUTH_SOCK", "")
	t.Setenv("PATH", filepath.Join(dir, "bin"))
	for _, sub := range []string{"bin", ".ssh", ".shed"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir, writeKey(t, filepath.Join(dir, ".ssh", "id_ed25519"), "")
}

func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return private
}

func signerOf(t *testing.T, key any) ssh.Signer {
	t.Helper()
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// writeKey makes a key in a file and returns its line of authorized keys.
func writeKey(t *testing.T, path, passphrase string) string {
	t.Helper()
	key := newKey(t)
	var block *pem.Block
	var err error
	if passphrase == "" {
		block, err = ssh.MarshalPrivateKey(key, "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, string(pem.EncodeToMemory(block)))
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signerOf(t, key).PublicKey())))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// socketDir makes a directory whose path is short enough for a socket in it.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "client")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// testServer is an SSH server with the HTTP API of a fake inside.
type testServer struct {
	*apitest.Fake
	t       *testing.T
	host    ssh.Signer
	keys    string // file of authorized keys
	socket  string
	addr    string
	stopSSH func()
}

func newServer(t *testing.T, authorized ...string) *testServer {
	t.Helper()
	dir := socketDir(t)
	s := &testServer{Fake: &apitest.Fake{}, t: t, host: signerOf(t, newKey(t)), socket: filepath.Join(dir, "s")}
	// In the home directory: a file of keys in one that others can write, as /tmp, doesn't count.
	s.keys = filepath.Join(os.Getenv("HOME"), "keys-"+filepath.Base(dir))
	s.authorize(authorized...)
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	handler := api.NewServer(api.Config{Sheds: s.Fake, Images: s.Fake, Info: shed.Info{Name: "fake", Version: "v7"}, Log: log})
	run(t, func(ctx context.Context) error { return api.Serve(ctx, l, handler, log) })
	port, err := porttest.Unused() // it may listen there again
	if err != nil {
		t.Fatal(err)
	}
	s.listen(fmt.Sprintf("127.0.0.1:%d", port))
	return s
}

// run runs serve until the test ends, or stop is called.
func run(t *testing.T, serve func(ctx context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (s *testServer) authorize(lines ...string) {
	s.t.Helper()
	write(s.t, s.keys, strings.Join(lines, "\n")+"\n")
}

// listen starts the SSH server, with the host key that s has now.
func (s *testServer) listen(addr string) {
	s.t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	srv := sshd.New(sshd.Config{
		Sheds: s.Fake, HostKey: s.host, AuthorizedKeys: sshd.AuthorizedKeys{Files: []string{s.keys}},
		API: func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", s.socket) },
	})
	s.stopSSH = run(s.t, func(ctx context.Context) error { return srv.Serve(ctx, l) })
}

func (s *testServer) server() Server { return serverAt(s.t, s.addr) }

func serverAt(t *testing.T, addr string) Server {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return Server{Host: host, SSHPort: n}
}

// open returns the servers of a configuration with those of the map. They are closed with the test.
func open(t *testing.T, opts Options, servers map[string]Server) *Servers {
	t.Helper()
	cfg, err := LoadConfig("")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Servers = servers
	s := NewServers(cfg, opts)
	t.Cleanup(func() { s.Close() })
	return s
}

func (s *testServer) pin(cfg *Config) {
	s.t.Helper()
	if err := PinKey(s.t.Context(), cfg.KnownHosts(), s.addr, s.host.PublicKey()); err != nil {
		s.t.Fatal(err)
	}
}

// connect returns a client of s, whose key is pinned.
func (s *testServer) connect(opts Options) (*Servers, *api.Client) {
	s.t.Helper()
	servers := open(s.t, opts, map[string]Server{"home": s.server()})
	s.pin(servers.Config)
	client, err := servers.Client("home")
	if err != nil {
		s.t.Fatal(err)
	}
	return servers, client
}

// wantError checks that err is unreachable, and that what it says has all of parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if shed.ErrorCode(err) != shed.CodeUnreachable {
		t.Errorf("error %v (%s)", err, shed.ErrorCode(err))
	}
	if err == nil {
		return
	}
	said := err.Error() + "\n" + shed.ErrorHint(err)
	for _, part := range parts {
		if !strings.Contains(said, part) {
			t.Errorf("no %q in: %s", part, said)
		}
	}
}
