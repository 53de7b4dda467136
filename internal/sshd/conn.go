package sshd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// timedConn knows when something was last read from it.
type timedConn struct {
	net.Conn
	start time.Time    // from when last is counted: a step of the clock doesn't change it
	last  atomic.Int64 // in nanoseconds
}

func (c *timedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.last.Store(int64(time.Since(c.start)))
	}
	return n, err
}

func (c *timedConn) silence() time.Duration {
	return time.Since(c.start) - time.Duration(c.last.Load())
}

// connection is a client that is logged in.
type connection struct {
	s      *Server
	conn   *ssh.ServerConn
	heard  *timedConn
	key    ssh.PublicKey
	rights atomic.Pointer[rights] // as the key's line is now
	log    *slog.Logger
	parts  sync.WaitGroup
	open   atomic.Int64 // channels

	refused int // how often in a row the key's line wasn't there; of the server's watchKeys

	listenersMu sync.Mutex
	listeners   map[string]net.Conn // by what a request for their end has
}

// serve serves the connection to its end, and returns when nothing of it runs any more.
func (c *connection) serve(ctx context.Context, channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	ctx, cancel := context.WithCancel(ctx)
	defer c.parts.Wait()
	defer c.conn.Close()
	defer cancel()
	c.parts.Go(func() {
		for req := range requests {
			ok, payload := c.handle(ctx, req)
			req.Reply(ok, payload)
		}
	})
	c.parts.Go(func() { c.watch(ctx) })

	for nch := range channels {
		if int(c.open.Load()) >= c.s.maxChannels {
			c.reject(nch, ssh.ResourceShortage, fmt.Sprintf("a connection can have %d channels at most", c.s.maxChannels))
			continue
		}
		var serve func(ctx context.Context, nch ssh.NewChannel)
		switch nch.ChannelType() {
		case "session":
			serve = c.session
		case "direct-tcpip":
			serve = c.directTCP
		case "direct-streamlocal@openssh.com":
			serve = c.directUnix
			if c.conn.User() == APIUser {
				serve = c.directAPI
			}
		default:
			c.reject(nch, ssh.UnknownChannelType, "this server does not know the type of the channel")
			continue
		}
		c.open.Add(1)
		c.parts.Go(func() {
			defer c.open.Add(-1)
			serve(ctx, nch)
		})
	}
}

func (c *connection) reject(nch ssh.NewChannel, reason ssh.RejectionReason, message string) {
	c.log.Info("SSH channel refused", "type", fmt.Sprintf("%.80s", nch.ChannelType()), "reason", message)
	nch.Reject(reason, message)
}

func (c *connection) session(ctx context.Context, nch ssh.NewChannel) {
	ch, requests, err := nch.Accept()
	if err != nil {
		return // the connection is lost
	}
	newSession(c, ch).serve(ctx, requests)
}

// checkName returns the error for a user name that no shed can have.
func (c *connection) checkName() error {
	if shed.ValidateName(c.conn.User()) == nil {
		return nil
	}
	if c.conn.User() == APIUser {
		return shed.Errorf(shed.CodeInvalid, "the user %s has the HTTP API, at %s, and nothing else", APIUser, APISocket).
			WithHint("the user name of a connection to a shed is the name of the shed")
	}
	return shed.Errorf(shed.CodeNotFound, "no shed named %.80q", c.conn.User()).
		WithHint("the user name of the connection is the name of the shed; 'shed list' shows all of them")
}

// handle handles a global request.
func (c *connection) handle(ctx context.Context, req *ssh.Request) (ok bool, payload []byte) {
	var err error
	switch req.Type {
	case keepAliveRequest:
	case "tcpip-forward":
		payload, err = c.listenTCP(ctx, req.Payload)
	case "streamlocal-forward@openssh.com":
		err = c.listenUnix(ctx, req.Payload)
	case "cancel-tcpip-forward":
		err = c.cancelTCP(req.Payload)
	case "cancel-streamlocal-forward@openssh.com":
		err = c.cancelUnix(req.Payload)
	default:
		return false, nil
	}
	if err != nil {
		c.log.Info("SSH request refused", "type", req.Type, "reason", err)
	}
	return err == nil, payload
}

// watch closes the connection when the client gives no sign of life any more, and returns when
// ctx is done or the connection has ended. Anything that the client sends is a
// sign of life: an answer can wait behind much else.
func (c *connection) watch(ctx context.Context) {
	tick := time.NewTicker(c.s.keepAlive)
	defer tick.Stop()
	answered := make(chan error, 1)
	for waiting := false; ; {
		select {
		case <-ctx.Done():
			return
		case err := <-answered:
			if err != nil {
				return
			}
			waiting = false
			continue
		case <-tick.C:
		}
		if silence := c.heard.silence(); silence > maxMissed*c.s.keepAlive {
			c.log.Info("SSH client does not answer, giving it up", "silent_for", silence.Round(time.Millisecond))
			c.heard.Close() // which waits for no answer
			return
		}
		if !waiting {
			waiting = true
			c.parts.Go(func() {
				// Any answer will do: most clients refuse this request.
				_, _, err := c.conn.SendRequest(keepAliveRequest, true, nil)
				answered <- err
			})
		}
	}
}

// missing is how many looks in a row don't find the key before the connection is ended: a file
// that is being written may be short for a moment.
const missing = 2

// checkKey takes notice of what lines now say about the connection's key.
func (c *connection) checkKey(lines []authorizedKey) {
	r, _, err := authorize(lines, c.conn.User(), c.conn.RemoteAddr(), c.key)
	if err == nil && c.conn.User() == APIUser {
		err = r.mayUseAPI()
	}
	if err == nil {
		c.refused = 0
		c.rights.Store(&r)
		return
	}
	c.refused++
	if c.refused == missing {
		c.log.Warn("SSH connection ended: its key is no longer authorized", "key", ssh.FingerprintSHA256(c.key), "reason", err)
		c.heard.Close()
	}
}
