// Package sshd is the SSH server: the user name of a connection names a shed,
// in which its sessions run commands and its forwarded connections begin or end. One user name
// is no shed's: APIUser, whose connections reach the HTTP API.
//
// Who may log in is decided by public keys alone, and before any shed is looked up: a
// stranger can't learn which names exist.
package sshd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// Config is what a Server needs.
type Config struct {
	Sheds          shed.Sheds
	HostKey        ssh.Signer
	AuthorizedKeys AuthorizedKeys
	// API connects to the HTTP API, which the user APIUser is given. The connection has a method
	// CloseWrite. nil: there is none.
	API func(ctx context.Context) (net.Conn, error)
	Log *slog.Logger // nil discards
}

// Server is an SSH server.
type Server struct {
	sheds     shed.Sheds
	api       func(ctx context.Context) (net.Conn, error)
	log       *slog.Logger
	strangers *slog.Logger // for what clients cause that aren't logged in
	keys      *keyring
	gate      gate
	config    *ssh.ServerConfig

	handshakeTimeout time.Duration // from connect to the end of authentication
	maxChannels      int           // of one connection
	maxListeners     int           // of one connection
	keepAlive        time.Duration // between two requests for a sign of life
	keyCheck         time.Duration // between two looks at the keys of open connections

	mu    sync.Mutex
	conns map[*connection]struct{} // that are logged in
}

const (
	maxAuthTries = 6

	// maxMissed is for how many keep-alive intervals a silent client is kept.
	maxMissed = 3

	keepAliveRequest = "keepalive@openssh.com"
)

// login is what authentication leaves with a connection, as loginKey in its ExtraData.
type login struct {
	key    ssh.PublicKey
	rights rights
}

type loginKey struct{}

// New returns a Server. Literal lines of c.AuthorizedKeys that can't be used are logged.
func New(c Config) *Server {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		sheds:            c.Sheds,
		api:              c.API,
		log:              log,
		strangers:        bounded(log),
		keys:             newKeyring(c.AuthorizedKeys, log),
		gate:             gate{max: 100, maxPerSource: 50, burst: 30 * time.Second},
		handshakeTimeout: 30 * time.Second,
		maxChannels:      10_000,
		maxListeners:     250,
		keepAlive:        15 * time.Second,
		keyCheck:         time.Second,
		conns:            map[*connection]struct{}{},
	}
	s.keys.strangers = s.strangers
	s.config = &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-shed",
		MaxAuthTries:  maxAuthTries,
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			r, err := s.keys.authorize(meta.User(), meta.RemoteAddr(), key)
			if err != nil {
				return nil, err
			}
			return &ssh.Permissions{ExtraData: map[any]any{loginKey{}: login{key, r}}}, nil
		},
	}
	s.config.AuthLogCallback = func(meta ssh.ConnMetadata, method string, err error) {
		if err != nil && method != "none" { // with which clients ask for the methods
			log.Debug("SSH login attempt failed", "remote", meta.RemoteAddr().String(),
				"user", fmt.Sprintf("%.80s", meta.User()), "err", fmt.Sprintf("%.500s", err.Error()))
		}
	}
	s.config.AddHostKey(c.HostKey)
	return s
}

// Serve accepts connections on l until ctx is done or l is closed. It then
// ends the connections that are open, closes l and returns when nothing of
// them runs any more. After an error of the system it goes on. The error says why else l failed; it
// is nil where ctx or a Close of l was the reason.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conns.Go(func() { s.watchKeys(ctx) })

	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case errors.As(err, new(syscall.Errno)):
			// The system lacks something, or this is the fault of one connection or of the
			// network, which it reports here too. Another may work.
			s.log.Warn("can't accept an SSH connection", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		default:
			return fmt.Errorf("accept SSH connections on %s: %w", l.Addr(), err)
		}
		src := sourceOf(conn.RemoteAddr())
		a, refused := s.gate.enter(src, func() { conn.Close() })
		if refused > 0 {
			s.strangers.Info("SSH connections dropped: too many logins of this source have failed",
				"source", src.String(), "remote", conn.RemoteAddr().String(), "connections", refused)
		}
		if a == nil {
			conn.SetWriteDeadline(time.Now().Add(time.Second))
			conn.Write([]byte("Not allowed at this time\r\n"))
			conn.Close()
			continue
		}
		conns.Go(func() { s.serveConn(ctx, conn, a) })
	}
}

// serveConn serves nc, which has passed the gate as a, to its end.
func (s *Server) serveConn(ctx context.Context, nc net.Conn, a *attempt) {
	defer nc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { nc.Close() })()

	log := s.log.With("remote", nc.RemoteAddr().String())
	heard := &timedConn{Conn: nc, start: time.Now()}
	client := newClientConn(heard)
	defer client.drain()
	conn, channels, requests, err := s.handshake(heard, client)
	penalty := penaltyOf(err)
	if ctx.Err() != nil {
		penalty = 0
	}
	stranger := s.strangers.With("remote", nc.RemoteAddr().String())
	if s.gate.leave(a, penalty) {
		stranger.Warn("too many SSH logins of this source have failed; it is barred for a while", "source", a.src.String())
	}
	if err != nil {
		level := slog.LevelDebug // port scanners, health checks
		if penalty == penaltyLogin {
			level = slog.LevelInfo
		}
		stranger.Log(ctx, level, "SSH login failed", "err", fmt.Sprintf("%.1000s", err.Error()))
		return
	}

	granted := conn.Permissions.ExtraData[loginKey{}].(login)
	log = log.With("user", fmt.Sprintf("%.80s", conn.User()))
	log.Info("SSH login", "key", ssh.FingerprintSHA256(granted.key))
	defer log.Info("SSH connection ended")

	c := &connection{s: s, conn: conn, heard: heard, key: granted.key, log: bounded(log), listeners: map[string]net.Conn{}}
	c.rights.Store(&granted.rights)
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	c.serve(ctx, channels, requests)
}

// handshake does all until the client is logged in, or isn't. client is on top of nc.
func (s *Server) handshake(nc *timedConn, client *clientConn) (*ssh.ServerConn, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	if tcp, ok := nc.Conn.(*net.TCPConn); ok {
		if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: true, Idle: s.keepAlive, Interval: s.keepAlive, Count: maxMissed,
		}); err != nil {
			s.log.Debug("SSH connection without TCP keep-alive", "err", err)
		}
	}
	nc.SetDeadline(time.Now().Add(s.handshakeTimeout))
	defer nc.SetDeadline(time.Time{})
	config := *s.config
	config.PreAuthConnCallback = client.begin
	return ssh.NewServerConn(client, &config)
}

// penaltyOf returns what a handshake costs that ended with err.
func penaltyOf(err error) time.Duration {
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(*ssh.ServerAuthError)):
		return penaltyLogin
	case errors.Is(err, os.ErrDeadlineExceeded):
		return penaltySilent
	default:
		return penaltyBroken
	}
}

// watchKeys ends connections whose key may no longer log in, and gives the others what
// rights theirs have now, until ctx is done.
func (s *Server) watchKeys(ctx context.Context) {
	tick := time.NewTicker(s.keyCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		conns := slices.Collect(maps.Keys(s.conns))
		s.mu.Unlock()
		if len(conns) == 0 {
			continue
		}
		_, known := s.keys.current()
		for _, c := range conns {
			c.checkKey(known)
		}
	}
}
