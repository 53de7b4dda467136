package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// ipFrame returns an ethernet frame with an IPv4 packet of the guest's.
func ipFrame(src, dst string, proto tcpip.TransportProtocolNumber, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize, header.EthernetMinimumSize+header.IPv4MinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{
		SrcAddr: linkAddr(GuestMAC), DstAddr: linkAddr(gatewayMAC), Type: header.IPv4ProtocolNumber,
	})
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + len(payload)), TTL: 64, Protocol: uint8(proto),
		SrcAddr: tcpip.AddrFrom4Slice(net.ParseIP(src).To4()), DstAddr: tcpip.AddrFrom4Slice(net.ParseIP(dst).To4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	return append(frame, payload...)
}

func pingFrame(dst string) []byte {
	msg := make(header.ICMPv4, header.ICMPv4MinimumSize+4)
	msg.SetType(header.ICMPv4Echo)
	msg.SetIdent(7)
	msg.SetSequence(9)
	copy(msg[header.ICMPv4MinimumSize:], "ping")
	msg.SetChecksum(^checksum.Checksum(msg, 0))
	return ipFrame(Guest, dst, header.ICMPv4ProtocolNumber, msg)
}

func arpFrame(op header.ARPOp, target string) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.ARPSize)
	header.Ethernet(frame).Encode(&header.EthernetFields{
		SrcAddr: linkAddr(GuestMAC), DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber,
	})
	h := header.ARP(frame[header.EthernetMinimumSize:])
	h.SetIPv4OverEthernet()
	h.SetOp(op)
	copy(h.HardwareAddressSender(), linkAddr(GuestMAC))
	copy(h.ProtocolAddressSender(), guestAddr.AsSlice())
	copy(h.ProtocolAddressTarget(), net.ParseIP(target).To4())
	return frame
}

// synFrame returns a frame with the guest's request for a connection.
func synFrame(dst string, port int) []byte {
	h := make(header.TCP, header.TCPMinimumSize)
	h.Encode(&header.TCPFields{
		SrcPort: 5000, DstPort: uint16(port), SeqNum: 1, DataOffset: header.TCPMinimumSize,
		Flags: header.TCPFlagSyn, WindowSize: 65535,
	})
	return ipFrame(Guest, dst, header.TCPProtocolNumber, h)
}

func udpFrame(dst string, port int) []byte {
	h := make(header.UDP, header.UDPMinimumSize)
	h.Encode(&header.UDPFields{SrcPort: 5000, DstPort: uint16(port), Length: header.UDPMinimumSize})
	return ipFrame(Guest, dst, header.UDPProtocolNumber, h)
}

func TestJudgeFrame(t *testing.T) {
	edit := func(frame []byte, f func(header.IPv4)) []byte {
		f(header.IPv4(frame[header.EthernetMinimumSize:]))
		return frame
	}
	ipv6 := ipFrame(Guest, hostIP, header.TCPProtocolNumber, nil)
	binary.BigEndian.PutUint16(ipv6[12:], uint16(header.IPv6ProtocolNumber))
	for name, tt := range map[string]struct {
		frame []byte
		want  verdict
	}{
		"nothing":                 {nil, drop},
		"half an ethernet header": {make([]byte, 13), drop},
		"ethernet header alone":   {ipFrame(Guest, hostIP, 6, nil)[:14], drop},
		"half an IP header":       {ipFrame(Guest, hostIP, 6, nil)[:24], drop},
		"truncated packet":        {ipFrame(Guest, hostIP, 6, make([]byte, 20))[:50], drop},
		"IPv6":                    {ipv6, drop},
		"TCP":                     {ipFrame(Guest, "1.2.3.4", 6, make([]byte, 20)), deliver},
		"padding":                 {append(ipFrame(Guest, "1.2.3.4", 6, make([]byte, 20)), 0, 0), deliver},
		"another source":          {ipFrame("198.19.177.9", "1.2.3.4", 6, make([]byte, 20)), drop},
		"multicast":               {ipFrame(Guest, "224.0.0.251", 17, make([]byte, 8)), drop},
		"broadcast":               {ipFrame(Guest, "255.255.255.255", 17, make([]byte, 8)), drop},
		"ping of the gateway":     {pingFrame(Gateway), deliver},
		"ping of the host":        {pingFrame(hostIP), deliver},
		"ping of the outside":     {pingFrame("1.2.3.4"), forwardPing},
		"fragment of a ping": {edit(pingFrame("1.2.3.4"), func(ip header.IPv4) {
			ip.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
		}), drop},
		"short ping":          {ipFrame(Guest, "1.2.3.4", 1, []byte{8, 0}), drop},
		"ARP for the gateway": {arpFrame(header.ARPRequest, Gateway), deliver},
		"ARP for the host":    {arpFrame(header.ARPRequest, hostIP), deliver},
		"ARP for another":     {arpFrame(header.ARPRequest, "198.19.177.9"), drop},
		"ARP reply":           {arpFrame(header.ARPReply, Gateway), drop},
		"short ARP":           {arpFrame(header.ARPRequest, Gateway)[:30], drop},
	} {
		if got := judgeFrame(tt.frame); got != tt.want {
			t.Errorf("%s: verdict %d, want %d", name, got, tt.want)
		}
	}
}

func TestServeBadWire(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	good := pingFrame(Gateway)
	wire := func(length int, frame []byte) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(length)), frame...)
	}
	for name, tt := range map[string]struct {
		wire []byte
		ok   bool
	}{
		"end":                {nil, true},
		"no length":          {wire(0, nil), true},
		"short frame":        {wire(3, []byte("abc")), true},
		"good frame":         {wire(len(good), good), true},
		"largest frame":      {wire(maxFrame, make([]byte, maxFrame)), true},
		"too large":          {wire(maxFrame+1, make([]byte, maxFrame+1)), false},
		"absurdly large":     {wire(1<<32-1, nil), false},
		"end in the length":  {[]byte{0, 0}, false},
		"end before a frame": {wire(60, nil), false},
		"end in a frame":     {wire(60, make([]byte, 20)), false},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := socketPair(t)
			var wg sync.WaitGroup
			wg.Go(func() {
				theirs.Write(tt.wire) // fails if Serve gives up early
				theirs.(*net.UnixConn).CloseWrite()
				io.Copy(io.Discard, theirs)
				theirs.Close()
			})
			if err := n.Serve(t.Context(), ours); (err == nil) != tt.ok {
				t.Errorf("Serve = %v", err)
			}
			wg.Wait()
		})
	}
}

// FuzzFrames feeds the wire. Nothing on it may panic or hang the network.
func FuzzFrames(f *testing.F) {
	seed := func(frames ...[]byte) {
		var wire []byte
		for _, b := range frames {
			wire = append(binary.BigEndian.AppendUint32(wire, uint32(len(b))), b...)
		}
		f.Add(wire)
	}
	seed()
	seed(nil, []byte("abc"), make([]byte, 14))
	seed(pingFrame(Gateway), pingFrame("127.0.0.1"))
	seed(arpFrame(header.ARPRequest, Gateway))
	seed(synFrame(hostIP, 80))
	seed(synFrame("127.0.0.1", 80))
	seed(udpFrame(Gateway, 53))
	seed(ipFrame(Guest, "127.0.0.1", header.UDPProtocolNumber, []byte("abcd")))
	f.Add([]byte{0, 0, 0})
	f.Add([]byte{255, 255, 255, 255})
	n, err := New(Config{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { n.Close() })
	// Nothing leaves the network while it can't tell the server's addresses.
	n.local.list = func() ([]net.Addr, error) { return nil, errors.New("none") }
	f.Fuzz(func(t *testing.T, wire []byte) {
		_ = n.receive(bytes.NewReader(wire))
		for pkt := n.link.Read(); pkt != nil; pkt = n.link.Read() {
			pkt.DecRef()
		}
	})
}

func view(frame []byte) *buffer.View { return buffer.NewViewWithData(frame) }

// A guest that sends to the server's addresses must be told no, not left to wait.
func TestRefusedAtOnce(t *testing.T) {
	checkLeaks(t)
	tcpPort, udpPort := serveTCP(t, echo), echoUDP(t)
	n, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.local.list = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(203, 0, 113, 1), Mask: net.CIDRMask(24, 32)}}, nil
	}
	for _, dst := range []string{"127.0.0.1", "127.1.2.3", "0.0.0.1", "169.254.169.254", "203.0.113.1", "203.0.113.255", "198.19.177.9", Gateway, hostIP} {
		n.handleFrame(view(synFrame(dst, tcpPort)))
		ip := header.IPv4(nextFrame(t, n)[header.EthernetMinimumSize:])
		if ip.SourceAddress().String() != dst || ip.TransportProtocol() != header.TCPProtocolNumber ||
			!header.TCP(ip.Payload()).Flags().Contains(header.TCPFlagRst) {
			t.Errorf("TCP to %s: %x", dst, ip)
		}
		n.handleFrame(view(udpFrame(dst, udpPort)))
		ip = header.IPv4(nextFrame(t, n)[header.EthernetMinimumSize:])
		if ip.SourceAddress().String() != dst || ip.TransportProtocol() != header.ICMPv4ProtocolNumber ||
			header.ICMPv4(ip.Payload()).Code() != header.ICMPv4PortUnreachable {
			t.Errorf("UDP to %s: %x", dst, ip)
		}
	}
}
