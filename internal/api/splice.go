package api

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	spliceBuffer = 128 << 10
	// linger is how long a client may take to see the end of its command, and a command to take what a client that is
	// gone has sent.
	linger = 10 * time.Second
)

func (s *server) exec(w http.ResponseWriter, r *http.Request) {
	var cmd shed.Command
	s.upgrade(w, r, execProtocol, &cmd, splice, func() (net.Conn, error) {
		return s.Sheds.Exec(r.Context(), r.PathValue("name"), cmd)
	})
}

func (s *server) dial(w http.ResponseWriter, r *http.Request) {
	var to shed.Endpoint
	s.upgrade(w, r, dialProtocol, &to, join, func() (net.Conn, error) {
		return s.Sheds.Dial(r.Context(), r.PathValue("name"), to)
	})
}

func (s *server) listen(w http.ResponseWriter, r *http.Request) {
	var on shed.Endpoint
	s.upgrade(w, r, listenProtocol, &on, splice, func() (net.Conn, error) {
		return s.Sheds.Listen(r.Context(), r.PathValue("name"), on)
	})
}

// upgrade reads body, opens what it asks for in a shed, and has connect connect that with the client
// until the request's context is done. early is what the client has sent already.
func (s *server) upgrade(w http.ResponseWriter, r *http.Request, protocol string, body any,
	connect func(client, opened net.Conn, early []byte), open func() (net.Conn, error),
) {
	if !upgrades(r, protocol) {
		w.Header().Set("Upgrade", protocol)
		w.Header().Set("Connection", "Upgrade")
		s.failStatus(w, r, http.StatusUpgradeRequired,
			shed.Errorf(shed.CodeInvalid, "%s needs a connection that is upgraded to %s", r.URL.Path, protocol))
		return
	}
	if !s.readJSON(w, r, body) {
		return
	}
	opened, err := open()
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer opened.Close()
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.fail(w, r, shed.Errorf(shed.CodeInternal, "the connection can't be upgraded: %w", err))
		return
	}
	defer client.Close()
	client.SetDeadline(time.Time{})
	if _, err := io.WriteString(client, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+protocol+"\r\n\r\n"); err != nil {
		return
	}
	// A client that doesn't wait for the answer has its first bytes in here.
	early, _ := buffered.Reader.Peek(buffered.Reader.Buffered())
	stop := context.AfterFunc(r.Context(), func() {
		client.Close()
		opened.Close()
	})
	defer stop()
	connect(client, opened, early)
}

func upgrades(r *http.Request, protocol string) bool {
	if !strings.EqualFold(r.Header.Get("Upgrade"), protocol) {
		return false
	}
	for part := range strings.SplitSeq(r.Header.Get("Connection"), ",") {
		if strings.EqualFold(strings.TrimSpace(part), "Upgrade") {
			return true
		}
	}
	return false
}

// join connects client and conn, each direction with its own end, until both have ended.
// It closes both; early goes to conn first.
func join(client, conn net.Conn, early []byte) {
	if _, err := conn.Write(early); err != nil {
		return
	}
	agent.Splice(client, conn)
}

// splice copies both ways between client and command until one of them ends.
// It closes both; early goes to command first.
//
// The exec protocol says in frames that stdin or the command is at its end.
// So a client whose stream ends is gone, and with it the command; when the
// command's stream ends, the client still gets all of it.
func splice(client, command net.Conn, early []byte) {
	in := newBacklog(early)
	taken, clientDone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(taken)
		in.writeTo(command)
	}()
	go func() {
		defer close(clientDone)
		in.readFrom(client)
		select {
		case <-taken:
		case <-time.After(linger):
		}
		command.Close()
		client.Close()
		<-taken
	}()
	_, err := io.CopyBuffer(client, command, make([]byte, spliceBuffer))
	command.Close()
	// Closing a connection that still has unread input could take from the
	// client what it hasn't read: let it close first.
	half, ok := client.(interface{ CloseWrite() error })
	if err != nil || !ok || half.CloseWrite() != nil {
		client.Close()
	} else {
		client.SetReadDeadline(time.Now().Add(linger))
	}
	<-clientDone
}

// maxBacklog has room for all that a client may send before it is acknowledged, and for frames around it.
const maxBacklog = 2 * agent.StdinWindow

// backlog is what a client has sent and the command has not taken yet. It is there for a command that takes nothing,
// such as one in a machine that is frozen: who waits for such a command doesn't see the client go.
type backlog struct {
	mu      sync.Mutex
	changed *sync.Cond
	data    []byte
	ended   bool // the client sends no more
	refused bool // the command takes no more
}

func newBacklog(data []byte) *backlog {
	b := &backlog{data: bytes.Clone(data)}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// readFrom takes in what client sends until its stream ends.
func (b *backlog) readFrom(client io.Reader) {
	buf := make([]byte, spliceBuffer)
	for {
		n, err := client.Read(buf)
		b.mu.Lock()
		for !b.refused && len(b.data) > 0 && len(b.data)+n > maxBacklog {
			b.changed.Wait()
		}
		if !b.refused {
			b.data = append(b.data, buf[:n]...)
		}
		b.ended = err != nil
		b.changed.Broadcast()
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// writeTo writes all to command, until the client has ended or the command takes no more.
func (b *backlog) writeTo(command io.Writer) {
	var data []byte
	for {
		b.mu.Lock()
		for len(b.data) == 0 && !b.ended {
			b.changed.Wait()
		}
		data, b.data = b.data, data[:0]
		b.changed.Broadcast()
		b.mu.Unlock()
		if len(data) == 0 {
			return
		}
		if _, err := command.Write(data); err != nil {
			b.mu.Lock()
			b.refused, b.data = true, nil
			b.changed.Broadcast()
			b.mu.Unlock()
			return
		}
	}
}
