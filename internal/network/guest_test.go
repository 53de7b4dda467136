package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// guest is a machine with a TCP/IP stack that is configured like a shed's.
type guest struct {
	t     *testing.T
	stack *stack.Stack
	link  *channel.Endpoint
}

// newGuest returns a guest, not yet connected. It ends with the test.
func newGuest(t *testing.T) *guest {
	g := &guest{t: t, link: channel.New(4096, MTU, linkAddr(GuestMAC))}
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	must := func(err tcpip.Error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	sack := tcpip.TCPSACKEnabled(true)
	must(g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	must(g.stack.CreateNIC(1, ethernet.New(g.link)))
	must(g.stack.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpAddr(guestAddr), PrefixLen: PrefixLen},
	}, stack.AddressProperties{}))
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: tcpip.AddressWithPrefix{Address: tcpAddr(gatewayAddr), PrefixLen: PrefixLen}.Subnet(), NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpAddr(gatewayAddr), NIC: 1},
	})
	t.Cleanup(func() {
		g.stack.Destroy()
		g.link.Close()
	})
	return g
}

// run is the guest's end of the wire. It returns when conn ends.
func (g *guest) run(conn net.Conn) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			pkt := g.link.ReadContext(ctx)
			if pkt == nil {
				return
			}
			frame := pkt.ToView().AsSlice()
			pkt.DecRef()
			if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
				return
			}
		}
	})
	r := bufio.NewReader(conn)
	for {
		var length [4]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			break
		}
		frame := make([]byte, binary.BigEndian.Uint32(length[:]))
		if _, err := io.ReadFull(r, frame); err != nil {
			break
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		g.link.InjectInbound(0, pkt)
		pkt.DecRef()
	}
	cancel()
	conn.Close()
	wg.Wait()
}

// connect joins the guest with n until the returned function is called, which
// returns what Serve returned.
func (g *guest) connect(n *Network) (disconnect func() error) {
	ours, theirs := socketPair(g.t)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { g.run(theirs) })
	wg.Go(func() { served <- n.Serve(ctx, ours) })
	disconnect = sync.OnceValue(func() error {
		cancel()
		wg.Wait()
		return <-served
	})
	g.t.Cleanup(func() { disconnect() })
	return disconnect
}

func (g *guest) dial(address string) (*gonet.TCPConn, error) {
	ap := netip.MustParseAddrPort(address)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.stack, tcpip.FullAddress{NIC: 1, Addr: tcpAddr(ap.Addr()), Port: ap.Port()}, ipv4.ProtocolNumber)
}

func (g *guest) dialUDP(address string) *gonet.UDPConn {
	g.t.Helper()
	ap := netip.MustParseAddrPort(address)
	c, err := gonet.DialUDP(g.stack, nil, &tcpip.FullAddress{NIC: 1, Addr: tcpAddr(ap.Addr()), Port: ap.Port()}, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// start returns a network with a guest on it.
func start(t *testing.T, cfg Config) (*Network, *guest) {
	t.Helper()
	checkLeaks(t)
	if cfg.Nameservers == nil {
		cfg.Nameservers = []netip.AddrPort{} // never the real ones
	}
	cfg.Log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	g.connect(n)
	return n, g
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// checkLeaks fails the test if, after its clean-ups, it leaves goroutines.
func checkLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		var now int
		for range 6000 {
			if now = runtime.NumGoroutine(); now <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after:\n%s", before, now, stacks[:runtime.Stack(stacks, true)])
	})
}

// socketPair returns the two ends of a Unix socket.
func socketPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "net") // t.TempDir's names can be too long
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// serveTCP runs handle for each connection to a loopback port, closes the
// connection afterwards, and returns the port.
func serveTCP(t *testing.T, handle func(*net.TCPConn)) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

// closedPort returns a loopback port of a network, on which nobody listens, nor can while the test lasts: it is a
// connection's to elsewhere.
func closedPort(t *testing.T, network string) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return int(netip.MustParseAddrPort(c.LocalAddr().String()).Port())
}
