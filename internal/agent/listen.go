package agent

import (
	"crypto/rand"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Listening is the first message of a listener.
type Listening struct {
	Address string `json:"address"` // HOST:PORT, or a path
}

// Accepted tells of a connection. A Dial of the network "accepted" to ID gets it.
type Accepted struct {
	ID     string `json:"id"`
	Remote string `json:"remote,omitempty"` // HOST:PORT of who connected
}

const (
	// maxWaiting is how many connections of one listener wait to be dialled. The others
	// wait in the kernel.
	maxWaiting = 128
	// acceptTimeout is how long one waits.
	acceptTimeout = 30 * time.Second
	// acceptRetry is the pause after a failure that may pass, such as too many open files.
	acceptRetry = 50 * time.Millisecond
)

// Acceptances holds connections that were accepted, until they are dialled. The zero value is
// ready for use, by many goroutines.
type Acceptances struct {
	mu      sync.Mutex
	waiting map[string]*acceptance
}

type acceptance struct {
	conn  net.Conn
	timer *time.Timer
	slots chan struct{} // of the listener
}

// Take returns the connection with that ID, once.
func (a *Acceptances) Take(id string) (net.Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w, ok := a.waiting[id]
	if !ok {
		return nil, errors.New("the connection that was accepted has ended")
	}
	delete(a.waiting, id)
	w.timer.Stop()
	<-w.slots
	return w.conn, nil
}

func (a *Acceptances) drop(id string) {
	if conn, err := a.Take(id); err == nil {
		conn.Close()
	}
}

func (a *Acceptances) put(conn net.Conn, slots chan struct{}) (id string) {
	id = rand.Text()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == nil {
		a.waiting = map[string]*acceptance{}
	}
	a.waiting[id] = &acceptance{conn, time.AfterFunc(acceptTimeout, func() { a.drop(id) }), slots}
	return id
}

// Serve accepts connections on l and tells host, which has had its Reply, until host ends its
// stream. It closes both, and what nobody has dialled.
func (a *Acceptances) Serve(host net.Conn, l net.Listener) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, host)
		l.Close()
	}()
	slots := make(chan struct{}, maxWaiting)
	a.accept(host, l, slots, ended)
	l.Close()
	host.Close()
	<-ended
	for _, id := range a.of(slots) {
		a.drop(id)
	}
}

// of returns the connections of one listener.
func (a *Acceptances) of(slots chan struct{}) (ids []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, w := range a.waiting {
		if w.slots == slots {
			ids = append(ids, id)
		}
	}
	return ids
}

func (a *Acceptances) accept(host io.Writer, l net.Listener, slots chan struct{}, ended <-chan struct{}) {
	if WriteMessage(host, Listening{l.Addr().String()}) != nil {
		return
	}
	for {
		select {
		case slots <- struct{}{}:
		case <-ended:
			return
		}
		conn, err := l.Accept()
		for err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(acceptRetry)
			conn, err = l.Accept()
		}
		remote := ""
		if conn.RemoteAddr().Network() == "tcp" {
			remote = conn.RemoteAddr().String()
		}
		if WriteMessage(host, Accepted{a.put(conn, slots), remote}) != nil {
			return
		}
	}
}
