package network

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// echoUDP answers datagrams on a loopback port and returns the port.
func echoUDP(t *testing.T) int {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, maxDatagram)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()
	t.Cleanup(func() {
		pc.Close()
		<-done
	})
	return pc.LocalAddr().(*net.UDPAddr).Port
}

func TestUDPEcho(t *testing.T) {
	port := echoUDP(t)
	n, g := start(t, Config{AllowHostPorts: []int{port}})
	c := g.dialUDP(hostPort(port))
	for _, size := range []int{0, 1, 1400, 65507} { // the last one is fragmented
		msg := strings.Repeat("x", size)
		if _, err := io.WriteString(c, msg); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		b := make([]byte, maxDatagram)
		got, err := c.Read(b)
		if err != nil || string(b[:got]) != msg {
			t.Fatalf("%d bytes: %d bytes came back, %v", size, got, err)
		}
	}
	n.flows.mu.Lock()
	defer n.flows.mu.Unlock()
	if len(n.flows.m) != 1 {
		t.Errorf("%d flows", len(n.flows.m))
	}
}

func TestUDPRefused(t *testing.T) {
	port := echoUDP(t)
	closed := closedPort(t, "udp")
	_, g := start(t, Config{AllowHostPorts: []int{closed}})
	for _, dst := range []string{
		hostPort(port),   // not allowed
		hostPort(closed), // allowed, but nothing listens
	} {
		c := g.dialUDP(dst)
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		var err error
		var timeout net.Error
		for {
			// An ICMP error doesn't wake gVisor's Read, but the next one returns it.
			c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, err = c.Read(make([]byte, 10))
			if !errors.As(err, &timeout) || !timeout.Timeout() {
				break
			}
		}
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", dst, err)
		}
	}
}

// fakeConn is a datagram socket whose answers the test gives.
type fakeConn struct {
	sent, answers chan []byte
	closed        chan struct{}
}

func newFakeConn() *fakeConn {
	return &fakeConn{sent: make(chan []byte, 10), answers: make(chan []byte, 10), closed: make(chan struct{})}
}

func (c *fakeConn) Write(b []byte) (int, error) {
	c.sent <- append([]byte(nil), b...)
	return len(b), nil
}

func (c *fakeConn) Read(b []byte) (int, error) {
	select {
	case a := <-c.answers:
		return copy(b, a), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *fakeConn) SetReadDeadline(time.Time) error { return nil }

func (c *fakeConn) Close() error {
	select {
	case <-c.closed:
	default:
		close(c.closed)
	}
	return nil
}

// nextFrame returns the next frame that n sends, without a guest to take it.
func nextFrame(t *testing.T, n *Network) []byte {
	t.Helper()
	pkt := n.link.ReadContext(t.Context())
	defer pkt.DecRef()
	return pkt.ToView().AsSlice()
}

func TestPing(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	feed := func(frame []byte) { n.handleFrame(view(frame)) }

	conn := newFakeConn()
	var dialed netip.Addr
	n.flows.dialPing = func(dst netip.Addr) (datagramConn, error) {
		dialed = dst
		return conn, nil
	}
	feed(pingFrame("203.0.113.1"))
	if dialed != netip.MustParseAddr("203.0.113.1") {
		t.Fatalf("the ping went to %v", dialed)
	}
	reply := header.ICMPv4(<-conn.sent)
	if n.link.NumQueued() != 0 {
		t.Fatal("the ping was answered before it was")
	}
	conn.answers <- []byte{3, 3, 0} // not a reply
	reply.SetType(header.ICMPv4EchoReply)
	reply.SetIdent(999) // as Linux does
	conn.answers <- reply
	frame := nextFrame(t, n)
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	msg := header.ICMPv4(ip.Payload())
	if ip.SourceAddress().String() != "203.0.113.1" || msg.Type() != header.ICMPv4EchoReply ||
		msg.Ident() != 7 || msg.Sequence() != 9 || string(msg[header.ICMPv4MinimumSize:]) != "ping" {
		t.Errorf("the guest got %x", frame)
	}

	// The stack must not answer for an address that nobody reaches.
	n.flows.dialPing = func(netip.Addr) (datagramConn, error) { return nil, net.ErrClosed }
	feed(pingFrame("203.0.113.2"))
	feed(pingFrame("127.0.0.1"))
	feed(pingFrame("198.19.177.9"))
	// It does for the gateway, in the order in which it was asked.
	feed(pingFrame(Gateway))
	if ip := header.IPv4(nextFrame(t, n)[header.EthernetMinimumSize:]); ip.SourceAddress().String() != Gateway {
		t.Errorf("a ping was answered in the name of %s", ip.SourceAddress())
	}
}

func TestARP(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for _, addr := range []string{Gateway, hostIP} {
		n.handleFrame(view(arpFrame(header.ARPRequest, addr)))
		h := header.ARP(nextFrame(t, n)[header.EthernetMinimumSize:])
		if h.Op() != header.ARPReply || string(h.HardwareAddressSender()) != string(linkAddr(gatewayMAC)) {
			t.Errorf("%s: %x", addr, h)
		}
	}
}

// deadlineConn tells of the deadlines that it gets.
type deadlineConn struct {
	*fakeConn
	deadlines chan time.Time
}

func (c deadlineConn) SetReadDeadline(t time.Time) error {
	c.deadlines <- t
	return nil
}

// A step of the host's clock must not end a flow, nor keep it: what it is compared with is monotonic.
func TestFlowsKeepTime(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	conn := deadlineConn{newFakeConn(), make(chan time.Time, 10)}
	key := flowKey{proto: header.UDPProtocolNumber, port: 1, dst: netip.MustParseAddrPort("203.0.113.1:9")}
	if _, err := n.flows.get(key, time.Hour, func() (datagramConn, error) { return conn, nil }); err != nil {
		t.Fatal(err)
	}
	if at := <-conn.deadlines; !strings.Contains(at.String(), " m=+") {
		t.Errorf("the deadline is the wall clock's: %v", at)
	}
}

func TestFlowsEnd(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	open := func(port int) *flow {
		key := flowKey{proto: header.UDPProtocolNumber, port: uint16(port), dst: netip.MustParseAddrPort("203.0.113.1:9")}
		fl, err := n.flows.get(key, time.Hour, func() (datagramConn, error) { return newFakeConn(), nil })
		if err != nil {
			t.Fatal(err)
		}
		return fl
	}
	isClosed := func(fl *flow) bool {
		select {
		case <-fl.conn.(*fakeConn).closed:
			return true
		default:
			return false
		}
	}
	first, second := open(1), open(2)
	for port := 3; port <= maxFlows; port++ {
		open(port)
	}
	if open(1) != first {
		t.Error("a flow was made anew")
	}
	open(maxFlows + 1)
	if isClosed(first) || !isClosed(second) {
		t.Error("the flow that made room is not the one idle longest")
	}
	if count := len(n.flows.m); count != maxFlows {
		t.Errorf("%d flows", count)
	}

	port := echoUDP(t)
	key := flowKey{proto: header.UDPProtocolNumber, port: 1, dst: netip.MustParseAddrPort("203.0.113.1:10")}
	fl, err := n.flows.get(key, time.Millisecond, func() (datagramConn, error) {
		return net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	})
	if err != nil {
		t.Fatal(err)
	}
	for {
		n.flows.mu.Lock()
		current := n.flows.m[key]
		n.flows.mu.Unlock()
		if current != fl {
			break // the idle flow has ended
		}
		time.Sleep(time.Millisecond)
	}
	n.Close()
	if !isClosed(first) || len(n.flows.m) != 0 {
		t.Error("Close left a flow")
	}
}
