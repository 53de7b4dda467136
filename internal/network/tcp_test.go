package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

func hostPort(port int) string { return fmt.Sprintf("%s:%d", hostIP, port) }

// exchange sends msg on c and checks that it comes back.
func exchange(c net.Conn, msg string) error {
	if _, err := io.WriteString(c, msg); err != nil {
		return err
	}
	got := make([]byte, len(msg))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != msg {
		return fmt.Errorf("got %q, sent %q", got, msg)
	}
	return nil
}

func TestInvalidConfig(t *testing.T) {
	for _, port := range []int{-1, 0, 65536} {
		_, err := New(Config{AllowHostPorts: []int{port}})
		if shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("port %d: %v", port, err)
		}
	}
}

func TestTCPEcho(t *testing.T) {
	port := serveTCP(t, echo)
	_, g := start(t, Config{AllowHostPorts: []int{port}})
	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := exchange(c, "hello"); err != nil {
		t.Fatal(err)
	}
}

func TestTCPRefused(t *testing.T) {
	port := serveTCP(t, echo)
	closed := closedPort(t, "tcp")
	_, g := start(t, Config{AllowHostPorts: []int{closed}})
	dsts := []string{
		hostPort(closed), // allowed, but nothing listens
		hostPort(port),   // not allowed
		fmt.Sprintf("%s:%d", Gateway, port),
		"169.254.169.254:80",
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.To4() != nil && !ip.IsLoopback() {
			dsts = append(dsts, fmt.Sprintf("%s:%d", ip, port))
		}
	}
	for _, dst := range dsts {
		c, err := g.dial(dst)
		if err == nil {
			c.Close()
			t.Errorf("%s: connected", dst)
		} else if !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", dst, err)
		}
	}
}

func TestTCPHalfClose(t *testing.T) {
	t.Run("guest first", func(t *testing.T) {
		port := serveTCP(t, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			c.Write(bytes.ToUpper(b))
		})
		_, g := start(t, Config{AllowHostPorts: []int{port}})
		c, err := g.dial(hostPort(port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "question")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "QUESTION" {
			t.Fatalf("%q, %v", b, err)
		}
	})
	t.Run("host first", func(t *testing.T) {
		got := make(chan string, 1)
		port := serveTCP(t, func(c *net.TCPConn) {
			io.WriteString(c, "banner")
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			got <- string(b)
		})
		_, g := start(t, Config{AllowHostPorts: []int{port}})
		c, err := g.dial(hostPort(port))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "banner" {
			t.Fatalf("%q, %v", b, err)
		}
		io.WriteString(c, "late")
		c.Close()
		if s := <-got; s != "late" {
			t.Fatalf("the host got %q", s)
		}
	})
}

func TestTCPReset(t *testing.T) {
	failed := make(chan error, 1)
	port := serveTCP(t, func(c *net.TCPConn) {
		b := make([]byte, 1)
		if io.ReadFull(c, b); b[0] == 'r' { // reset by the host
			c.SetLinger(0)
			return
		}
		c.Write(b)
		_, err := io.ReadAll(c)
		failed <- err
	})
	_, g := start(t, Config{AllowHostPorts: []int{port}})

	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "r")
	if _, err := io.ReadAll(c); err == nil {
		t.Error("the host's reset came as an end of data")
	}
	c.Close()

	if c, err = g.dial(hostPort(port)); err != nil {
		t.Fatal(err)
	}
	if err := exchange(c, "g"); err != nil {
		t.Fatal(err)
	}
	for _, e := range g.stack.RegisteredEndpoints() {
		e.Abort()
	}
	if err := <-failed; err == nil {
		t.Error("the guest's reset came as an end of data")
	}
}

// A guest that waits for an answer after it has ended its own way may be
// gone before there is one.
func TestTCPResetAfterHalfClose(t *testing.T) {
	reset := make(chan error)
	port := serveTCP(t, func(c *net.TCPConn) {
		io.ReadAll(c)
		c.Write([]byte("x"))
		for { // until the reset comes in
			if err := socketError(c); err != nil {
				reset <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	_, g := start(t, Config{AllowHostPorts: []int{port}})
	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for _, e := range g.stack.RegisteredEndpoints() {
		e.Abort()
	}
	<-reset
}

// socketError returns the pending error of c's socket.
func socketError(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var errno int
	if err2 := raw.Control(func(fd uintptr) {
		errno, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
	}); err2 != nil {
		return err2
	}
	if errno != 0 {
		return syscall.Errno(errno)
	}
	return err
}

// A guest may use a port again as soon as the host has closed its connection.
func TestTCPSamePort(t *testing.T) {
	port := serveTCP(t, func(*net.TCPConn) {})
	_, g := start(t, Config{AllowHostPorts: []int{port}})
	from := tcpip.FullAddress{NIC: 1, Addr: tcpAddr(guestAddr), Port: 5000}
	to := tcpip.FullAddress{NIC: 1, Addr: tcpAddr(hostAddr), Port: uint16(port)}
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		c, err := gonet.DialTCPWithBind(ctx, g.stack, from, to, ipv4.ProtocolNumber)
		for err != nil && strings.Contains(err.Error(), "refused") { // in the moment in which the old one ends
			c, err = gonet.DialTCPWithBind(ctx, g.stack, from, to, ipv4.ProtocolNumber)
		}
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); err != nil {
			t.Error(err)
		}
		c.Close()
		for len(g.stack.RegisteredEndpoints()) > 0 || len(g.stack.CleanupEndpoints()) > 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

func TestTCPMany(t *testing.T) {
	port := serveTCP(t, echo)
	_, g := start(t, Config{AllowHostPorts: []int{port}})
	const count = 200
	var wg, open sync.WaitGroup
	open.Add(count)
	for i := range count {
		wg.Go(func() {
			c, err := g.dial(hostPort(port))
			open.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			open.Wait() // all are open at once
			if err := exchange(c, strings.Repeat(fmt.Sprint(i), 1000)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestTCPLarge(t *testing.T) {
	const size = 64 << 20
	port := serveTCP(t, echo)
	_, g := start(t, Config{AllowHostPorts: []int{port}})
	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if _, err := io.CopyN(c, rand.NewChaCha8([32]byte{1}), size); err != nil {
			t.Error(err)
		}
		c.CloseWrite()
	})
	want := rand.NewChaCha8([32]byte{1})
	got, expect := make([]byte, 1<<16), make([]byte, 1<<16)
	total := 0
	for {
		n, err := c.Read(got)
		want.Read(expect[:n])
		if !bytes.Equal(got[:n], expect[:n]) {
			t.Fatalf("other data came back in the %d bytes at %d", n, total)
		}
		total += n
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if total != size {
		t.Errorf("%d bytes came back, %d were sent", total, size)
	}
}

// What a guest makes the stack hold is bounded, by the connections that it may have and the buffers of each.
func TestBuffersAreBounded(t *testing.T) {
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var send tcpip.TCPSendBufferSizeRangeOption
	var receive tcpip.TCPReceiveBufferSizeRangeOption
	if err := n.stack.TransportProtocolOption(tcp.ProtocolNumber, &send); err != nil {
		t.Fatal(err)
	}
	if err := n.stack.TransportProtocolOption(tcp.ProtocolNumber, &receive); err != nil {
		t.Fatal(err)
	}
	if total := (maxTCPConns + maxDNSConns) * (send.Max + receive.Max); total > 5<<30 {
		t.Errorf("a guest makes its keeper hold %d MB", total>>20)
	}
}

func TestReconnect(t *testing.T) {
	checkLeaks(t)
	port := serveTCP(t, echo)
	n, err := New(Config{AllowHostPorts: []int{port}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	g := newGuest(t)
	disconnect := g.connect(n)
	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := exchange(c, "before"); err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	defer theirs.Close()
	if err := n.Serve(t.Context(), ours); !errors.Is(err, errBusy) {
		t.Errorf("a second Serve at a time: %v", err)
	}
	if err := disconnect(); !errors.Is(err, context.Canceled) {
		t.Errorf("Serve = %v, want context.Canceled", err)
	}
	// Sent while there is no wire.
	if _, err := io.WriteString(c, "during"); err != nil {
		t.Fatal(err)
	}
	disconnect = g.connect(n)
	got := make([]byte, len("during"))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "during" {
		t.Fatalf("%q, %v", got, err)
	}
	if err := exchange(c, "after"); err != nil {
		t.Fatal(err)
	}
	n.Close()
	if err := disconnect(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve of a closed network = %v, want net.ErrClosed", err)
	}
}

// Close must end what is under way: a connection, a handshake that no guest answers.
func TestCloseUnderWay(t *testing.T) {
	port := serveTCP(t, echo)
	n, g := start(t, Config{AllowHostPorts: []int{port}})
	c, err := g.dial(hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	silent, err := New(Config{AllowHostPorts: []int{port}})
	if err != nil {
		t.Fatal(err)
	}
	silent.handleFrame(view(synFrame(hostIP, port)))
	for silent.link.NumQueued() == 0 { // the handshake's SYN-ACK
		time.Sleep(time.Millisecond)
	}
	if err := silent.Close(); err != nil {
		t.Error(err)
	}

	n.Close()
	n.Close()
}
