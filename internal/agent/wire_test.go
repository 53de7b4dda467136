package agent

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wire is the host's side of a port: one host after the other has it, and what
// was in flight when one went away stays in it.
type wire struct{ net.Conn }

// hostEnd is what one host has of a wire, until it closes it.
type hostEnd struct {
	net.Conn
	mu     sync.Mutex
	closed bool
	users  sync.WaitGroup
}

func (w wire) attach() *hostEnd { return &hostEnd{Conn: w.Conn} }

func (h *hostEnd) use(f func([]byte) (int, error), b []byte) (int, error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return 0, net.ErrClosed
	}
	h.users.Add(1)
	h.mu.Unlock()
	defer h.users.Done()
	return f(b)
}

func (h *hostEnd) Read(b []byte) (int, error)  { return h.use(h.Conn.Read, b) }
func (h *hostEnd) Write(b []byte) (int, error) { return h.use(h.Conn.Write, b) }

// Close cuts off what is being read and written, as the end of a process does.
func (h *hostEnd) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	if err := h.Conn.SetDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	h.users.Wait()
	return h.Conn.SetDeadline(time.Time{})
}

// guestPort is the guest's side: a session that closes it only interrupts itself.
type guestPort struct{ net.Conn }

func (g guestPort) Close() error { return g.Conn.SetDeadline(time.Unix(1, 0)) }

// socketPair returns the two ends of a connection that has a buffer.
func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c
	}
	return conns[0], conns[1]
}

// serveGuest answers hosts on conn as the agent does, each stream with handle, until the
// test ends.
func serveGuest(t testing.TB, conn net.Conn, handle func(*Stream)) {
	t.Helper()
	var wg sync.WaitGroup
	t.Cleanup(func() {
		conn.Close()
		wg.Wait()
	})
	wg.Go(func() {
		r := bufio.NewReaderSize(conn, 64<<10)
		for {
			if conn.SetDeadline(time.Time{}) != nil {
				return
			}
			session, err := accept(guestPort{conn}, r)
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) &&
					!errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("accept: %v", err)
				}
				return
			}
			for {
				s, err := session.AcceptStream()
				if err != nil {
					break
				}
				wg.Go(func() { handle(s) })
			}
			session.Close()
		}
	})
}

// echo sends back what it gets.
func echo(s *Stream) {
	if _, err := io.Copy(s, s); err != nil {
		s.Reset()
		return
	}
	s.Close()
}

func connectTo(t testing.TB, conn net.Conn, resync bool) *Client {
	t.Helper()
	c, err := Connect(t.Context(), conn, resync)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func open(t testing.TB, c *Client) *Stream {
	t.Helper()
	s, err := c.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// checkEcho sends data on a new stream and wants the same back.
func checkEcho(t testing.TB, c *Client, data []byte) {
	t.Helper()
	if err := tryEcho(c, data); err != nil {
		t.Fatal(err)
	}
}

func tryEcho(c *Client, data []byte) error {
	s, err := c.Open(context.Background())
	if err != nil {
		return err
	}
	defer s.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(data)
		sent <- errors.Join(err, s.CloseWrite())
	}()
	got, err := io.ReadAll(s)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if string(got) != string(data) {
		return errors.New("the echo differs from what was sent")
	}
	return nil
}
