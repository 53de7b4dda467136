package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// qmp is a connection to QEMU's control socket, as described in QEMU's docs/interop/qmp-spec.
type qmp struct {
	conn net.Conn      // set by open
	done chan struct{} // closed when the connection has ended, or could not be made

	wg sync.WaitGroup // of resumes

	sendMu  sync.Mutex // one command at a time
	replies chan qmpMessage

	mu     sync.Mutex
	reason string   // of the last SHUTDOWN event
	panic  bool     // GUEST_PANICKED was seen
	link   net.Conn // the latest connection to the link
	told   bool     // an event has said whether the guest's end of the link is open
	closed bool     // the guest has closed it

	// openedFile is there once the guest has opened its end of the link: QEMU tells no guest that
	// has closed it from one that is still booting.
	openedFile string
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

func newQMP(dir string) *qmp {
	return &qmp{
		done: make(chan struct{}), replies: make(chan qmpMessage, 1), openedFile: filepath.Join(dir, openedFile),
	}
}

// open takes over conn and negotiates. QEMU talks to one client at a time: it
// waits for another one to go, until ctx is done.
func (q *qmp) open(ctx context.Context, conn net.Conn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	q.conn = conn
	go q.read()
	_, err := q.run("qmp_capabilities")
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		<-q.done
	}
	return err
}

// takeOver finds out what happened while nobody listened. Errors mean that the
// connection has ended, which is seen elsewhere.
func (q *qmp) takeOver() {
	// QEMU may have stopped the machine: see resume.
	_, _ = q.run("cont")
	b, err := q.run("query-chardev")
	var chardevs []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	if err != nil || json.Unmarshal(b, &chardevs) != nil {
		return
	}
	for _, c := range chardevs {
		if c.Label == linkChardev {
			q.mu.Lock()
			_, err := os.Stat(q.openedFile)
			if !q.told && (c.Open || err == nil) { // what an event says is newer
				q.setLink(c.Open)
			}
			q.mu.Unlock()
		}
	}
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
				if m.Data.ID == linkID {
					q.told = true
					q.setLink(m.Data.Open)
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
		_, _ = q.run("cont")
	}
}

// run executes a command without arguments and returns what it returns.
func (q *qmp) run(command string) (json.RawMessage, error) {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	select {
	case <-q.replies: // a stale one
	default:
	}
	if _, err := fmt.Fprintf(q.conn, "{\"execute\": %q}\n", command); err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-q.replies:
		if m.Error != nil {
			return nil, fmt.Errorf("QMP %s: %s", command, m.Error.Desc)
		}
		return m.Return, nil
	case <-q.done:
		return nil, fmt.Errorf("QMP %s: %w", command, errors.New("QEMU closed the connection"))
	}
}

// setLink takes note of whether the guest's end of the link is open. The connection to the
// port doesn't show it, so it is closed with it. The mutex is held.
func (q *qmp) setLink(open bool) {
	q.closed = !open
	if open {
		// Of use only for as long as QEMU runs: there is no need to sync it. Without it, an agent that
		// has ended is waited for.
		_ = os.WriteFile(q.openedFile, nil, 0o600)
	} else if q.link != nil {
		q.link.Close()
	}
}

// closeWithGuest closes conn, a connection to the link, when the guest closes its end.
func (q *qmp) closeWithGuest(conn net.Conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.link = conn
	if q.closed {
		conn.Close()
	}
}

// linkClosed says whether the guest has closed its end of the link.
func (q *qmp) linkClosed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.closed
}

func (q *qmp) shutdownReason() (reason string, panicked bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reason, q.panic
}
