package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
)

const (
	// lookupTimeout is for all servers to answer. One that isn't there has said so before.
	lookupTimeout = 6 * time.Second
	// minGrace is the least time that servers get to say that they too have a shed which one has.
	minGrace = 100 * time.Millisecond
	// silentDelay is how much later a server is asked that was silent the last time, unless it is needed. Most commands
	// end before; a login that is broken off each time would look to that server like an attack.
	silentDelay = time.Second
)

// Lookup is a question to all servers at once for the sheds that they have.
type Lookup struct {
	s     *Servers
	start time.Time

	needed map[string]func() // has a server asked at once

	mu      sync.Mutex
	answers map[string]answer
	changed chan struct{} // closed when there is another answer
}

type answer struct {
	sheds []string
	err   error
}

// Lookup asks all servers for their sheds. Whoever is late is waited for by nobody, but remembered if
// the answer comes before s is closed.
func (s *Servers) Lookup() *Lookup {
	l := &Lookup{s: s, start: time.Now(), needed: map[string]func(){}, answers: map[string]answer{}, changed: make(chan struct{})}
	for _, name := range s.Config.Names() {
		needed := make(chan struct{})
		l.needed[name] = sync.OnceFunc(func() { close(needed) })
		if !l.s.remembered(name).Silent {
			l.needed[name]()
		}
		s.lookups.Go(func() { l.ask(name, needed) })
	}
	return l
}

func (l *Lookup) ask(name string, needed <-chan struct{}) {
	select {
	case <-needed:
	case <-time.After(l.s.silentDelay):
	case <-l.s.ctx.Done():
		return
	}
	ctx, cancel := l.s.WithTimeout(l.s.ctx, lookupTimeout)
	defer cancel()
	sheds, err := l.s.List(ctx, name)
	if err != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s", lookupTimeout)
	}
	a := answer{err: err}
	for _, sh := range sheds {
		a.sheds = append(a.sheds, sh.Name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[name] = a
	close(l.changed)
	l.changed = make(chan struct{})
}

// List returns the sheds of the server called name, and remembers them, or that it gave no answer.
func (s *Servers) List(ctx context.Context, name string) ([]*shed.Shed, error) {
	client, err := s.Client(name)
	if err != nil {
		return nil, err
	}
	server, err := s.Config.Server(name)
	if err != nil {
		return nil, err
	}
	sheds, err := client.List(ctx)
	switch {
	case err == nil:
		s.cache.answered(name, server.Address(), sheds)
	case !errors.Is(err, context.Canceled) || errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		s.cache.silent(name, server.Address())
	}
	return sheds, err
}

// state is what is known of a shed.
type state struct {
	owners  []string         // servers that have it
	silent  []string         // servers that haven't answered yet
	failed  map[string]error // servers that have no answer to give
	changed <-chan struct{}
}

func (l *Lookup) state(name string) state {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := state{failed: map[string]error{}, changed: l.changed}
	for _, server := range l.s.Config.Names() {
		a, ok := l.answers[server]
		switch {
		case !ok:
			st.silent = append(st.silent, server)
		case a.err != nil:
			st.failed[server] = a.err
		case slices.Contains(a.sheds, name):
			st.owners = append(st.owners, server)
		}
	}
	return st
}

// Find returns the name of the server that has the shed called name. An answer that tells is waited
// for, and then a moment for the other servers; what is remembered stands for those that gave none.
// CodeNotFound if no server has it, CodeConflict if several have, CodeUnreachable if the one that should have it does not answer.
func (l *Lookup) Find(ctx context.Context, name string) (server string, err error) {
	var grace <-chan time.Time
	for {
		st := l.state(name)
		if len(st.owners) > 0 && grace == nil {
			wait := max(l.s.minGrace, time.Since(l.start))
			if len(l.had(name, st.silent)) > 0 {
				wait = max(wait, l.s.silentDelay) // without its answer, it would be an error
			}
			grace = time.After(wait)
		}
		if len(st.owners) > 1 || len(st.silent) == 0 || len(st.owners) == 1 && !l.worthWaiting(st.silent) && len(l.had(name, st.silent)) == 0 {
			return l.decide(name, st)
		}
		l.need(name, st)
		select {
		case <-st.changed:
		case <-grace:
			return l.decide(name, l.state(name))
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// need has those of the silent servers asked at once that had the shed, or all if no other can have it.
func (l *Lookup) need(name string, st state) {
	needed := l.had(name, st.silent)
	if len(st.owners) == 0 && !l.worthWaiting(st.silent) {
		needed = st.silent
	}
	for _, server := range needed {
		l.needed[server]()
	}
}

// had returns those of servers that had the shed when they last answered.
func (l *Lookup) had(name string, servers []string) (had []string) {
	for _, server := range servers {
		if slices.Contains(l.s.remembered(server).Sheds, name) {
			had = append(had, server)
		}
	}
	return had
}

// worthWaiting reports whether one of servers, which are silent, is not known for it.
func (l *Lookup) worthWaiting(servers []string) bool {
	return slices.ContainsFunc(servers, func(name string) bool { return !l.s.remembered(name).Silent })
}

// decide says which server has the shed, by what is known now.
func (l *Lookup) decide(name string, st state) (string, error) {
	var had, without []string // of the servers without an answer: those that had it, and all
	for _, server := range l.s.Config.Names() {
		err, failed := st.failed[server]
		if !failed && !slices.Contains(st.silent, server) {
			continue
		}
		known := l.s.remembered(server)
		if slices.Contains(known.Sheds, name) {
			had = append(had, server)
		}
		if !failed {
			err = errors.New("no answer yet")
			l.s.cache.silent(server, known.Address)
		}
		without = append(without, fmt.Sprintf("%s: %v", server, err))
	}
	all := append(slices.Clone(st.owners), had...)
	slices.Sort(all)
	switch {
	case len(all) > 1:
		return "", ambiguous(name, all, had)
	case len(st.owners) == 1:
		return st.owners[0], nil
	case len(had) == 1:
		return "", shed.Errorf(shed.CodeUnreachable, "shed %s is on the server %q, which does not answer: %w", name, had[0], st.failed[had[0]])
	case len(without) == len(l.s.Config.Names()):
		return "", shed.Errorf(shed.CodeUnreachable, "no server answers: %s", strings.Join(without, "; ")).
			WithHint("`shed server list` shows what is the matter with each")
	}
	err := shed.Errorf(shed.CodeNotFound, "there is no shed %q on any server", name)
	if len(without) > 0 {
		err = shed.Errorf(shed.CodeNotFound, "there is no shed %q on the servers that answer", name).
			WithHint("it may be on one that does not: %s", strings.Join(without, "; "))
	}
	return "", err
}

func ambiguous(name string, servers, had []string) error {
	var list []string
	for _, server := range servers {
		entry := server + "/" + name
		if slices.Contains(had, server) {
			entry += " (when that server last answered)"
		}
		list = append(list, entry)
	}
	return shed.Errorf(shed.CodeConflict, "there is a shed %q on several servers: %s", name, strings.Join(list, ", ")).
		WithHint("say which: %s/%s, or --server %s", servers[0], name, servers[0])
}
