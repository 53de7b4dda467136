package sshd

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// What a connection costs its source, in time that has to pass.
const (
	penaltyLogin  = 5 * time.Second  // no key was accepted
	penaltySilent = 10 * time.Second // the login took too long
	penaltyBroken = time.Second      // it ended otherwise before the login

	// maxSources bounds what is remembered, in sources.
	maxSources = 1 << 16

	sweepInterval  = time.Minute // between two looks at which sources can be forgotten
	reportInterval = time.Minute // between two reports that a source is barred
)

// gate decides which connections may try to log in. Where there are too many of them, the newest stays:
// a client that knows what it wants is done in a moment. It is safe for concurrent use.
type gate struct {
	max          int           // connections that aren't authenticated yet
	maxPerSource int           // of them, of one source
	burst        time.Duration // penalties that a source may have and yet try again

	mu      sync.Mutex
	open    []*attempt // the oldest first
	sources map[netip.Prefix]*source
	swept   time.Time // when those were last looked through
}

// attempt is a connection that isn't authenticated yet.
type attempt struct {
	src     netip.Prefix
	end     func() // closes the connection
	evicted bool   // it has made room for another
}

type source struct {
	open  int
	until time.Time // when all its penalties have passed

	refused  int       // connections, since it was
	reported time.Time // that some were
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

// enter takes in a connection of src, which end closes. A nil attempt is refused: too many logins of its source
// have failed. Otherwise leave must be called when it is decided whether the client may log in.
// Where refused isn't 0, it is time to report how many connections of the source were.
func (g *gate) enter(src netip.Prefix, end func()) (a *attempt, refused int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	s, known := g.sources[src]
	if known && s.until.Sub(now) > g.burst {
		s.refused++
		if now.Sub(s.reported) < reportInterval {
			return nil, 0
		}
		refused, s.refused, s.reported = s.refused, 0, now
		return nil, refused
	}
	if !known {
		s = &source{}
		g.forget(now)
		if g.sources == nil {
			g.sources = map[netip.Prefix]*source{}
		}
		g.sources[src] = s
	}
	s.open++
	a = &attempt{src: src, end: end}
	g.open = append(g.open, a)
	switch {
	case s.open > g.maxPerSource:
		g.evict(src)
	case len(g.open) > g.max:
		g.evict(g.largest())
	}
	return a, 0
}

// largest returns the source with the most attempts, of several the one whose first is the oldest.
func (g *gate) largest() netip.Prefix {
	return slices.MaxFunc(g.open, func(a, b *attempt) int {
		return cmp.Compare(g.sources[a.src].open, g.sources[b.src].open)
	}).src
}

// evict ends the oldest attempt of src. It costs nothing: many clients that start at once are no attack.
func (g *gate) evict(src netip.Prefix) {
	i := slices.IndexFunc(g.open, func(a *attempt) bool { return a.src == src })
	a := g.open[i]
	a.evicted = true
	g.remove(a)
	a.end()
}

// remove takes a out of those that are open.
func (g *gate) remove(a *attempt) {
	i := slices.Index(g.open, a)
	g.open = slices.Delete(g.open, i, i+1)
	s := g.sources[a.src]
	s.open--
	if s.open == 0 && !s.until.After(time.Now()) {
		delete(g.sources, a.src)
	}
}

// leave ends what enter began. A penalty that bars the source from now on is reported.
func (g *gate) leave(a *attempt, penalty time.Duration) (barred bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a.evicted {
		return false
	}
	s := g.sources[a.src]
	now := time.Now()
	before := max(s.until.Sub(now), 0)
	if penalty > 0 {
		s.until = now.Add(before + penalty)
	}
	g.remove(a)
	return before <= g.burst && before+penalty > g.burst
}

// forget drops the sources that have nothing to answer for any more, and where there are too many
// others, those that have the least.
func (g *gate) forget(now time.Time) {
	if len(g.sources) < maxSources && now.Sub(g.swept) < sweepInterval {
		return
	}
	g.swept = now
	kept := map[netip.Prefix]*source{}
	keep := func(limit int, wanted func(*source) bool) {
		for src, s := range g.sources {
			if len(kept) >= limit {
				return
			}
			if wanted(s) {
				kept[src] = s
			}
		}
	}
	const room = maxSources / 4 // so that the next sweep is not the next connection's
	keep(maxSources, func(s *source) bool { return s.open > 0 })
	keep(maxSources-room, func(s *source) bool { return s.until.Sub(now) > g.burst })
	keep(maxSources-room, func(s *source) bool { return s.until.After(now) })
	g.sources = kept // a map that was large stays so
}

// logBudget bounds how many lines strangers can have written to the log.
type logBudget struct {
	burst int           // lines at once
	every time.Duration // one more

	mu         sync.Mutex
	full       time.Time // when burst lines may be written again
	suppressed int       // since the last line
}

// take reports whether one more line may be written, and how many were not since the last.
func (b *logBudget) take() (ok bool, suppressed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	spent := max(b.full.Sub(now), 0) + b.every
	if spent > time.Duration(b.burst)*b.every {
		b.suppressed++
		return false, 0
	}
	b.full = now.Add(spent)
	suppressed, b.suppressed = b.suppressed, 0
	return true, suppressed
}

// bounded returns a logger whose lines, but those for debugging, are subject to a budget of their own. A line tells how
// many before it were suppressed.
func bounded(log *slog.Logger) *slog.Logger {
	return slog.New(boundedHandler{log.Handler(), &logBudget{burst: 100, every: time.Second}})
}

type boundedHandler struct {
	slog.Handler
	budget *logBudget
}

func (h boundedHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		ok, suppressed := h.budget.take()
		if !ok {
			return nil
		}
		if suppressed > 0 {
			r = r.Clone()
			r.AddAttrs(slog.Int("suppressed", suppressed))
		}
	}
	return h.Handler.Handle(ctx, r)
}

func (h boundedHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return boundedHandler{h.Handler.WithAttrs(attrs), h.budget}
}

func (h boundedHandler) WithGroup(name string) slog.Handler {
	return boundedHandler{h.Handler.WithGroup(name), h.budget}
}
