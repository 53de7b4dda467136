package api

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/charliek/shed"
)

const (
	spliceBuffer = 128 << 10
	// linger is how long a client may take to see the end of its command.
	linger = 10 * time.Second
)

func (s *server) exec(w http.ResponseWriter, r *http.Request) {
	if !upgrades(r) {
		w.Header().Set("Upgrade", execProtocol)
		w.Header().Set("Connection", "Upgrade")
		s.failStatus(w, r, http.StatusUpgradeRequired,
			shed.Errorf(shed.CodeInvalid, "exec needs a connection that is upgraded to %s", execProtocol))
		return
	}
	var cmd shed.Command
	if !s.readJSON(w, r, &cmd) {
		return
	}
	command, err := s.sheds.Exec(r.Context(), r.PathValue("name"), cmd)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer command.Close()
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.fail(w, r, shed.Errorf(shed.CodeInternal, "the connection can't be upgraded: %w", err))
		return
	}
	defer client.Close()
	client.SetDeadline(time.Time{})
	if _, err := io.WriteString(client, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+execProtocol+"\r\n\r\n"); err != nil {
		return
	}
	// A client that doesn't wait for the answer has its first frames in here.
	early, _ := buffered.Reader.Peek(buffered.Reader.Buffered())
	splice(r.Context(), client, command, early)
}

func upgrades(r *http.Request) bool {
	if !strings.EqualFold(r.Header.Get("Upgrade"), execProtocol) {
		return false
	}
	for part := range strings.SplitSeq(r.Header.Get("Connection"), ",") {
		if strings.EqualFold(strings.TrimSpace(part), "Upgrade") {
			return true
		}
	}
	return false
}

// splice copies both ways between client and command until one of them ends
// or ctx is done. It closes both; early goes to command first.
//
// The exec protocol says in frames that stdin or the command is at its end.
// So a client whose stream ends is gone, and with it the command; when the
// command's stream ends, the client still gets all of it.
func splice(ctx context.Context, client, command net.Conn, early []byte) {
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		command.Close()
	})
	defer stop()
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
