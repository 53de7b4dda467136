//go:build linux || darwin

package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// Sheds is what a tunnel needs of a server: see shed.Sheds.
type Sheds interface {
	Get(ctx context.Context, name string) (*shed.Shed, error)
	Dial(ctx context.Context, name string, to shed.Endpoint) (net.Conn, error)
}

const (
	// watchPause is how often a server is asked that answers. What goes wrong between is noticed by connections.
	watchPause = 5 * time.Second
	// answerTimeout is how long a server may take to say how a shed is doing.
	answerTimeout = 10 * time.Second
	// dialTimeout is how long it may take to connect, in a shed that runs.
	dialTimeout = time.Minute
	// patience is how long a connection waits for a server that doesn't answer.
	patience = 10 * time.Second

	minPause = 50 * time.Millisecond
	maxPause = 2 * time.Second
)

// forwarder carries the connections of a Claim.
type forwarder struct {
	claim  *Claim
	sheds  Sheds
	report func(format string, args ...any)

	parts sync.WaitGroup

	mu      sync.Mutex
	status  Status
	since   time.Time // when the status has changed
	refused []string  // why nothing in the shed took each port's last connection, or ""
}

// Serve forwards connections until ctx is done, and returns when all have ended. It reports, a line each, when the
// server or the shed goes away and comes back.
//
// A stopped shed isn't started: that would undo a stop whenever a browser polls. While the
// server doesn't answer, a connection waits for it some seconds; it is closed then, or at once if the
// shed doesn't run, or nothing in it answers.
//
// It ends also when somebody removes the record: nobody could find and stop the tunnel any more.
func (c *Claim) Serve(ctx context.Context, sheds Sheds, report func(format string, args ...any)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := &forwarder{claim: c, sheds: sheds, report: report, refused: make([]string, len(c.Record.Ports))}
	f.status = Status{State: Up, Connections: make([]int, len(c.Record.Ports))}
	f.parts.Go(func() {
		defer cancel()
		f.watch(ctx)
	})
	f.accept(ctx, c.status, f.say)
	for i, opened := range c.listeners {
		for _, l := range opened {
			f.accept(ctx, l, func(conn net.Conn) { f.forward(ctx, i, conn) })
		}
	}
	<-ctx.Done()
	c.closeListeners()
	c.status.Close()
	f.parts.Wait()
}

// accept has handle handle what l accepts, until l is closed.
func (f *forwarder) accept(ctx context.Context, l net.Listener, handle func(net.Conn)) {
	f.parts.Go(func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
				if err == nil {
					conn.Close()
				}
				return
			}
			if err != nil { // no more descriptors: some may become free
				sleep(ctx, maxPause)
				continue
			}
			f.parts.Go(func() { handle(conn) })
		}
	})
}

// sleep returns after d, or when ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// say tells who asks how the tunnel is doing.
func (f *forwarder) say(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(statusTimeout))
	f.mu.Lock()
	b, err := json.Marshal(f.status)
	f.mu.Unlock()
	if err == nil {
		conn.Write(b)
	}
}

// watch notices when the server and the shed go away and come back, without a connection. It returns
// when ctx is done, or the record has gone.
func (f *forwarder) watch(ctx context.Context) {
	for pause := minPause; ctx.Err() == nil; {
		if _, err := os.Stat(f.claim.registry.record(f.claim.Record.PID)); errors.Is(err, fs.ErrNotExist) {
			f.report("the record of this tunnel was removed: it ends")
			return
		}
		if lost(f.ask(ctx)) {
			sleep(ctx, pause)
			pause = min(2*pause, maxPause)
			continue
		}
		sleep(ctx, watchPause)
		pause = minPause
	}
}

func lost(err error) bool { return shed.ErrorCode(err) == shed.CodeUnreachable }

// ask returns why the shed can't be connected to.
func (f *forwarder) ask(ctx context.Context) error {
	name, start := f.claim.Record.Shed, time.Now()
	asked, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	sh, err := f.sheds.Get(asked, name)
	switch {
	case err == nil && sh.Status != shed.StatusRunning && sh.Status != shed.StatusStarting:
		err = shed.Errorf(shed.CodeConflict, "shed %q is %s", name, sh.Status)
	case errors.Is(err, context.DeadlineExceeded):
		err = shed.Errorf(shed.CodeUnreachable, "%w: no answer within %v", err, answerTimeout)
	}
	f.note(ctx, start, err)
	return err
}

// note records and reports what the server has answered to what it was asked at asked.
func (f *forwarder) note(ctx context.Context, asked time.Time, err error) {
	if ctx.Err() != nil {
		return
	}
	state, reason := Up, ""
	if err != nil {
		state, reason = Refusing, err.Error()
	}
	if lost(err) {
		state = Reconnecting
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if asked.Before(f.since) { // others have found out more since
		return
	}
	changed := f.status.State != state
	f.status.State, f.status.Reason = state, reason
	if !changed {
		return
	}
	f.since = time.Now()
	switch name := f.claim.Record.Shed; state {
	case Reconnecting:
		f.report("the connection to %s is lost, trying again: %s", name, reason)
	case Refusing:
		f.report("connections to %s are refused: %s", name, reason)
	case Up:
		f.report("%s can be reached again", name)
	}
}

// forward carries a connection to port i of the tunnel. It closes it.
func (f *forwarder) forward(ctx context.Context, i int, conn net.Conn) {
	f.count(i, +1)
	defer f.count(i, -1)
	local := localConn{conn.(*net.TCPConn)}
	defer context.AfterFunc(ctx, func() { local.Reset() })()
	remote, err := f.dial(ctx, f.claim.Record.Ports[i].Remote)
	f.refuse(i, err)
	if err != nil {
		local.Reset()
		return
	}
	defer context.AfterFunc(ctx, func() { remote.Close() })()
	agent.Splice(local, remote)
}

func (f *forwarder) count(i, by int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.Connections[i] += by
}

// refuse reports why connections to port i fail, once until one doesn't.
func (f *forwarder) refuse(i int, err error) {
	reason := ""
	if shed.ErrorCode(err) == shed.CodeConnect { // what holds for all ports is reported by note
		reason = err.Error()
	}
	f.mu.Lock()
	changed := f.refused[i] != reason
	f.refused[i] = reason
	f.mu.Unlock()
	if changed && reason != "" {
		f.report("localhost:%d: %s", f.claim.Record.Ports[i].Local, reason)
	}
}

// dial connects to a port of the shed's localhost.
func (f *forwarder) dial(ctx context.Context, port int) (net.Conn, error) {
	to := shed.Endpoint{Network: "tcp", Address: fmt.Sprintf("localhost:%d", port), NoStart: true}
	deadline := time.Now().Add(patience)
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		start := time.Now()
		dialing, cancel := context.WithTimeout(ctx, dialTimeout)
		conn, err := f.sheds.Dial(dialing, f.claim.Record.Shed, to)
		cancel()
		if err == nil || shed.ErrorCode(err) == shed.CodeConnect {
			f.note(ctx, start, nil)
			return conn, err
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			f.note(ctx, start, err)
		}
		if !lost(err) || ctx.Err() != nil || time.Now().After(deadline) {
			return nil, err
		}
		sleep(ctx, pause)
	}
}

// localConn is a connection that a program here has made.
type localConn struct{ *net.TCPConn }

// Reset lets the program know that this is no proper end.
func (c localConn) Reset() error {
	c.SetLinger(0)
	return c.Close()
}
