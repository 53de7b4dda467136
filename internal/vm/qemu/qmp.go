package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// qmp is a connection to QEMU's control socket, as described in QEMU's docs/interop/qmp-spec.
type qmp struct {
	conn net.Conn
	done chan struct{} // closed when the connection has ended

	wg sync.WaitGroup // of resumes

	sendMu  sync.Mutex // one command at a time
	replies chan qmpMessage

	mu     sync.Mutex
	reason string // of the last SHUTDOWN event
	panic  bool   // GUEST_PANICKED was seen
	link   net.Conn
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"` // of SHUTDOWN
		ID     string `json:"id"`     // of VSERPORT_CHANGE
		Open   bool   `json:"open"`
	} `json:"data"`
}

// newQMP takes over conn and negotiates. QEMU talks to one client at a time: it
// waits for another one to go, until ctx is done.
func newQMP(ctx context.Context, conn net.Conn) (*qmp, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	q := &qmp{conn: conn, done: make(chan struct{}), replies: make(chan qmpMessage, 1)}
	go q.read()
	err := q.run("qmp_capabilities")
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		<-q.done
		return nil, err
	}
	return q, nil
}

func (q *qmp) read() {
	defer q.wg.Wait()
	defer close(q.done)
	dec := json.NewDecoder(bufio.NewReader(q.conn))
	for {
		var m qmpMessage
		if err := dec.Decode(&m); err != nil {
			return
		}
		switch {
		case m.Event != "":
			q.mu.Lock()
			switch m.Event {
			case "SHUTDOWN":
				q.reason = m.Data.Reason
			case "GUEST_PANICKED":
				q.panic = true
			case "VSERPORT_CHANGE":
				// The guest's end is its agent's: the connection to the port doesn't show it.
				if m.Data.ID == linkID && !m.Data.Open && q.link != nil {
					q.link.Close()
				}
			}
			q.mu.Unlock()
			if m.Event == "STOP" {
				q.wg.Go(q.resume)
			}
		case m.Greeting == nil:
			select {
			case q.replies <- m:
			default: // the reply to a command of a client before us
			}
		}
	}
}

// resumeInterval is how often a machine is tried to be continued that QEMU has stopped.
const resumeInterval = 2 * time.Second

// resume continues a machine that QEMU stopped because the host's disk is full: its writes are
// repeated then, and if there still is no space it stops again. Nothing is lost.
func (q *qmp) resume() {
	select {
	case <-q.done:
	case <-time.After(resumeInterval):
		// An error means that the connection has ended, which is seen elsewhere.
		_ = q.run("cont")
	}
}

// run executes a command without arguments.
func (q *qmp) run(command string) error {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	select {
	case <-q.replies: // a stale one
	default:
	}
	if _, err := fmt.Fprintf(q.conn, "{\"execute\": %q}\n", command); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-q.replies:
		if m.Error != nil {
			return fmt.Errorf("QMP %s: %s", command, m.Error.Desc)
		}
		return nil
	case <-q.done:
		return fmt.Errorf("QMP %s: %w", command, errors.New("QEMU closed the connection"))
	}
}

// closeWithGuest closes conn, a connection to the link, when the guest closes its end.
func (q *qmp) closeWithGuest(conn net.Conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.link = conn
}

func (q *qmp) shutdownReason() (reason string, panicked bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reason, q.panic
}
