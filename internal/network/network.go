// Package network is the network of one shed: a user-mode TCP/IP stack that
// stands between the guest and the server's own sockets.
//
// The guest's network card is connected to the stack and to nothing else.
// TCP and UDP that the guest sends ends in the stack, is judged by a policy,
// and is carried on by ordinary sockets of this process; so no privilege is
// needed on the host, and nothing reaches the outside past the policy. Every
// shed has a stack of its own and the same addresses inside it.
//
// IPv4 only: the guest is given no IPv6 address.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/charliek/shed"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// The addresses are the same in every shed. There is no DHCP: the agent
// configures Guest, a default route by Gateway, and Gateway as name server.
//
// The subnet is a slice of 198.18.0.0/15, which RFC 2544 sets aside for tests
// of network devices. Unlike the private ranges it is used by neither LANs
// nor Docker's networks, and unlike 100.64.0.0/10 not by carriers or
// tailnets. Proxies that hand out made-up addresses start at its lower end.
const (
	subnet     = "198.19.177.0/24"
	Gateway    = "198.19.177.1" // also the DNS server
	Guest      = "198.19.177.2"
	hostIP     = "198.19.177.3" // stands for the server's loopback, for allowed ports
	PrefixLen  = 24
	gatewayMAC = "02:73:68:65:64:01"
	GuestMAC   = "02:73:68:65:64:02" // the machine's network card must have it
)

// MTU of the guest's network card, in bytes without the ethernet header. The
// wire has no medium that would limit it, and what a packet costs hardly
// depends on its size: large ones are a multiple faster. It is the largest
// multiple of 16 that QEMU and IPv4 can carry.
const MTU = 65520

// Names that the DNS server on Gateway answers itself.
const (
	zone        = "shed.internal"
	hostName    = "host." + zone
	gatewayName = "gateway." + zone
)

var (
	subnetPrefix = netip.MustParsePrefix(subnet)
	gatewayAddr  = netip.MustParseAddr(Gateway)
	guestAddr    = netip.MustParseAddr(Guest)
	hostAddr     = netip.MustParseAddr(hostIP)
)

const (
	nicID = 1

	// sendQueue bounds the packets that wait for the machine, which takes
	// none while it is paused. TCP's are held by its send buffers anyway.
	sendQueue = 4096

	maxTCPDials = 1024 // connections of the guest that are being made
	maxTCPConns = 2048 // connections of the guest, those included

	// The stack's buffers of a connection, in bytes, which a guest can fill and leave so. What the guest
	// sends is as fast with larger ones. Of what it receives, more goes with one wake-up the larger the buffer
	// is that it waits in: with half as much a byte costs a tenth more, with twice as much hardly less.
	maxReceiveBuffer = 256 << 10
	maxSendBuffer    = 2 << 20
	minBuffer        = 4 << 10
)

// Config configures a Network. The zero value is valid.
type Config struct {
	// AllowHostPorts are the ports, TCP and UDP, that the guest may
	// reach on the server's 127.0.0.1, by the name host.shed.internal.
	AllowHostPorts []int

	// Nameservers get the guest's DNS queries, in order of preference. Nil
	// means those that the host's /etc/resolv.conf names at the time.
	Nameservers []netip.AddrPort

	// Log gets refused and failed connections at debug level; nil discards.
	Log *slog.Logger
}

// Network is the network of one shed. All methods may be called concurrently.
type Network struct {
	policy policy
	local  localAddrs
	log    *slog.Logger

	stack *stack.Stack
	link  *channel.Endpoint

	tcpSlots chan struct{}
	flows    *flows
	dns      *dnsServer

	serving sync.Mutex // held by Serve

	ctx    context.Context // done when Close begins
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

// New starts a network. It fails with shed.CodeInvalid for a Config that
// makes no sense. The caller must Close it.
func New(cfg Config) (*Network, error) {
	n := &Network{
		local:    localAddrs{list: net.InterfaceAddrs},
		log:      cfg.Log,
		tcpSlots: make(chan struct{}, maxTCPConns),
	}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	for _, p := range cfg.AllowHostPorts {
		if p < 1 || p > 65535 {
			return nil, shed.Errorf(shed.CodeInvalid, "%d can't be a port that a shed may reach on its server", p).
				WithHint("use ports from 1 to 65535")
		}
		n.policy.hostPorts = append(n.policy.hostPorts, uint16(p))
	}
	if err := n.newStack(); err != nil {
		return nil, fmt.Errorf("start network stack: %w", err)
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.flows = newFlows(n)
	fwd := tcp.NewForwarder(n.stack, 0, maxTCPDials, n.forwardTCP)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, fwd.HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, n.flows.handleUDP)

	var err error
	if n.dns, err = newDNSServer(n.ctx, n.stack, cfg.Nameservers, n.log); err != nil {
		n.Close()
		return nil, fmt.Errorf("start DNS server: %w", err)
	}
	return n, nil
}

func (n *Network) newStack() error {
	// Without this, packets to loopback addresses vanish instead of being refused.
	ipOptions := ipv4.Options{AllowExternalLoopbackTraffic: true}
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocolWithOptions(ipOptions), arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: maxReceiveBuffer, Max: maxReceiveBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: maxReceiveBuffer, Max: maxSendBuffer} // it grows
	recovery := tcpip.TCPRecovery(0)                                                                          // RACK retransmits needlessly when ACKs come late, as they do from an emulated CPU
	// Segments can't come late on a wire that keeps their order. And while an
	// old connection waits for them, the stack ignores the guest's
	// attempts to make a new one from the same port.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(time.Millisecond)
	n.link = channel.New(sendQueue, MTU, linkAddr(gatewayMAC))
	// The wire can't damage packets.
	n.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	onLink := tcpip.AddressWithPrefix{Address: tcpAddr(gatewayAddr), PrefixLen: PrefixLen}.Subnet()

	var errs []error
	check := func(what string, err tcpip.Error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %s", what, err))
		}
	}
	check("TCP SACK", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	check("TCP receive buffers", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &receive))
	check("TCP send buffers", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send))
	check("TCP buffer moderation", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate))
	check("TCP recovery", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &recovery))
	check("TCP TIME-WAIT", n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &timeWait))
	check("network card", n.stack.CreateNIC(nicID, ethernet.New(n.link)))
	for _, a := range []netip.Addr{gatewayAddr, hostAddr} {
		check("address", n.stack.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpAddr(a), PrefixLen: PrefixLen},
		}, stack.AddressProperties{}))
	}
	check("neighbour", n.stack.AddStaticNeighbor(nicID, ipv4.ProtocolNumber, tcpAddr(guestAddr), linkAddr(GuestMAC)))
	// The stack takes packets for every address, and answers from it.
	check("promiscuous mode", n.stack.SetPromiscuousMode(nicID, true))
	check("spoofing", n.stack.SetSpoofing(nicID, true))
	n.stack.SetRouteTable([]tcpip.Route{{Destination: onLink, NIC: nicID}})
	if len(errs) > 0 {
		n.stack.Destroy()
	}
	return errors.Join(errs...)
}

// Close ends the network: all connections, and Serve. It returns when
// nothing of n runs any more. Calls after the first change nothing.
func (n *Network) Close() error {
	n.mu.Lock()
	first := !n.closed
	n.closed = true
	n.mu.Unlock()
	n.cancel()
	n.flows.closeAll()

	done := make(chan struct{})
	go func() {
		defer close(done)
		if n.dns != nil && first {
			n.dns.close()
		}
		n.wg.Wait()
	}()
	// Handshakes with the guest and answers that it doesn't take have no
	// context: they end with their endpoints, and one may begin an endpoint
	// after we looked.
	for running := true; running; {
		for _, e := range n.stack.RegisteredEndpoints() {
			e.Abort()
		}
		select {
		case <-done:
			running = false
		case <-time.After(10 * time.Millisecond):
		}
	}
	if first {
		n.stack.Destroy()
		n.link.Close()
	}
	return nil
}

// begin registers the calling goroutine with n, which then waits for its
// n.wg.Done. It returns false once n is closed.
func (n *Network) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.wg.Add(1)
	return true
}

// route applies the policy to dst.
func (n *Network) route(dst netip.AddrPort) (netip.AddrPort, error) {
	local, err := n.local.get()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("list the server's addresses: %w", err)
	}
	return n.policy.route(dst, local)
}

func tcpAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

func netipAddr(a tcpip.Address) netip.Addr { return netip.AddrFrom4(a.As4()) }

func linkAddr(mac string) tcpip.LinkAddress {
	a, err := net.ParseMAC(mac)
	if err != nil {
		panic(err) // only called with the constants above
	}
	return tcpip.LinkAddress(a)
}
