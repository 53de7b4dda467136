package network

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	udpIdle  = 60 * time.Second
	dnsIdle  = 10 * time.Second // an exchange is over with its answer
	pingIdle = 10 * time.Second

	maxFlows    = 1024 // of a guest; the one idle longest makes room
	maxDatagram = 65535

	// flowQueue is the part of sendQueue that datagrams from outside may
	// fill. Unlike TCP's they are held by nothing but the queue.
	flowQueue = 256
)

// flows carries datagrams: UDP and pings. Each pair of a guest's port and a
// destination has a socket of its own on the host until it is idle.
type flows struct {
	n        *Network
	dialPing func(netip.Addr) (datagramConn, error)
	started  time.Time

	mu sync.Mutex
	m  map[flowKey]*flow
}

// datagramConn is a connected datagram socket.
type datagramConn interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
}

type flowKey struct {
	proto tcpip.TransportProtocolNumber
	port  uint16         // the guest's, or the identifier of its pings
	dst   netip.AddrPort // as the guest sees it; pings have port 0
}

type flow struct {
	conn     datagramConn
	idle     time.Duration
	lastUsed atomic.Int64 // nanoseconds after flows.started: the host's clock may be set meanwhile
}

func newFlows(n *Network) *flows {
	return &flows{n: n, dialPing: dialPing, started: time.Now(), m: make(map[flowKey]*flow)}
}

// use notes that fl is used now.
func (f *flows) use(fl *flow) { fl.lastUsed.Store(int64(time.Since(f.started))) }

// idleAt returns when fl will have been idle for too long.
func (f *flows) idleAt(fl *flow) time.Time {
	return f.started.Add(time.Duration(fl.lastUsed.Load()) + fl.idle)
}

// handleUDP takes a datagram of the guest's. If it returns false, the stack
// tells the guest that the port is unreachable.
func (f *flows) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	hdr := header.UDP(pkt.TransportHeader().Slice())
	size := int(hdr.Length()) - header.UDPMinimumSize
	if size < 0 || size > pkt.Data().Size() {
		return true // malformed: no answer
	}
	key := flowKey{
		proto: header.UDPProtocolNumber,
		port:  id.RemotePort,
		dst:   netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort),
	}
	idle := udpIdle
	if key.dst.Port() == 53 {
		idle = dnsIdle
	}
	fl, err := f.get(key, idle, func() (datagramConn, error) {
		to, err := f.n.route(key.dst)
		if err != nil {
			return nil, err
		}
		return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	})
	if err != nil {
		f.n.log.Debug("UDP datagram refused", "dst", key.dst, "reason", err)
		return false
	}
	payload := pkt.Data().AsRange().ToSlice()[:size]
	f.write(key, fl, payload)
	return true
}

// handlePing takes an intact echo request of the guest's.
func (f *flows) handlePing(ip header.IPv4) {
	msg := header.ICMPv4(ip.Payload())
	dst := netipAddr(ip.DestinationAddress())
	key := flowKey{
		proto: header.ICMPv4ProtocolNumber,
		port:  msg.Ident(),
		dst:   netip.AddrPortFrom(dst, 0),
	}
	fl, err := f.get(key, pingIdle, func() (datagramConn, error) {
		// The policy is about addresses; pings have no port to judge.
		if _, err := f.n.route(netip.AddrPortFrom(dst, 1)); err != nil {
			return nil, err
		}
		return f.dialPing(dst)
	})
	if err != nil {
		f.n.log.Debug("ping dropped", "dst", dst, "reason", err)
		return
	}
	f.write(key, fl, msg)
}

// get returns the flow of key, which dial makes if there is none.
func (f *flows) get(key flowKey, idle time.Duration, dial func() (datagramConn, error)) (*flow, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fl := f.m[key]
	if fl == nil {
		conn, err := dial()
		if err != nil {
			return nil, err
		}
		if !f.n.begin() {
			conn.Close()
			return nil, net.ErrClosed
		}
		if len(f.m) >= maxFlows {
			f.evict()
		}
		fl = &flow{conn: conn, idle: idle}
		f.m[key] = fl
		go func() {
			defer f.n.wg.Done()
			f.receive(key, fl)
		}()
	}
	f.use(fl)
	return fl, nil
}

// evict removes the flow that has been idle longest. f.mu is held.
func (f *flows) evict() {
	var key flowKey
	var oldest *flow
	for k, fl := range f.m {
		if oldest == nil || fl.lastUsed.Load() < oldest.lastUsed.Load() {
			key, oldest = k, fl
		}
	}
	delete(f.m, key)
	oldest.conn.Close()
}

// closeAll ends all flows.
func (f *flows) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, fl := range f.m {
		delete(f.m, k)
		fl.conn.Close()
	}
}

// remove ends fl unless, with onlyIdle, it has been used since.
func (f *flows) remove(key flowKey, fl *flow, onlyIdle bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if onlyIdle && time.Now().Before(f.idleAt(fl)) {
		return false
	}
	if f.m[key] == fl {
		delete(f.m, key)
	}
	fl.conn.Close()
	return true
}

// write sends a datagram on fl. A failure is a lost datagram, unless the
// error is one that an earlier datagram met.
func (f *flows) write(key flowKey, fl *flow, b []byte) {
	_, err := fl.conn.Write(b)
	if errors.Is(err, syscall.ECONNREFUSED) {
		f.sendUnreachable(key)
	}
}

// receive carries what comes back on fl to the guest until fl ends.
func (f *flows) receive(key flowKey, fl *flow) {
	buf := make([]byte, maxDatagram)
	for {
		_ = fl.conn.SetReadDeadline(f.idleAt(fl))
		size, err := fl.conn.Read(buf)
		var timeout net.Error
		switch {
		case err == nil:
			f.use(fl)
			if key.proto == header.UDPProtocolNumber {
				f.sendUDP(key, buf[:size])
			} else {
				f.sendPingReply(key, buf[:size])
			}
		case errors.Is(err, syscall.ECONNREFUSED):
			f.sendUnreachable(key)
		case errors.As(err, &timeout) && timeout.Timeout():
			if f.remove(key, fl, true) {
				return
			}
		default:
			f.remove(key, fl, false)
			return
		}
	}
}

func (f *flows) sendUDP(key flowKey, payload []byte) {
	hdr := make(header.UDP, header.UDPMinimumSize)
	length := uint16(header.UDPMinimumSize + len(payload))
	hdr.Encode(&header.UDPFields{SrcPort: key.dst.Port(), DstPort: key.port, Length: length})
	sum := header.PseudoHeaderChecksum(key.proto, tcpAddr(key.dst.Addr()), tcpAddr(guestAddr), length)
	sum = ^hdr.CalculateChecksum(checksum.Checksum(payload, sum))
	if sum == 0 {
		sum = 0xffff // 0 means that there is none
	}
	hdr.SetChecksum(sum)
	f.send(key, hdr, payload)
}

// sendPingReply passes on the ICMP message in b if it is an echo reply.
func (f *flows) sendPingReply(key flowKey, b []byte) {
	msg := header.ICMPv4(b)
	if len(msg) < header.ICMPv4MinimumSize || msg.Type() != header.ICMPv4EchoReply {
		return
	}
	msg.SetIdent(key.port) // Linux replaces it by one of its own
	msg.SetChecksum(0)
	msg.SetChecksum(^checksum.Checksum(msg, 0))
	f.send(key, nil, msg)
}

// sendUnreachable tells the guest that nothing listens at key's destination.
func (f *flows) sendUnreachable(key flowKey) {
	if key.proto != header.UDPProtocolNumber {
		return
	}
	const quoted = header.IPv4MinimumSize + header.UDPMinimumSize
	msg := make(header.ICMPv4, header.ICMPv4MinimumSize+quoted)
	msg.SetType(header.ICMPv4DstUnreachable)
	msg.SetCode(header.ICMPv4PortUnreachable)
	// Only the addresses and ports of the datagram matter, to find its socket.
	ip := header.IPv4(msg[header.ICMPv4MinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: quoted, TTL: 64, Protocol: uint8(key.proto),
		SrcAddr: tcpAddr(guestAddr), DstAddr: tcpAddr(key.dst.Addr()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.UDP(ip[header.IPv4MinimumSize:]).Encode(&header.UDPFields{
		SrcPort: key.port, DstPort: key.dst.Port(), Length: header.UDPMinimumSize,
	})
	msg.SetChecksum(^checksum.Checksum(msg, 0))
	key.proto = header.ICMPv4ProtocolNumber
	f.send(key, nil, msg)
}

// send sends an IP packet to the guest that comes from key's destination.
func (f *flows) send(key flowKey, transportHeader, payload []byte) {
	if f.n.link.NumQueued() >= flowQueue {
		return
	}
	r, err := f.n.stack.FindRoute(nicID, tcpAddr(key.dst.Addr()), tcpAddr(guestAddr), ipv4.ProtocolNumber, false)
	if err != nil {
		return // the stack is being closed
	}
	defer r.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(r.MaxHeaderLength()) + len(transportHeader),
		Payload:            buffer.MakeWithData(payload),
	})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = key.proto
	copy(pkt.TransportHeader().Push(len(transportHeader)), transportHeader)
	// A datagram that the queue has no room for is lost, as datagrams are.
	_ = r.WritePacket(stack.NetworkHeaderParams{Protocol: key.proto, TTL: r.DefaultTTL()}, pkt)
}
