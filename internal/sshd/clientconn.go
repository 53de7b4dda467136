package sshd

import (
	"bytes"
	"encoding/binary"
	"net"
	"reflect"
	"sync"
	"unsafe"

	"golang.org/x/crypto/ssh"
)

// A client may send packets that nobody waits for, and package ssh takes in 16 of them ahead. If a
// connection fails with more on the way, the goroutine that wants to hand them over waits for ever, and all that it
// holds stays. So before the login begins, a clientConn lets no more than that through; from then on the
// connection can be got hold of, and what is left is taken out when it has ended.

// aheadOfLogin is how many bytes are read at once, until so many have come after the client's NEWKEYS and
// before the login begins. With that, fewer than twice as many have come: eleven packets of the least size. Clients send one.
const aheadOfLogin = 160

// clientConn is the network connection of a client.
type clientConn struct {
	net.Conn
	clear clearStream
	early int // bytes after NEWKEYS

	begun  chan struct{}         // closed when the login has
	login  ssh.ServerPreAuthConn // set before that
	closed chan struct{}
	once   sync.Once
}

func newClientConn(conn net.Conn) *clientConn {
	return &clientConn{Conn: conn, begun: make(chan struct{}), closed: make(chan struct{})}
}

// begin is for when the login begins.
func (c *clientConn) begin(login ssh.ServerPreAuthConn) {
	c.login = login
	close(c.begun)
}

func (c *clientConn) Read(b []byte) (int, error) {
	select {
	case <-c.begun:
		return c.Conn.Read(b)
	default:
	}
	if c.early >= aheadOfLogin {
		// Either the login begins with what is there, or the handshake has failed and closes c.
		select {
		case <-c.begun:
		case <-c.closed:
		}
		return c.Conn.Read(b)
	}
	n, err := c.Conn.Read(b[:min(len(b), aheadOfLogin)])
	c.early += c.clear.skip(b[:n])
	return n, err
}

func (c *clientConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// drain closes c and waits for package ssh to end with it. Nobody may read from the SSH connection any more.
func (c *clientConn) drain() {
	c.Close()
	if c.login == nil {
		return
	}
	for range incoming(c.login) {
	}
}

// incoming returns the packets of a connection that wait. There is no other way to them: *ssh.connection has an interface
// with a *ssh.handshakeTransport. Of a version of package ssh that is made otherwise, it returns none, and the tests fail.
func incoming(login ssh.ServerPreAuthConn) <-chan []byte {
	v := reflect.ValueOf(login)
	for _, name := range []string{"transport", "incoming"} {
		for v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface {
			v = v.Elem()
		}
		if v.Kind() == reflect.Struct {
			v = v.FieldByName(name)
		}
	}
	if v.Kind() != reflect.Chan || v.Type() != reflect.TypeFor[chan []byte]() || !v.CanAddr() {
		none := make(chan []byte)
		close(none)
		return none
	}
	return *(*chan []byte)(unsafe.Pointer(v.UnsafeAddr()))
}

// clearStream finds the end of the client's NEWKEYS message, before which nothing is encrypted.
type clearStream struct {
	versionRead bool
	head        []byte // of the line or packet that is being read
	left        int    // bytes of the packet's rest
	isNewKeys   bool   // the packet
	ended       bool
}

// skip returns how many bytes of b, which comes next, are after NEWKEYS.
func (s *clearStream) skip(b []byte) int {
	for len(b) > 0 && !s.ended {
		switch {
		case !s.versionRead:
			if b[0] != '\n' {
				if len(s.head) < 4 {
					s.head = append(s.head, b[0])
				}
			} else {
				s.versionRead = bytes.Equal(s.head, []byte("SSH-"))
				s.head = s.head[:0]
			}
			b = b[1:]
		case s.left > 0:
			n := min(s.left, len(b))
			s.left -= n
			b = b[n:]
			s.ended = s.left == 0 && s.isNewKeys
		default: // length, length of the padding, message
			s.head = append(s.head, b[0])
			b = b[1:]
			if len(s.head) < 6 {
				continue
			}
			const msgNewKeys = 21
			s.left = int(binary.BigEndian.Uint32(s.head)) - 2
			s.isNewKeys = s.head[5] == msgNewKeys
			s.ended = s.left < 0 || s.left == 0 && s.isNewKeys // nonsense ends it as well
			s.head = s.head[:0]
		}
	}
	return len(b)
}
