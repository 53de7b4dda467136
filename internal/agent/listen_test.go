package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
)

// served has a listener serve the returned host's end.
func served(t *testing.T, a *Acceptances) (host net.Conn, address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, guest := socketPair(t)
	var wg sync.WaitGroup
	wg.Go(func() { a.Serve(guest, l) })
	t.Cleanup(func() {
		host.Close()
		wg.Wait()
	})
	var m Listening
	if err := ReadMessage(host, &m); err != nil {
		t.Fatal(err)
	}
	return host, m.Address
}

func dialTo(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestAccepted(t *testing.T) {
	var a Acceptances
	host, address := served(t, &a)
	// Beyond what may wait too.
	var far []net.Conn
	for range maxWaiting + 20 {
		far = append(far, dialTo(t, address))
	}
	for i, c := range far {
		var m Accepted
		if err := ReadMessage(host, &m); err != nil {
			t.Fatal(err)
		}
		if m.Remote != c.LocalAddr().String() {
			t.Errorf("connection %d is from %s, not %s", i, m.Remote, c.LocalAddr())
		}
		near, err := a.Take(m.ID)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := a.Take(m.ID); err == nil {
			c.Close()
			t.Fatal("it can be had twice")
		}
		fmt.Fprint(near, i)
		near.Close()
		if b, err := io.ReadAll(c); string(b) != fmt.Sprint(i) || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
	if c, err := a.Take("nothing"); err == nil {
		c.Close()
		t.Error("there is a connection that was never accepted")
	}
}

// The end of a listener is that of what waits, and of nothing else.
func TestListenerEnds(t *testing.T) {
	var a Acceptances
	host, address := served(t, &a)
	other, otherAddress := served(t, &a)
	accept := func(host net.Conn, address string) (far net.Conn, id string) {
		t.Helper()
		far = dialTo(t, address)
		var m Accepted
		if err := ReadMessage(host, &m); err != nil {
			t.Fatal(err)
		}
		return far, m.ID
	}
	taken, id := accept(host, address)
	near, err := a.Take(id)
	if err != nil {
		t.Fatal(err)
	}
	waiting, _ := accept(host, address)
	_, otherID := accept(other, otherAddress)
	host.Close()
	if _, err := io.ReadAll(waiting); err != nil {
		t.Error(err)
	}
	for {
		c, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		c.Close()
	}
	io.WriteString(near, "still here")
	near.Close()
	if b, err := io.ReadAll(taken); string(b) != "still here" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if c, err := a.Take(otherID); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// flaky fails now and then, as where files are short.
type flaky struct {
	net.Listener
	n int
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.n++; f.n%2 == 1 {
		return nil, errors.New("too many open files")
	}
	return f.Listener.Accept()
}

func TestAcceptFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, guest := socketPair(t)
	var a Acceptances
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.Serve(guest, &flaky{Listener: l})
	}()
	var m Listening
	if err := ReadMessage(host, &m); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		dialTo(t, m.Address)
		var m Accepted
		if err := ReadMessage(host, &m); err != nil {
			t.Fatal(err)
		}
	}
	host.Close()
	<-done
}
