package sshd

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// What a connection costs its source, in time that has to pass.
const (
	penaltyLogin  = 5 * time.Second  // no key was accepted
	penaltySilent = 10 * time.Second // the login took too long
	penaltyBroken = time.Second      // it ended otherwise before the login

	// maxSources bounds what is remembered. With more, new ones are only subject to the limits for all.
	maxSources = 1 << 16
)

// gate decides which connections may try to log in. It is safe for concurrent use.
type gate struct {
	max          int           // connections that aren't authenticated yet
	maxPerSource int           // of them, of one source
	burst        time.Duration // penalties that a source may have and yet try again

	mu      sync.Mutex
	open    int
	sources map[netip.Prefix]*source
}

type source struct {
	open  int
	until time.Time // when all its penalties have passed
}

// sourceOf returns whom to hold responsible: an IPv6 client has a whole network of addresses.
func sourceOf(addr net.Addr) netip.Prefix {
	ip, err := ipOf(addr)
	if err != nil {
		return netip.Prefix{}
	}
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

// ipOf returns the IP of addr, without a zone.
func ipOf(addr net.Addr) (netip.Addr, error) {
	ap, err := netip.ParseAddrPort(addr.String())
	return ap.Addr().Unmap().WithZone(""), err
}

// enter takes a connection of src in, or returns why not. leave must be called when it is decided
// whether the client may log in.
func (g *gate) enter(src netip.Prefix) (refused string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open >= g.max {
		return "too many connections are not authenticated yet"
	}
	s, known := g.sources[src]
	if known && time.Until(s.until) > g.burst {
		return "too many logins of this source have failed"
	}
	if known && s.open >= g.maxPerSource {
		return "too many connections of this source are not authenticated yet"
	}
	g.open++
	if !known {
		s = &source{}
		g.forget()
		if g.sources == nil {
			g.sources = map[netip.Prefix]*source{}
		}
		g.sources[src] = s
	}
	s.open++
	return ""
}

// leave ends what enter began. A penalty that bars the source from now on is reported.
func (g *gate) leave(src netip.Prefix, penalty time.Duration) (barred bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	s := g.sources[src]
	s.open--
	now := time.Now()
	before := max(s.until.Sub(now), 0)
	if penalty > 0 {
		s.until = now.Add(before + penalty)
	}
	if s.open == 0 && !s.until.After(now) {
		delete(g.sources, src)
	}
	return before <= g.burst && before+penalty > g.burst
}

// forget makes room where too many sources are known.
func (g *gate) forget() {
	if len(g.sources) < maxSources {
		return
	}
	now := time.Now()
	for src, s := range g.sources {
		if s.open == 0 && !s.until.After(now) {
			delete(g.sources, src)
		}
	}
	for src, s := range g.sources {
		if len(g.sources) < maxSources {
			return
		}
		if s.open == 0 {
			delete(g.sources, src)
		}
	}
}
