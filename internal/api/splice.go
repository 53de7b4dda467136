package api

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	spliceBuffer = 128 << 10
	// linger is how long a client may take to see the end of its command.
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
	clientDone := make(chan struct{})
	go func() {
		defer close(clientDone)
		defer command.Close()
		_, err := command.Write(early)
		if err == nil {
			_, err = io.CopyBuffer(command, client, make([]byte, spliceBuffer))
		}
		if err != nil {
			// The command takes no more input; notice nevertheless when the client goes.
			io.Copy(io.Discard, client)
		}
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
	client.Close()
}
