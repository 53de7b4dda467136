// Package sshd is the SSH server: the user name of a connection names a shed,
// and its sessions run commands there.
//
// Who may log in is decided by public keys alone, and before any shed is looked up: a
// stranger can't learn which names exist.
package sshd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
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
	Log            *slog.Logger // nil discards
}

// Server is an SSH server.
type Server struct {
	sheds  shed.Sheds
	log    *slog.Logger
	keys   *keyring
	config *ssh.ServerConfig

	handshakeTimeout time.Duration // from connect to the end of authentication
	maxHandshakes    int           // connections that aren't authenticated yet
	maxChannels      int           // of one connection
	keepAlive        time.Duration // between two requests for a sign of life
}

const (
	maxAuthTries = 6

	// maxMissed is for how many keep-alive intervals a silent client is kept: long enough
	// for a laptop or an ssh client that was suspended for a moment.
	maxMissed = 10

	keepAliveRequest = "keepalive@openssh.com"
)

// Extensions that authentication leaves with a connection.
const (
	extFingerprint = "shed-key-fingerprint"
	extNoPTY       = "shed-no-pty"
)

// New returns a Server. Literal lines of c.AuthorizedKeys that can't be used are logged.
func New(c Config) *Server {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		sheds:            c.Sheds,
		log:              log,
		keys:             newKeyring(c.AuthorizedKeys, log),
		handshakeTimeout: 30 * time.Second,
		maxHandshakes:    100,
		maxChannels:      10_000,
		keepAlive:        30 * time.Second,
	}
	s.config = &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-shed",
		MaxAuthTries:  maxAuthTries,
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			e, err := s.keys.authorize(meta.RemoteAddr(), key)
			if err != nil {
				return nil, err
			}
			ext := map[string]string{extFingerprint: ssh.FingerprintSHA256(key)}
			if e.noPTY {
				ext[extNoPTY] = ""
			}
			return &ssh.Permissions{Extensions: ext}, nil
		},
	}
	s.config.AddHostKey(c.HostKey)
	return s
}

// Serve accepts connections on l until ctx is done or l is closed. It then
// ends the connections that are open, closes l and returns when nothing of
// them runs any more. The error says why l failed; it is nil where ctx or a Close of l was the
// reason.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()

	handshakes := make(chan struct{}, s.maxHandshakes)
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case isTemporary(err):
			s.log.Warn("can't accept an SSH connection", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		default:
			return fmt.Errorf("accept SSH connections on %s: %w", l.Addr(), err)
		}
		select {
		case handshakes <- struct{}{}:
			conns.Go(func() {
				s.serveConn(ctx, conn, sync.OnceFunc(func() { <-handshakes }))
			})
		default:
			s.log.Warn("SSH connection dropped: too many are not authenticated yet",
				"remote", conn.RemoteAddr().String(), "limit", s.maxHandshakes)
			conn.Close()
		}
	}
}

// isTemporary reports whether Accept may work again later: the process or the machine
// has run out of something, or the client gave up first.
func isTemporary(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serveConn serves nc to its end. It calls decided, maybe twice, when it is known
// whether the client may log in.
func (s *Server) serveConn(ctx context.Context, nc net.Conn, decided func()) {
	defer decided()
	defer nc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { nc.Close() })()

	log := s.log.With("remote", nc.RemoteAddr().String())
	if tcp, ok := nc.(*net.TCPConn); ok {
		if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: true, Idle: s.keepAlive, Interval: s.keepAlive, Count: maxMissed,
		}); err != nil {
			log.Debug("SSH connection without TCP keep-alive", "err", err)
		}
	}
	nc.SetDeadline(time.Now().Add(s.handshakeTimeout))
	conn, channels, requests, err := ssh.NewServerConn(nc, s.config)
	if err != nil {
		level := slog.LevelDebug // port scanners, health checks
		var authErr *ssh.ServerAuthError
		if errors.As(err, &authErr) {
			level = slog.LevelInfo
		}
		log.Log(ctx, level, "SSH login failed", "err", fmt.Sprintf("%.1000s", err.Error()))
		return
	}
	nc.SetDeadline(time.Time{})
	decided()

	ext := conn.Permissions.Extensions
	log = log.With("user", fmt.Sprintf("%.80s", conn.User()))
	log.Info("SSH login", "key", ext[extFingerprint])
	defer log.Info("SSH connection ended")

	var parts sync.WaitGroup
	defer parts.Wait()
	defer conn.Close()
	parts.Go(func() {
		for req := range requests {
			req.Reply(req.Type == keepAliveRequest, nil)
		}
	})
	parts.Go(func() { s.watch(ctx, conn, log) })
	defer cancel()

	_, noPTY := ext[extNoPTY]
	var open atomic.Int64
	for nch := range channels {
		if reason, message := s.refusal(nch.ChannelType(), int(open.Load())); reason != 0 {
			log.Info("SSH channel refused", "type", fmt.Sprintf("%.80s", nch.ChannelType()), "reason", message)
			nch.Reject(reason, message)
			continue
		}
		ch, reqs, err := nch.Accept()
		if err != nil {
			continue // the connection is lost, which ends the loop
		}
		open.Add(1)
		parts.Go(func() {
			defer open.Add(-1)
			newSession(s.sheds, conn.User(), noPTY, ch, log).serve(ctx, reqs)
		})
	}
}

// refusal returns why a channel can't be opened where open others are; reason is 0 if it can.
func (s *Server) refusal(channelType string, open int) (reason ssh.RejectionReason, message string) {
	switch channelType {
	case "session":
		if open >= s.maxChannels {
			return ssh.ResourceShortage, fmt.Sprintf("a connection can have %d channels at most", s.maxChannels)
		}
		return 0, ""
	case "direct-tcpip", "direct-streamlocal@openssh.com":
		return ssh.Prohibited, "this server does not forward connections"
	default:
		return ssh.UnknownChannelType, "this server only knows channels of type session"
	}
}

// watch closes conn when the client gives no sign of life any more, and returns when
// ctx is done or conn has ended.
func (s *Server) watch(ctx context.Context, conn ssh.Conn, log *slog.Logger) {
	tick := time.NewTicker(s.keepAlive)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		dead := time.AfterFunc(maxMissed*s.keepAlive, func() {
			log.Info("SSH client does not answer, giving it up", "after", maxMissed*s.keepAlive)
			conn.Close()
		})
		// Any answer will do: most clients refuse this request.
		_, _, err := conn.SendRequest(keepAliveRequest, true, nil)
		dead.Stop()
		if err != nil {
			return
		}
	}
}
