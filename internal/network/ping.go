package network

import (
	"net"
	"net/netip"

	"golang.org/x/net/icmp"
)

// pingConn is an unprivileged ICMP socket, which takes echo requests and gets
// the replies to them.
type pingConn struct {
	*icmp.PacketConn
	dst netip.Addr
}

// dialPing opens a socket for pings to dst. Linux permits that to the groups in
// net.ipv4.ping_group_range. Where it is not permitted, the guest's pings
// get no answer.
func dialPing(dst netip.Addr) (datagramConn, error) {
	c, err := icmp.ListenPacket("udp4", "")
	if err != nil {
		return nil, err
	}
	return &pingConn{PacketConn: c, dst: dst}, nil
}

func (c *pingConn) Write(b []byte) (int, error) {
	return c.WriteTo(b, &net.UDPAddr{IP: c.dst.AsSlice()})
}

// Read returns the next message from the destination.
func (c *pingConn) Read(b []byte) (int, error) {
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return 0, err
		}
		if a, ok := from.(*net.UDPAddr); ok && a.AddrPort().Addr().Unmap() == c.dst {
			return n, nil
		}
	}
}
