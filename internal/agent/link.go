// Package agent is how the host talks to the agent inside a VM: the link
// and its protocol, and the host's side of it. The guest's side is the
// package guest below.
//
// The link is one ordered byte stream, such as a virtio-serial port. After a
// handshake it carries a yamux session in which the host opens streams: one
// for each request.
package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

// protocolVersion is that of this side. Host and guest may differ by what they added:
// a request that the other side doesn't know is answered with an error.
const protocolVersion = 1

// The handshake finds the start of a session in a stream whose past is
// unknown: a port keeps what was in flight when a host went away. The host
// repeats HELLO with a fresh nonce until ACK comes back with it, then sends
// START, and both sides begin the session. The guest acknowledges a nonce once.
//
// Each message is 8 bytes of magic, the nonce, and the version.
const (
	helloMagic = "\xffshedHEL"
	ackMagic   = "\xffshedACK"
	startMagic = "\xffshedGO!"
	magicLen   = 8
	nonceLen   = 16
	messageLen = magicLen + nonceLen + 4

	helloInterval = 50 * time.Millisecond

	// maxMessage bounds a session's frames, in bytes, of which sessionHeader are the header. It
	// is what Linux takes in one write to a virtio port.
	maxMessage    = 32 << 10
	sessionHeader = 12

	// A new host first sends resyncLen times resyncByte. Wherever the old session was cut off,
	// that ends it: as every frame begins with another byte, no session has
	// maxMessage of these in a row.
	resyncByte = 0xfe
	resyncLen  = 2 * maxMessage
)

func message(magic string, nonce []byte) []byte {
	b := make([]byte, 0, messageLen)
	b = append(b, magic...)
	b = append(b, nonce...)
	return binary.BigEndian.AppendUint32(b, protocolVersion)
}

// readMessage skips bytes until a message with one of the magics is read.
func readMessage(r *bufio.Reader, magics ...string) (magic string, nonce []byte, version uint32, err error) {
	for {
		b, err := r.Peek(messageLen)
		if err != nil {
			return "", nil, 0, err
		}
		// All magics start with the same byte, which is nowhere else in a message: where
		// it comes again, what was there before is only the start of one.
		skip := bytes.IndexByte(b[1:], helloMagic[0])
		if skip < 0 {
			for _, m := range magics {
				if bytes.HasPrefix(b, []byte(m)) {
					nonce = bytes.Clone(b[magicLen : magicLen+nonceLen])
					version = binary.BigEndian.Uint32(b[magicLen+nonceLen:])
					_, err := r.Discard(messageLen)
					return m, nonce, version, err
				}
			}
			skip = len(b) - 1
		}
		if _, err := r.Discard(skip + 1); err != nil {
			return "", nil, 0, err
		}
	}
}

func sessionConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.LogOutput = io.Discard
	// A paused or busy VM is no broken connection: only the port's end is.
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = 24 * time.Hour
	c.MeasureRTTInterval = 24 * time.Hour
	c.MaxIncomingStreams = 1 << 16
	c.AcceptBacklog = 4096
	c.InitialStreamWindowSize = 1 << 20
	c.MaxStreamWindowSize = 1 << 20
	c.MaxMessageSize = maxMessage
	c.ReadBufSize = 0 // port has the buffer
	return c
}

// port is a connection whose reads go through the buffer that the handshake may have filled.
type port struct {
	net.Conn
	r   *bufio.Reader
	run int // how many of the bytes read last are resyncByte
}

// errResync ends a session whose host has been replaced.
var errResync = errors.New("another host has taken over")

func (p *port) Read(b []byte) (int, error) {
	// Short enough that resyncLen bytes contain one whole read after the run is too long.
	n, err := p.r.Read(b[:min(len(b), (resyncLen-maxMessage)/2)])
	i := n
	for i > 0 && b[i-1] == resyncByte {
		i--
	}
	if i > 0 {
		p.run = 0
	}
	if p.run += n - i; p.run >= maxMessage {
		return 0, errResync
	}
	return n, err
}

// SetWriteDeadline does nothing: a write waits for as long as the VM is paused, and
// a deadline that a session sets late must not undo the one by which a guest's port is closed.
func (p *port) SetWriteDeadline(time.Time) error { return nil }

// Connect performs the host's side of the handshake on conn and returns the
// session. It waits for a guest that is still booting, until ctx is done. With resync the
// guest may be in the middle of an earlier session, which ends.
//
// The client owns conn from then on; on error conn is closed.
func Connect(ctx context.Context, conn net.Conn, resync bool) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r := bufio.NewReaderSize(conn, 64<<10)
	err := connect(conn, r, resync)
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("the link to the agent: %w", err)
	}
	config := sessionConfig()
	config.MaxIncomingStreams = 0 // the guest has nothing to ask for, and nobody here would take what it sends
	s, err := yamux.Client(&port{Conn: conn, r: r}, config, nil)
	if err != nil {
		return nil, fmt.Errorf("the link to the agent: %w", err)
	}
	return &Client{session: s}, nil
}

func connect(conn net.Conn, r *bufio.Reader, resync bool) error {
	nonce := make([]byte, nonceLen)
	rand.Read(nonce)
	for i := range nonce {
		nonce[i] &= 0x7f // never the first byte of a magic
	}
	hello := message(helloMagic, nonce)
	first := hello
	if resync {
		first = append(bytes.Repeat([]byte{resyncByte}, resyncLen), hello...)
	}
	acked := make(chan struct{})
	writer := make(chan error, 1)
	go func() {
		tick := time.NewTicker(helloInterval)
		defer tick.Stop()
		for b := first; ; b = hello {
			if _, err := conn.Write(b); err != nil {
				conn.Close() // ends the read below too
				writer <- err
				return
			}
			select {
			case <-acked:
				_, err := conn.Write(message(startMagic, nonce))
				writer <- err
				return
			case <-tick.C:
			}
		}
	}()
	for {
		_, n, version, err := readMessage(r, ackMagic)
		if err != nil {
			close(acked)
			return errors.Join(err, <-writer)
		}
		if bytes.Equal(n, nonce) {
			close(acked)
			if err := <-writer; err != nil {
				return err
			}
			if version == 0 {
				return errors.New("the agent speaks version 0 of the protocol")
			}
			return nil
		}
	}
}

// accept performs the guest's side of the handshake on conn, which it reads
// through r, and returns the session. Closing the session closes conn.
func accept(conn net.Conn, r *bufio.Reader) (*yamux.Session, error) {
	var acked []byte
	for {
		magic, nonce, _, err := readMessage(r, helloMagic, startMagic)
		if err != nil {
			return nil, err
		}
		switch {
		case magic == helloMagic && !bytes.Equal(nonce, acked):
			if _, err := conn.Write(message(ackMagic, nonce)); err != nil {
				return nil, err
			}
			acked = nonce
		case magic == startMagic && bytes.Equal(nonce, acked):
			return yamux.Server(&port{Conn: conn, r: r}, sessionConfig(), nil)
		}
	}
}

// Client is the host's end of a link.
type Client struct{ session *yamux.Session }

// Done is closed when the link has ended.
func (c *Client) Done() <-chan struct{} { return c.session.CloseChan() }

// Close ends the link and every stream on it.
func (c *Client) Close() error { return c.session.Close() }

// Stream is one stream of a session. CloseWrite ends the writing side, Reset
// both, so that the other side's reads and writes fail at once.
type Stream = yamux.Stream

// Open opens a stream, for one request.
func (c *Client) Open(ctx context.Context) (*Stream, error) {
	s, err := c.session.OpenStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("the link to the agent: %w", err)
	}
	return s, nil
}
