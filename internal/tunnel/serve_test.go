//go:build linux || darwin

package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/charliek/shed"
)

func TestHTTP(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	defer web.Close()
	tun := newTestTunnel(t, newTestServer(t), web.Listener.Addr().(*net.TCPAddr).Port)
	_, port, err := net.SplitHostPort(tun.address(0))
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1", "[::1]", "localhost"} {
		resp, err := http.Post("http://"+host+":"+port+"/x", "text/plain", strings.NewReader("hello"))
		if err != nil {
			if host == "[::1]" && len(tun.claim.listeners[0]) == 1 {
				continue // this machine has no IPv6
			}
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); string(b) != "hello" || err != nil {
			t.Errorf("%s: %q, %v", host, b, err)
		}
		resp.Body.Close()
	}
	http.DefaultClient.CloseIdleConnections()
	if said := tun.lines(); len(said) > 0 {
		t.Errorf("%q", said)
	}
}

// TestHalfClosed has each side end its direction first, and still get what the other one sends.
func TestHalfClosed(t *testing.T) {
	data := bytes.Repeat([]byte("data "), 300_000)
	whole := listenTCP(t, func(conn *net.TCPConn) { // answers when it has got all
		b, err := io.ReadAll(conn)
		if err == nil {
			_, err = conn.Write(b)
		}
		if err != nil {
			t.Error(err)
		}
		conn.CloseWrite()
	})
	first := make(chan []byte, 1)
	ends := listenTCP(t, func(conn *net.TCPConn) { // ends its direction, and takes what still comes
		if _, err := conn.Write([]byte("bye")); err != nil {
			t.Error(err)
		}
		conn.CloseWrite()
		b, err := io.ReadAll(conn)
		if err != nil {
			t.Error(err)
		}
		first <- b
	})
	tun := newTestTunnel(t, newTestServer(t), whole, ends)

	conn := tun.dial(0)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- errors.Join(err, conn.CloseWrite())
	}()
	if b, err := io.ReadAll(conn); !bytes.Equal(b, data) || err != nil {
		t.Errorf("%d bytes of %d, %v", len(b), len(data), err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}

	conn = tun.dial(1)
	if b, err := io.ReadAll(conn); string(b) != "bye" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := conn.Write(data); err != nil {
		t.Error(err)
	}
	conn.CloseWrite()
	if b := <-first; !bytes.Equal(b, data) {
		t.Errorf("%d bytes of %d", len(b), len(data))
	}
	eventually(func() bool { return slices.Equal(tun.status().Connections, []int{0, 0}) })
}

// TestManyConnections has 200 of them open at once, and then nothing left.
func TestManyConnections(t *testing.T) {
	const n = 200
	echoPort := listenTCP(t, echo)
	s := newTestServer(t)
	gets := 0
	var mu sync.Mutex
	s.fake.Before = func(_ context.Context, op, _ string, _ shed.Progress) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "get" {
			gets++
		}
		return nil
	}
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	tun := newTestTunnel(t, s, echoPort)
	conns := make([]*net.TCPConn, n)
	for i := range conns {
		conns[i] = tun.dial(0)
	}
	talk := func(i int) {
		line := fmt.Sprintf("line %d", i)
		got := make([]byte, len(line))
		if _, err := io.WriteString(conns[i], line); err != nil {
			t.Error(err)
		} else if _, err := io.ReadFull(conns[i], got); err != nil || string(got) != line {
			t.Errorf("%q, %v", got, err)
		}
	}
	var parts sync.WaitGroup
	for i := range slices.Backward(conns) {
		parts.Go(func() { talk(i) })
	}
	parts.Wait()
	if open := tun.status().Connections[0]; open != n {
		t.Errorf("%d connections", open)
	}
	// It isn't asked before each connection.
	if mu.Lock(); gets > n {
		t.Errorf("the server was asked %d times how the shed is", gets)
	}
	mu.Unlock()
	for i, conn := range conns {
		talk(i)
		if i%2 == 0 {
			conn.SetLinger(0)
		}
		conn.Close()
	}
	eventually(func() bool { return tun.status().Connections[0] == 0 })
	tun.stop()
	s.fake.WaitCommands()
	eventually(func() bool { return runtime.NumGoroutine() <= goroutines && openFiles(t) <= files })
	if left := left(t, tun.registry.dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if said := tun.lines(); len(said) > 0 {
		t.Errorf("%q", said)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestStopWithConnections stops a tunnel that is in use.
func TestStopWithConnections(t *testing.T) {
	tun := newTestTunnel(t, newTestServer(t), listenTCP(t, echo))
	conn := tun.dial(0)
	if _, err := io.WriteString(conn, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	tun.stop()
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes", n)
	}
	free(t, tun.claim.Record.Ports[0].Local)
}

// TestServerRestarts has the server go away and come back, with connections waiting for it.
func TestServerRestarts(t *testing.T) {
	t.Parallel()
	s := newTestServer(t)
	tun := newTestTunnel(t, s, listenTCP(t, echo))
	s.stop()
	status := tun.waitState(Reconnecting)
	if !strings.Contains(status.Reason, "the server") {
		t.Errorf("%+v", status)
	}
	conns := make([]*net.TCPConn, 20)
	for i := range conns {
		conns[i] = tun.dial(0)
		if _, err := io.WriteString(conns[i], "hello"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(func() bool { return tun.status().Connections[0] == len(conns) })
	s.start()
	for _, conn := range conns {
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); string(b) != "hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
	if status := tun.waitState(Up); status.Reason != "" {
		t.Errorf("%+v", status)
	}
	said := tun.lines()
	if len(said) != 2 || !strings.HasPrefix(said[0], "the connection to web is lost, trying again: ") || said[1] != "web can be reached again" {
		t.Errorf("%q", said)
	}
}

// TestServerStaysAway has a connection that isn't kept waiting for good.
func TestServerStaysAway(t *testing.T) {
	t.Parallel()
	s := newTestServer(t)
	tun := newTestTunnel(t, s, 1)
	s.stop()
	tun.refused(0)
	if s := tun.status(); s.State != Reconnecting {
		t.Errorf("%+v", s)
	}
	if said := tun.lines(); len(said) != 1 {
		t.Errorf("%q", said)
	}
}

// TestStoppedShed has a shed that was stopped and stays so, whatever connects.
func TestStoppedShed(t *testing.T) {
	t.Parallel()
	s := newTestServer(t)
	tun := newTestTunnel(t, s, listenTCP(t, echo))
	tun.waitState(Up)
	if _, err := s.fake.Stop(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		tun.refused(0)
	}
	if sh, err := s.fake.Get(t.Context(), "web"); err != nil || sh.Status != shed.StatusStopped {
		t.Errorf("%+v, %v", sh, err)
	}
	if s := tun.status(); s.State != Refusing || s.Reason != `shed "web" is stopped` {
		t.Errorf("%+v", s)
	}
	if _, err := s.fake.Start(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	conn := tun.dial(0)
	io.WriteString(conn, "x")
	conn.CloseWrite()
	if b, err := io.ReadAll(conn); string(b) != "x" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := s.fake.Delete(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	tun.refused(0)
	want := []string{`connections to web are refused: shed "web" is stopped`, "web can be reached again", `connections to web are refused: there is no shed "web"`}
	if said := tun.lines(); !slices.Equal(said, want) {
		t.Errorf("%q", said)
	}
}

// TestNothingListens has a port of the shed that nobody answers on: that is said once, until somebody does.
func TestNothingListens(t *testing.T) {
	port := freePort(t)
	tun := newTestTunnel(t, newTestServer(t), port)
	for range 3 {
		tun.refused(0)
	}
	if said := tun.lines(); len(said) != 1 || !strings.Contains(said[0], "connection refused") {
		t.Errorf("%q", said)
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}
	conn := tun.dial(0)
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read %d bytes, %v", n, err)
	}
	l.Close()
	tun.refused(0)
	if said := tun.lines(); len(said) != 1 {
		t.Errorf("%q", said)
	}
	if s := tun.status(); s.State != Up {
		t.Errorf("%+v", s)
	}
}

// TestRecordRemoved has a tunnel that nobody could stop any more.
func TestRecordRemoved(t *testing.T) {
	t.Parallel()
	tun := newTestTunnel(t, newTestServer(t), 1)
	if err := os.RemoveAll(tun.registry.dir); err != nil {
		t.Fatal(err)
	}
	eventually(func() bool {
		said := tun.lines()
		return len(said) == 1 && strings.Contains(said[0], "it ends")
	})
	eventually(func() bool {
		conn, err := net.Dial("tcp", tun.address(0))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// TestConnectionLost has a program in the shed that fails: the one here sees no proper end.
func TestConnectionLost(t *testing.T) {
	tun := newTestTunnel(t, newTestServer(t), listenTCP(t, func(conn *net.TCPConn) {
		conn.Write([]byte("half"))
		io.ReadFull(conn, make([]byte, 1))
		conn.SetLinger(0)
	}))
	conn := tun.dial(0)
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "x")
	eventually(func() bool { // what is sent after the end makes the failure known
		_, err := conn.Write([]byte("y"))
		return err != nil
	})
}
