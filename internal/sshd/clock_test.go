package sshd

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// pipeListener is a network whose time a test controls.
type pipeListener struct {
	conns    chan net.Conn
	failures chan error
	closed   chan struct{}
	once     sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case err := <-l.failures:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// eagerConn is a connection whose Write returns before the other side reads: both sides of SSH begin with a write.
type eagerConn struct {
	net.Conn
	written chan []byte
	closed  chan struct{}
	once    sync.Once
}

func newEagerConn(conn net.Conn) *eagerConn {
	c := &eagerConn{Conn: conn, written: make(chan []byte, 16), closed: make(chan struct{})}
	go func() {
		for {
			select {
			case b := <-c.written:
				c.Conn.Write(b) // which fails at once when it is closed
			case <-c.closed:
				return
			}
		}
	}()
	return c
}

func (c *eagerConn) Write(b []byte) (int, error) {
	select {
	case c.written <- bytes.Clone(b):
		return len(b), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *eagerConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// clockedServer is a Server for the bubbles of synctest, where time passes when all wait.
type clockedServer struct {
	*Server
	sheds *localSheds
	user  ssh.Signer // may log in
	l     *pipeListener
}

// newClockedServer starts a server, which is stopped when the test ends.
func newClockedServer(t *testing.T) *clockedServer {
	t.Helper()
	cs := &clockedServer{
		sheds: &localSheds{ended: make(chan struct{}, 10)}, user: memoryKey(t),
		l: &pipeListener{conns: make(chan net.Conn), failures: make(chan error), closed: make(chan struct{})},
	}
	cs.Server = New(Config{
		Sheds: cs.sheds, HostKey: memoryKey(t),
		AuthorizedKeys: AuthorizedKeys{Lines: []string{string(ssh.MarshalAuthorizedKey(cs.user.PublicKey()))}},
	})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- cs.Serve(ctx, cs.l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		cs.sheds.execs.Wait()
	})
	return cs
}

func (cs *clockedServer) dial() net.Conn {
	client, server := net.Pipe()
	cs.l.conns <- server
	return client
}

// start logs in and runs a command that never ends. The server's requests are left to the caller.
func (cs *clockedServer) start(t *testing.T) (ssh.Conn, ssh.Channel, <-chan *ssh.Request) {
	t.Helper()
	nc := newEagerConn(cs.dial())
	t.Cleanup(func() { nc.Close() })
	conn, channels, requests, err := ssh.NewClientConn(nc, "pipe", clientConfig("deaf", cs.user))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for nch := range channels {
			nch.Reject(ssh.Prohibited, "")
		}
	}()
	ch, reqs, err := conn.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ S string }{"x"})); !ok || err != nil {
		t.Fatal(ok, err)
	}
	return conn, ch, requests
}

// lives fails the test if a command has ended.
func (cs *clockedServer) lives(t *testing.T) {
	t.Helper()
	select {
	case <-cs.sheds.ended:
		t.Fatal("the client was given up")
	default:
	}
}

func TestSlowHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newClockedServer(t).dial()
		defer conn.Close()
		if b, err := io.ReadAll(conn); string(b) != "SSH-2.0-shed\r\n" {
			t.Errorf("%q, %v", b, err)
		}
	})
}

// What accept(2) reports of a connection, of the network or of want isn't the end of the server.
func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newClockedServer(t)
		_, _, requests := cs.start(t)
		go ssh.DiscardRequests(requests)
		for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENETDOWN, syscall.EPROTO, syscall.EHOSTUNREACH, syscall.EPERM} {
			select {
			case cs.l.failures <- &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", errno)}:
			case <-cs.l.closed:
				t.Fatalf("before %v: the server has ended", errno)
			}
		}
		cs.lives(t)
		_, _, requests = cs.start(t)
		go ssh.DiscardRequests(requests)
	})
}

// A client that keeps sending, but nothing that gets it in, has no more time than others.
func TestSlowloris(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newClockedServer(t)
		start := time.Now()
		conn := cs.dial()
		defer conn.Close()
		go io.Copy(io.Discard, conn)
		for {
			if _, err := conn.Write([]byte("S")); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(start); took > cs.handshakeTimeout+time.Second {
			t.Errorf("it had %v", took)
		}
	})
}

// A client that doesn't answer is given up, which ends its commands. One that does may be idle for long.
func TestMuteClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newClockedServer(t)
		_, _, requests := cs.start(t)
		var mute atomic.Bool
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for req := range requests {
				if !mute.Load() {
					req.Reply(false, nil)
				}
			}
		}()
		time.Sleep(time.Hour)
		cs.lives(t)
		mute.Store(true)
		<-cs.sheds.ended
		<-ended
	})
}

// A client that answers nothing but sends something lives: its answers wait behind that.
func TestBusyClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newClockedServer(t)
		_, ch, requests := cs.start(t)
		for range 1000 {
			if _, err := ch.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			time.Sleep(cs.keepAlive)
		}
		cs.lives(t)
		if len(requests) == 0 {
			t.Error("the server asked for no sign of life")
		}
		<-cs.sheds.ended
		for range requests {
		}
	})
}

// How long a client has been silent is no difference of two times of day: the clock may have been set in between.
func TestSilenceIsMonotonic(t *testing.T) {
	ts := newTestServer(t)
	s, err := ts.mustDial("box").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for c := range ts.conns {
		// The text of a time with a monotonic reading ends with that.
		if start := c.heard.start.String(); !strings.Contains(start, " m=") {
			t.Errorf("it is counted from %s", start)
		}
		if last := time.Duration(c.heard.last.Load()); last <= 0 || last > time.Since(c.heard.start) {
			t.Errorf("something was read %v after the connection began", last)
		}
	}
	if len(ts.conns) != 1 {
		t.Errorf("%d connections", len(ts.conns))
	}
}
