package client

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
)

func TestRemote(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	s.Add(shed.Shed{Name: "web"})
	servers, client := s.connect(Options{})
	sheds, err := client.List(t.Context())
	if err != nil || len(sheds) != 1 || sheds[0].Name != "web" {
		t.Fatalf("%+v, %v", sheds, err)
	}
	// All at once use one SSH connection.
	var parts sync.WaitGroup
	for range 20 {
		parts.Go(func() {
			if _, err := client.Get(t.Context(), "web"); err != nil {
				t.Error(err)
			}
		})
	}
	parts.Wait()
	first, _ := servers.remotes[0].link()
	// An error of the server's is its own.
	if _, err := client.Get(t.Context(), "none"); shed.ErrorCode(err) != shed.CodeNotFound {
		t.Errorf("a shed that isn't there: %v", err)
	}
	if last, _ := servers.remotes[0].link(); last != first {
		t.Error("it logged in more than once")
	}
	// The server is started again in between.
	s.stopSSH()
	if _, err := client.List(t.Context()); shed.ErrorCode(err) != shed.CodeUnreachable {
		t.Errorf("of a server that has ended: %v", err)
	}
	s.listen(s.addr)
	if _, err := client.List(t.Context()); err != nil {
		t.Errorf("of a server that is there again: %v", err)
	}
}

// A stream carries much in both directions, and each direction's end.
func TestRemoteStream(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	_, client := s.connect(Options{})
	const n = 20 << 20
	sent := make([]byte, n)
	if _, err := rand.Read(sent); err != nil {
		t.Fatal(err)
	}
	s.Add(shed.Shed{Name: "web"})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.Connect = func(ctx context.Context, _ shed.Endpoint) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		b, _ := io.ReadAll(conn) // to the end of that direction
		conn.Write(b)
	}()
	conn, err := client.Dial(t.Context(), "web", shed.Endpoint{Network: "tcp", Address: "localhost:1"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var writing sync.WaitGroup
	writing.Go(func() {
		if _, err := conn.Write(sent); err != nil {
			t.Error(err)
		}
		if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(conn)
	writing.Wait()
	if err != nil || sha256.Sum256(got) != sha256.Sum256(sent) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
}

// followed begins a stream that goes on, and returns it.
func followed(t *testing.T, s *testServer, client *api.Client) io.ReadCloser {
	t.Helper()
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	s.Log = func(ctx context.Context, _ bool) io.ReadCloser {
		context.AfterFunc(ctx, func() { w.Close() })
		return r
	}
	s.Add(shed.Shed{Name: "web"})
	logs, err := client.Logs(t.Context(), "web", true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { logs.Close() })
	return logs
}

// When the SSH connection is lost, so are its streams: they don't just end.
func TestRemoteLost(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	_, client := s.connect(Options{})
	logs := followed(t, s, client)
	s.stopSSH()
	_, err := io.ReadAll(logs)
	wantError(t, err, "server \"home\" at 127.0.0.1:", "was lost")
}

// relay carries connections to addr until it is frozen.
type relay struct {
	net.Listener
	addr   string
	frozen atomic.Bool // what is carried now gets no further, ever
}

func newRelay(t *testing.T, addr string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, addr: addr}
	var parts sync.WaitGroup
	ended := make(chan struct{})
	carry := func(to, from net.Conn) {
		b := make([]byte, 32<<10)
		for {
			n, err := from.Read(b)
			if r.frozen.Load() {
				<-ended
				return
			}
			if err != nil {
				to.Close()
				return
			}
			to.Write(b[:n])
		}
	}
	parts.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", r.addr)
			if err != nil {
				client.Close()
				continue
			}
			parts.Go(func() {
				<-ended
				client.Close()
				server.Close()
			})
			parts.Go(func() { carry(server, client) })
			parts.Go(func() { carry(client, server) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		close(ended)
		parts.Wait()
	})
	return r
}

// A network that swallows everything is noticed, without anybody closing a connection; the next request connects anew.
func TestRemoteSilent(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	r := newRelay(t, s.addr)
	s.addr = r.Addr().String()
	servers, client := s.connect(Options{})
	logs := followed(t, s, client)
	r.frozen.Store(true)
	l, _ := servers.remotes[0].link()
	l.tick.Reset(time.Millisecond)
	_, err := io.ReadAll(logs)
	wantError(t, err, "was lost", "no sign of life")
	r.frozen.Store(false)
	if _, err := client.List(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRemoteUnreachable(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	addr := s.addr
	s.stopSSH()
	_, client := s.connect(Options{})
	_, err := client.List(t.Context())
	wantError(t, err, "server \"home\" at "+addr+" can't be reached: nothing listens there", "bind_address", s.addr)

	// One that accepts and never answers.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.addr = l.Addr().String()
	servers, client := s.connect(Options{})
	servers.remotes[0].connectTimeout = 500 * time.Millisecond
	_, err = client.List(t.Context())
	wantError(t, err, "is connected, but does not answer")
	// Whoever gives up doesn't wait for that.
	servers.remotes[0].connectTimeout = time.Hour
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err = client.List(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}

	// One that isn't SSH.
	l2, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()
	go func() {
		conn, err := l2.Accept()
		if err == nil {
			fmt.Fprint(conn, "Not allowed at this time\r\n")
			conn.Close()
		}
	}()
	s.addr = l2.Addr().String()
	_, client = s.connect(Options{})
	_, err = client.List(t.Context())
	wantError(t, err, "lets nobody in from here for a while", "passes in a minute")

	servers = open(t, Options{}, map[string]Server{"a": {Host: "no-such-host.invalid"}})
	if client, err = servers.Client("a"); err != nil {
		t.Fatal(err)
	}
	_, err = client.List(t.Context())
	wantError(t, err, "server \"a\" at no-such-host.invalid:2222 can't be reached")
}

func TestHostKeys(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	servers, client := s.connect(Options{})
	old := ssh.FingerprintSHA256(s.host.PublicKey())
	s.stopSSH()
	s.host = signerOf(t, newKey(t))
	s.listen(s.addr)
	fresh := ssh.FingerprintSHA256(s.host.PublicKey())
	_, err := client.List(t.Context())
	_, port, _ := net.SplitHostPort(s.addr)
	wantError(t, err, old, fresh, "in between", "shed server remove home; shed server add 127.0.0.1 --name home --ssh-port "+port+" --fingerprint "+fresh)

	// The pins are read when a client is made.
	if err := UnpinKey(t.Context(), servers.Config.KnownHosts(), s.addr); err != nil {
		t.Fatal(err)
	}
	servers = open(t, Options{}, map[string]Server{"home": s.server()})
	if client, err = servers.Client("home"); err != nil {
		t.Fatal(err)
	}
	_, err = client.List(t.Context())
	wantError(t, err, "is not known", fresh, "shed server add")
}

func TestProbe(t *testing.T) {
	_, public := home(t)
	s := newServer(t, public)
	servers := open(t, Options{}, nil)
	var key ssh.PublicKey
	info, err := servers.Probe(t.Context(), s.server(), func(k ssh.PublicKey) error { key = k; return nil })
	if err != nil || info.Name != "fake" || !sameKey(key, s.host.PublicKey()) {
		t.Errorf("%+v, %v", info, err)
	}
	refusal := shed.Errorf(shed.CodeUnreachable, "not this one")
	if _, err := servers.Probe(t.Context(), s.server(), func(ssh.PublicKey) error { return refusal }); !errors.Is(err, refusal) {
		t.Error(err)
	}
	if info, err := servers.Probe(t.Context(), Server{Socket: s.socket}, nil); err != nil || info.Name != "fake" {
		t.Errorf("%+v, %v", info, err)
	}
	_, err = servers.Probe(t.Context(), Server{Socket: s.socket + "x"}, nil)
	wantError(t, err, "the server at "+s.socket+"x does not answer")
}
