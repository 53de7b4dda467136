package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
)

// Options are how Servers deal with the user. All may be nil.
type Options struct {
	// Note is called with lines about what is done. It may be called at any time, from several goroutines at once.
	Note func(line string)
	// Ask asks for a passphrase.
	Ask func(ctx context.Context, prompt string) ([]byte, error)
}

// Servers are the servers of a configuration, and the connections to them.
type Servers struct {
	Config *Config

	opts  Options
	keys  *keyring
	cache *cache

	ctx     context.Context // of lookups
	cancel  context.CancelFunc
	lookups sync.WaitGroup

	minGrace, silentDelay time.Duration

	anyHost func() ([]byte, error) // what `ssh -G` prints about anyHost, which is asked once

	mu      sync.Mutex
	clients map[string]*api.Client
	remotes []*remote
}

// NewServers returns the servers of cfg. They must be closed.
func NewServers(cfg *Config, opts Options) *Servers {
	s := &Servers{
		Config: cfg, opts: opts, keys: &keyring{ask: opts.Ask}, cache: &cache{dir: cfg.Dir()},
		clients: map[string]*api.Client{}, minGrace: minGrace, silentDelay: silentDelay,
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.anyHost = sync.OnceValues(func() ([]byte, error) { return askOpenSSH(s.ctx, anyHost, DefaultSSHPort) })
	return s
}

// Close ends all connections, and what runs for them. It keeps what lookups have found out; the error says why it couldn't.
func (s *Servers) Close() error {
	s.cancel()
	s.lookups.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, client := range s.clients {
		client.Close()
	}
	for _, r := range s.remotes {
		r.close()
	}
	return s.cache.save()
}

func (s *Servers) note(format string, args ...any) {
	if s.opts.Note != nil {
		s.opts.Note(fmt.Sprintf(format, args...))
	}
}

// WithTimeout is context.WithTimeout, but time in which the user is asked for a passphrase doesn't count. When it is up, the
// context's cause, and not its error, is context.DeadlineExceeded.
func (s *Servers) WithTimeout(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	var mu sync.Mutex
	var timer *time.Timer
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(timeout, func() {
		mu.Lock()
		defer mu.Unlock()
		if s.keys.asking.Load() > 0 {
			timer.Reset(timeout)
			return
		}
		cancel(context.DeadlineExceeded)
	})
	return ctx, func() {
		timer.Stop()
		cancel(context.Canceled)
	}
}

// Client returns the client of the server called name. Nothing is connected yet.
func (s *Servers) Client(name string) (*api.Client, error) {
	server, err := s.Config.Server(name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if client, ok := s.clients[name]; ok {
		return client, nil
	}
	label := s.Config.label(name, server)
	s.note("using %s", label)
	var client *api.Client
	if server.Host == "" {
		client = api.NewUnixClient(server.Address(), label)
	} else {
		r := newRemote(name, label, server, s.keys, s.note)
		if err := r.pinned(s.Config.KnownHosts(), server.Address()); err != nil {
			return nil, err
		}
		s.remotes = append(s.remotes, r)
		client = api.NewClient(r.dial, label)
	}
	client.Trace = s.opts.Note
	s.clients[name] = client
	return client, nil
}

// Absent reports whether the server called name, which gave no answer when it was last asked, has not even taken the
// connection yet that is being made now: its machine may be off. One that is just slow takes it within a round trip.
func (s *Servers) Absent(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.remotes, func(r *remote) bool { return r.name == name })
	return i >= 0 && s.remotes[i].dialing.Load() && s.remembered(name).Silent
}

// remembered returns what is known about the server called name.
func (s *Servers) remembered(name string) cached {
	server, err := s.Config.Server(name)
	if err != nil {
		return cached{}
	}
	return s.cache.get(name, server.Address())
}

// Probe asks a server that is not in the configuration yet who it is. check is called with its host key, before
// the login, and decides whether to go on; it isn't called for a server with a socket.
func (s *Servers) Probe(ctx context.Context, server Server, check func(ssh.PublicKey) error) (shed.Info, error) {
	label := "the server at " + server.Address()
	if server.Host == "" {
		client := api.NewUnixClient(server.Address(), label)
		defer client.Close()
		return client.Info(ctx)
	}
	r := newRemote("", label, server, s.keys, s.note)
	defer r.close()
	r.check = check
	client := api.NewClient(r.dial, label)
	client.Trace = s.opts.Note
	defer client.Close()
	info, err := client.Info(ctx)
	if known := (*shed.Error)(nil); err != nil && !errors.As(err, &known) && ctx.Err() == nil {
		err = shed.Errorf(shed.CodeUnreachable, "%s: %w", label, err)
	}
	return info, err
}
