package agent

import (
	"io"
	"net"
)

// halfCloser is a connection whose writing side can be ended alone.
type halfCloser interface{ CloseWrite() error }

// resetter is a connection that can be ended so that the other side notices at once.
type resetter interface{ Reset() error }

// Splice carries bytes between a and b, and the end of each direction, until both
// have ended or one has failed. It closes both.
func Splice(a, b net.Conn) {
	done := make(chan error, 2)
	go func() { done <- pipe(a, b) }()
	go func() { done <- pipe(b, a) }()
	for range 2 {
		if err := <-done; err != nil {
			abort(a)
			abort(b)
		}
	}
	a.Close()
	b.Close()
}

func pipe(dst, src net.Conn) error {
	if _, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 64<<10)); err != nil {
		return err
	}
	if hc, ok := dst.(halfCloser); ok {
		return hc.CloseWrite()
	}
	return dst.Close()
}

func abort(c net.Conn) {
	if r, ok := c.(resetter); ok {
		r.Reset()
	}
	c.Close()
}
