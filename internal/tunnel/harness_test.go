//go:build linux || darwin

package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/api/apitest"
)

// testServer is a server of a fake with one shed, "web", whose localhost is this machine's.
type testServer struct {
	t      *testing.T
	fake   *apitest.Fake
	socket string
	stop   func()
}

func newTestServer(t *testing.T) *testServer {
	s := &testServer{t: t, socket: filepath.Join(t.TempDir(), "s")}
	s.fake = &apitest.Fake{Connect: func(ctx context.Context, to shed.Endpoint) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, to.Network, to.Address)
		if err != nil {
			return nil, shed.Errorf(shed.CodeConnect, "in shed %q: %w", "web", err)
		}
		return conn, nil
	}}
	s.fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *testServer) start() {
	ln, err := net.Listen("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- api.Serve(ctx, ln, api.NewServer(api.Config{Sheds: s.fake, Images: s.fake, Log: log}), log)
	}()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	})
}

// testTunnel is a tunnel to the shed of a testServer.
type testTunnel struct {
	t        *testing.T
	registry *Registry
	claim    *Claim
	stop     func()

	mu   sync.Mutex
	said []string
}

// newTestTunnel forwards any free local ports to the remote ones.
func newTestTunnel(t *testing.T, s *testServer, remote ...int) *testTunnel {
	t.Helper()
	rec := Record{Shed: "web", Server: "here"}
	for _, p := range remote {
		rec.Ports = append(rec.Ports, Port{0, p})
	}
	tun := &testTunnel{t: t, registry: NewRegistry(t.TempDir())}
	var err error
	if tun.claim, _, err = tun.registry.Claim(t.Context(), rec, false); err != nil {
		t.Fatal(err)
	}
	client := api.NewUnixClient(s.socket, "the server")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tun.claim.Serve(ctx, client, func(format string, args ...any) {
			tun.mu.Lock()
			defer tun.mu.Unlock()
			tun.said = append(tun.said, fmt.Sprintf(format, args...))
		})
	}()
	tun.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		client.Close()
		if err := tun.claim.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(tun.stop)
	return tun
}

func (tun *testTunnel) address(i int) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(tun.claim.Record.Ports[i].Local))
}

func (tun *testTunnel) dial(i int) *net.TCPConn {
	tun.t.Helper()
	conn, err := net.Dial("tcp", tun.address(i))
	if err != nil {
		tun.t.Fatal(err)
	}
	tun.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// lines returns what has been reported since it was last called.
func (tun *testTunnel) lines() []string {
	tun.mu.Lock()
	defer tun.mu.Unlock()
	said := tun.said
	tun.said = nil
	return said
}

// status returns how the tunnel is doing.
func (tun *testTunnel) status() Status {
	tun.t.Helper()
	list, err := tun.registry.List(tun.t.Context())
	if err != nil || len(list) != 1 {
		tun.t.Fatalf("%+v, %v", list, err)
	}
	return list[0].Status
}

// waitState returns the status when it has that state.
func (tun *testTunnel) waitState(want State) Status {
	tun.t.Helper()
	var s Status
	eventually(func() bool {
		s = tun.status()
		return s.State == want
	})
	return s
}

// refused fails unless a connection is closed as one that failed.
func (tun *testTunnel) refused(i int) {
	tun.t.Helper()
	conn, err := net.Dial("tcp", tun.address(i))
	if err == nil { // it may have come to its end already
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		tun.t.Error(err)
	}
}

// eventually returns when f is true.
func eventually(f func() bool) {
	for !f() {
		time.Sleep(5 * time.Millisecond)
	}
}

// listenTCP has handle handle the connections to a port, which it returns.
func listenTCP(t *testing.T, handle func(*net.TCPConn)) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var parts sync.WaitGroup
	parts.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			parts.Go(func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		parts.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

func echo(conn *net.TCPConn) {
	io.Copy(conn, conn)
	conn.CloseWrite()
}
