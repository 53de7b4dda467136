package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

var errNoForwarding = errors.New("the key may not have this forwarded")

// directTCP connects a channel with an address in the shed.
func (c *connection) directTCP(ctx context.Context, nch ssh.NewChannel) {
	to, err := parseDirectTCP(nch.ExtraData())
	if err != nil {
		c.reject(nch, ssh.ConnectionFailed, err.Error())
		return
	}
	c.direct(ctx, nch, to.endpoint(), c.rights.Load().mayOpen(to.host, to.port))
}

// directUnix connects a channel with a Unix socket in the shed.
func (c *connection) directUnix(ctx context.Context, nch ssh.NewChannel) {
	to, err := parseDirectUnix(nch.ExtraData())
	if err != nil {
		c.reject(nch, ssh.ConnectionFailed, err.Error())
		return
	}
	r := c.rights.Load()
	c.direct(ctx, nch, to, !r.noForwarding && r.open == nil)
}

func (c *connection) direct(ctx context.Context, nch ssh.NewChannel, to shed.Endpoint, allowed bool) {
	if !allowed {
		c.reject(nch, ssh.Prohibited, errNoForwarding.Error())
		return
	}
	err := c.checkName()
	var conn net.Conn
	if err == nil {
		conn, err = c.s.sheds.Dial(ctx, c.conn.User(), to)
	}
	if err != nil {
		c.log.Debug("SSH forwarding failed", "to", to.Address, "err", err)
		nch.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	join(ctx, nch, conn)
}

// listenTCP listens in the shed and has connections there end with the client. It returns what the
// client is answered.
func (c *connection) listenTCP(ctx context.Context, payload []byte) ([]byte, error) {
	on, err := parseListenTCP(payload)
	if err != nil {
		return nil, err
	}
	if !c.rights.Load().mayListen(on.host, on.port) {
		return nil, errNoForwarding
	}
	l, address, err := c.listen(ctx, on.listenEndpoint())
	if err != nil {
		return nil, err
	}
	asked := on.port
	if asked == 0 {
		bound, err := parseHostPort(address)
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("the shed listens on %q: %w", address, err)
		}
		on.port = bound.port
	}
	err = c.forward(ctx, on.endpoint().Address, l, "forwarded-tcpip", func(a agent.Accepted) []byte {
		from, err := parseHostPort(a.Remote)
		if err != nil {
			from = hostPort{host: "127.0.0.1"} // it isn't known
		}
		return ssh.Marshal(tcpChannel{on.host, on.port, from.host, from.port})
	})
	if err != nil || asked != 0 {
		return nil, err
	}
	return ssh.Marshal(struct{ Port uint32 }{on.port}), nil
}

// listenUnix is listenTCP for a Unix socket.
func (c *connection) listenUnix(ctx context.Context, payload []byte) error {
	on, err := parseListenUnix(payload)
	if err != nil {
		return err
	}
	if r := c.rights.Load(); r.noForwarding || r.listen != nil {
		return errNoForwarding
	}
	l, _, err := c.listen(ctx, on)
	if err != nil {
		return err
	}
	return c.forward(ctx, on.Address, l, "forwarded-streamlocal@openssh.com", func(agent.Accepted) []byte {
		return ssh.Marshal(struct{ Path, Reserved string }{Path: on.Address})
	})
}

func (c *connection) cancelTCP(payload []byte) error {
	on, err := parseListenTCP(payload)
	if err != nil {
		return err
	}
	return c.cancel(on.endpoint().Address)
}

func (c *connection) cancelUnix(payload []byte) error {
	on, err := parseListenUnix(payload)
	if err != nil {
		return err
	}
	return c.cancel(on.Address)
}

// cancel ends a listener, and none of its connections.
func (c *connection) cancel(name string) error {
	c.listenersMu.Lock()
	defer c.listenersMu.Unlock()
	l, ok := c.listeners[name]
	if !ok {
		return fmt.Errorf("nothing listens on %.200q for this connection", name)
	}
	delete(c.listeners, name)
	return l.Close()
}

// forwardAgent makes a socket in the shed whose connections end with the client's agent. stop removes it.
func (c *connection) forwardAgent(ctx context.Context) (socket string, stop func(), err error) {
	l, socket, err := c.listen(ctx, shed.Endpoint{Network: "unix"})
	if err != nil {
		return "", nil, err
	}
	c.parts.Go(func() {
		c.accept(ctx, l, "auth-agent@openssh.com", func(agent.Accepted) []byte { return nil })
	})
	return socket, func() { l.Close() }, nil
}

// listen listens in the shed, and returns where.
func (c *connection) listen(ctx context.Context, on shed.Endpoint) (net.Conn, string, error) {
	if err := c.checkName(); err != nil {
		return nil, "", err
	}
	l, err := c.s.sheds.Listen(ctx, c.conn.User(), on)
	if err != nil {
		return nil, "", err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var m agent.Listening
	if err := agent.ReadMessage(l, &m); err != nil {
		l.Close()
		return nil, "", fmt.Errorf("listening in the shed: %w", err)
	}
	return l, m.Address, nil
}

// forward has l accept connections under that name, until it is cancelled.
func (c *connection) forward(ctx context.Context, name string, l net.Conn, channelType string, payload func(agent.Accepted) []byte) error {
	c.listenersMu.Lock()
	defer c.listenersMu.Unlock()
	if len(c.listeners) >= c.s.maxListeners {
		l.Close()
		return fmt.Errorf("a connection can listen on %d addresses at most", c.s.maxListeners)
	}
	c.listeners[name] = l
	c.parts.Go(func() {
		c.accept(ctx, l, channelType, payload)
		c.listenersMu.Lock()
		defer c.listenersMu.Unlock()
		if c.listeners[name] == l {
			delete(c.listeners, name)
		}
	})
	return nil
}

// accept opens a channel to the client for each connection that l accepts, until l ends or ctx is done. It closes l.
func (c *connection) accept(ctx context.Context, l net.Conn, channelType string, payload func(agent.Accepted) []byte) {
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		var a agent.Accepted
		if err := agent.ReadMessage(l, &a); err != nil {
			return
		}
		if int(c.open.Load()) >= c.s.maxChannels {
			c.log.Info("SSH forwarding failed: too many channels", "type", channelType)
			continue // the shed gives the connection up after a while
		}
		c.open.Add(1)
		c.parts.Go(func() {
			defer c.open.Add(-1)
			conn, err := c.s.sheds.Dial(ctx, c.conn.User(), shed.Endpoint{Network: "accepted", Address: a.ID})
			if err != nil {
				c.log.Debug("SSH forwarding failed", "type", channelType, "err", err)
				return
			}
			ch, requests, err := c.conn.OpenChannel(channelType, payload(a))
			if err != nil {
				c.log.Debug("SSH forwarding refused by the client", "type", channelType, "err", err)
				conn.Close()
				return
			}
			relay(ctx, ch, requests, conn)
		})
	}
}

// drainTimeout is how long what a client has sent before it closed a channel may take to arrive.
const drainTimeout = 10 * time.Second

// join accepts nch and relays between it and conn, which it closes.
func join(ctx context.Context, nch ssh.NewChannel, conn net.Conn) {
	ch, requests, err := nch.Accept()
	if err != nil {
		conn.Close()
		return
	}
	relay(ctx, ch, requests, conn)
}

// relay carries bytes between ch and conn, and the end of each direction, until both have ended,
// one has failed, the client has closed ch, or ctx is done. It closes both.
func relay(ctx context.Context, ch ssh.Channel, requests <-chan *ssh.Request, conn net.Conn) {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var parts sync.WaitGroup
	defer parts.Wait()
	defer ch.Close()
	defer conn.Close()

	closed := make(chan struct{})
	parts.Go(func() {
		defer close(closed)
		for req := range requests {
			req.Reply(false, nil)
		}
	})
	sent, received := make(chan error, 1), make(chan error, 1)
	parts.Go(func() { sent <- carry(conn, ch) })
	parts.Go(func() { received <- carry(ch, conn) })
	for range 2 {
		select {
		case err := <-sent:
			if err != nil {
				return
			}
			sent = nil
		case err := <-received:
			if err != nil {
				return
			}
			received = nil
		case <-closed:
			if sent != nil {
				select {
				case <-sent:
				case <-time.After(drainTimeout):
				}
			}
			return
		}
	}
}

// carry copies from src to dst and ends dst's direction with src's.
func carry(dst io.Writer, src io.Reader) error {
	if _, err := copyStream(dst, src); err != nil {
		return err
	}
	half, ok := dst.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("a %T can't end one direction", dst)
	}
	return half.CloseWrite()
}
