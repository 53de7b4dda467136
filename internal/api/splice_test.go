package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
)

// frozenSheds are machines that stand still: what is open to them takes nothing and gives nothing.
type frozenSheds struct {
	*apitest.Fake
	closed chan struct{} // receives for each connection that is closed
}

func (f *frozenSheds) Exec(context.Context, string, shed.Command) (net.Conn, error) {
	host, guest := net.Pipe()
	return &frozenConn{Conn: host, guest: guest, closed: f.closed}, nil
}

type frozenConn struct {
	net.Conn
	guest  net.Conn
	closed chan struct{}
	once   atomic.Bool
}

func (c *frozenConn) Close() error {
	if c.once.CompareAndSwap(false, true) {
		c.closed <- struct{}{}
	}
	return c.Conn.Close()
}

// A command in a machine that stands still ends with its client, even if that has sent all that it may.
func TestFrozenMachine(t *testing.T) {
	for _, size := range []int{0, 1, agent.StdinWindow} {
		synctest.Test(t, func(t *testing.T) {
			ln := newPipeListener()
			sheds := &frozenSheds{Fake: &apitest.Fake{}, closed: make(chan struct{}, 10)}
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			log := slog.New(slog.DiscardHandler)
			go func() { served <- Serve(ctx, ln, NewServer(Config{Sheds: sheds, Log: log}), log) }()
			c := NewClient(ln.dial, "the server")
			conn, err := c.Exec(t.Context(), "a", shed.Command{Login: true})
			if err != nil {
				t.Fatal(err)
			}
			w := agent.NewFrameWriter(conn)
			for sent := 0; sent < size; sent += agent.MaxFrame {
				if err := w.Write(agent.FrameStdin, make([]byte, min(size, agent.MaxFrame))); err != nil {
					t.Fatal(err)
				}
			}
			conn.Close()
			<-sheds.closed
			c.Close()
			cancel()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// A command that takes no more doesn't keep its client from sending, and one that takes late gets all.
func TestBacklog(t *testing.T) {
	b := newBacklog([]byte("early "))
	client, sender := net.Pipe()
	read := make(chan struct{})
	go func() {
		defer close(read)
		b.readFrom(client)
	}()
	data := bytes.Repeat([]byte("0123456789"), maxBacklog/3)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		sender.Write(data)
		sender.Close()
	}()
	var got bytes.Buffer
	b.writeTo(&got)
	if got.String() != "early "+string(data) {
		t.Errorf("%d bytes of %d", got.Len(), len(data)+6)
	}
	<-sent
	<-read

	b = newBacklog(nil)
	client, sender = net.Pipe()
	go b.writeTo(writerFunc(func([]byte) (int, error) { return 0, io.ErrClosedPipe }))
	go func() {
		sender.Write(data)
		sender.Close()
	}()
	b.readFrom(client)
	if len(b.data) != 0 {
		t.Errorf("%d bytes are kept for a command that takes none", len(b.data))
	}
}
