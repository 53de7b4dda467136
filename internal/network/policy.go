package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// policy decides which addresses a guest reaches. The zero value lets it reach
// everything but the server itself.
//
// What it can't see is an address outside that leads back to the server,
// such as the public side of a router that forwards ports to it.
type policy struct {
	hostPorts []uint16 // reachable on the server's 127.0.0.1, by the address hostIP
}

// route returns where traffic that the guest sends to dst is to go, or an
// error that says why it goes nowhere. Local holds the server's own addresses
// with their prefixes.
func (p policy) route(dst netip.AddrPort, local []netip.Prefix) (netip.AddrPort, error) {
	addr := dst.Addr().Unmap()
	refuse := func(why string) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("%s is %s", dst, why)
	}
	switch {
	case dst.Port() == 0:
		return refuse("without a port")
	case addr == hostAddr:
		if slices.Contains(p.hostPorts, dst.Port()) {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dst.Port()), nil
		}
		return refuse("a port of the server that the shed may not reach")
	case subnetPrefix.Contains(addr):
		return refuse("inside the shed's own network")
	case !addr.IsValid(), addr.IsUnspecified(), addr.Is4() && addr.As4()[0] == 0:
		// Sockets take all of these for the host itself.
		return refuse("an unspecified address")
	case addr.IsLoopback():
		return refuse("a loopback address")
	case addr.IsLinkLocalUnicast():
		// Clouds serve machines their credentials here.
		return refuse("a link-local address")
	case addr.IsMulticast():
		return refuse("a multicast address")
	case addr.Is4() && addr.As4()[0] >= 240:
		return refuse("a broadcast or reserved address")
	}
	for _, l := range local {
		if l.Addr().Unmap() == addr {
			return refuse("an address of the server")
		}
		if isBroadcast(addr, l) {
			return refuse("a broadcast address")
		}
	}
	return netip.AddrPortFrom(addr, dst.Port()), nil
}

// isBroadcast reports whether a is the first or last address of an IPv4
// network that has such addresses.
func isBroadcast(a netip.Addr, p netip.Prefix) bool {
	if !a.Is4() || !p.Addr().Is4() || p.Bits() > 30 || !p.Contains(a) {
		return false
	}
	b := a.As4()
	host := (uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])) << p.Bits() >> p.Bits()
	return host == 0 || host == ^uint32(0)>>p.Bits()
}

// localAddrs are the addresses of the host's interfaces. They come and go with
// networks and VPNs, and connections come in bursts.
type localAddrs struct {
	list func() ([]net.Addr, error)

	mu       sync.Mutex
	read     time.Time
	prefixes []netip.Prefix
}

// get returns the addresses as of at most a second ago.
func (l *localAddrs) get() ([]netip.Prefix, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.read) < time.Second {
		return l.prefixes, nil
	}
	addrs, err := l.list()
	if err != nil {
		return nil, err
	}
	prefixes := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		ipn, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(ipn.IP)
		if !ok {
			continue
		}
		ones, _ := ipn.Mask.Size()
		prefixes = append(prefixes, netip.PrefixFrom(ip.Unmap(), ones))
	}
	l.prefixes, l.read = prefixes, time.Now()
	return prefixes, nil
}
