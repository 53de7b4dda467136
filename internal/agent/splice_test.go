package agent

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

// spliced connects a stream with a connection on the guest's side, and returns the host's end of
// the stream and the far end of the connection.
func spliced(t *testing.T, wrap func(net.Conn) net.Conn) (*Stream, net.Conn) {
	t.Helper()
	host, guest := socketPair(t)
	near, far := socketPair(t)
	serveGuest(t, guest, func(s *Stream) { Splice(s, wrap(near)) })
	return open(t, connectTo(t, host, false)), far
}

func plain(c net.Conn) net.Conn { return c }

func TestSpliceCarriesBothWaysAndHalfCloses(t *testing.T) {
	s, far := spliced(t, plain)
	question := bytes.Repeat([]byte("question "), 200_000)
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(question)
		sent <- errors.Join(err, s.CloseWrite())
	}()
	// The end of one direction arrives while the other is open.
	got, err := io.ReadAll(far)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, question) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(question), err)
	}
	answer := bytes.Repeat([]byte("answer "), 200_000)
	go func() {
		_, err := far.Write(answer)
		sent <- errors.Join(err, far.Close())
	}()
	got, err = io.ReadAll(s)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, answer) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(answer), err)
	}
}

func TestSpliceCarriesTheOtherSidesHalfClose(t *testing.T) {
	s, far := spliced(t, plain)
	if _, err := io.WriteString(s, "?"); err != nil { // the guest learns of a stream by what is sent on it
		t.Fatal(err)
	}
	if _, err := io.WriteString(far, "first"); err != nil {
		t.Fatal(err)
	}
	if err := far.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "first" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := io.WriteString(s, " then"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if got, err := io.ReadAll(far); err != nil || string(got) != "? then" {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestSpliceCarriesAReset(t *testing.T) {
	s, far := spliced(t, plain)
	if _, err := io.WriteString(s, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := s.Reset(); err != nil {
		t.Fatal(err)
	}
	if n, err := far.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes after the reset", n)
	}
}

// brokenConn fails after what was sent to it, as a connection does that was reset.
type brokenConn struct{ net.Conn }

var errBroken = errors.New("connection reset by peer")

func (b brokenConn) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = errBroken
	}
	return n, err
}

func (b brokenConn) CloseWrite() error { return b.Conn.(*net.UnixConn).CloseWrite() }

// A failure must not look like an end, whichever direction has ended by then.
func TestSpliceNeverTurnsAFailureIntoAnEnd(t *testing.T) {
	for _, halfClosed := range []bool{false, true} {
		s, far := spliced(t, func(c net.Conn) net.Conn { return brokenConn{c} })
		if _, err := io.WriteString(s, "x"); err != nil {
			t.Fatal(err)
		}
		if halfClosed {
			if err := s.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(far); err != nil {
				t.Fatal(err)
			}
		} else if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		far.Close()
		if got, err := io.ReadAll(s); err == nil {
			t.Errorf("half closed %v: %q and a clean end", halfClosed, got)
		}
	}
}

func TestCall(t *testing.T) {
	host, guest := socketPair(t)
	serveGuest(t, guest, func(s *Stream) {
		var req Request
		if ReadMessage(s, &req) != nil {
			s.Reset()
			return
		}
		switch {
		case req.Dial != nil:
			WriteMessage(s, Reply{Error: "refused"})
			s.Close()
		case req.Clock != nil:
			WriteMessage(s, Reply{})
			echo(s)
		default:
			s.Close() // no answer
		}
	})
	c := connectTo(t, host, false)
	if err := Call(t.Context(), open(t, c), Request{Dial: &shed.Endpoint{}}); err == nil || err.Error() != "refused" {
		t.Errorf("error %v, want the agent's", err)
	}
	if err := Call(t.Context(), open(t, c), Request{PowerOff: &PowerOff{}}); err == nil || !strings.Contains(err.Error(), "without an answer") {
		t.Errorf("error %v", err)
	}
	s := open(t, c)
	if err := Call(t.Context(), s, Request{Clock: &Clock{}}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(s, "still open"); err != nil {
		t.Fatal(err)
	}
	s.CloseWrite()
	if got, err := io.ReadAll(s); err != nil || string(got) != "still open" {
		t.Errorf("%q, %v", got, err)
	}
}
