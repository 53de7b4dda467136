//go:build linux

package keeper

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/charliek/shed/internal/agent"
)

// request is the first message on a connection to a keeper, in the form of the agent's
// messages. Exactly one field is set; each is answered with a reply.
type request struct {
	Ready bool  `json:"ready,omitempty"` // answered when the shed is up, or has failed to be
	Watch bool  `json:"watch,omitempty"` // answered when the machine has ended
	Open  bool  `json:"open,omitempty"`  // after the reply, the connection is a stream to the agent
	Stop  *stop `json:"stop,omitempty"`  // answered when the machine has ended
}

// stop asks for the end of the machine: cleanly, and by force where that
// takes longer than Grace. With no grace it is killed at once.
type stop struct {
	Grace time.Duration `json:"grace"`
}

type reply struct {
	Error  string `json:"error,omitempty"`
	Exit   *Exit  `json:"exit,omitempty"`
	Forced bool   `json:"forced,omitempty"`
}

func (k *keeper) serve(l net.Listener, wg *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer conn.Close()
			k.answer(conn)
		})
	}
}

func (k *keeper) answer(conn net.Conn) {
	var req request
	if err := agent.ReadMessage(conn, &req); err != nil {
		return
	}
	var r reply
	switch {
	case req.Ready:
		<-k.ready
		k.mu.Lock()
		if k.bootErr != nil {
			r.Error = k.bootErr.Error()
		}
		k.mu.Unlock()
	case req.Watch:
		<-k.ended
		k.mu.Lock()
		r.Exit = &k.exit
		k.mu.Unlock()
	case req.Stop != nil:
		r.Forced = k.stop(req.Stop.Grace)
		k.mu.Lock()
		r.Exit = &k.exit
		k.mu.Unlock()
	case req.Open:
		if k.isAsked() {
			// A server that doesn't know of the stop is to find the shed stopped.
			<-k.ended
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), k.cfg.BootTimeout)
		stream, err := k.openWait(ctx)
		cancel()
		if err != nil {
			r.Error = err.Error()
			break
		}
		if agent.WriteMessage(conn, reply{}) != nil {
			stream.Reset()
			return
		}
		agent.Splice(stream, conn)
		return
	default:
		r.Error = "the keeper doesn't know this request: it may be older than the server"
	}
	agent.WriteMessage(conn, r)
}

func (k *keeper) open() (*agent.Stream, error) {
	k.mu.Lock()
	client := k.client
	k.mu.Unlock()
	if client == nil {
		return nil, errors.New("the shed's agent does not answer: stop and start the shed")
	}
	return client.Open(context.Background())
}

// openWait is open, but waits: the machine may be coming up, for the first time or again.
func (k *keeper) openWait(ctx context.Context) (*agent.Stream, error) {
	for {
		stream, err := k.open()
		if err == nil {
			return stream, nil
		}
		select {
		case <-time.After(openInterval):
		case <-k.ended:
			return nil, err
		case <-ctx.Done():
			return nil, err
		}
	}
}

const openInterval = 10 * time.Millisecond

// stop ends the machine and returns when it has ended, and whether force was needed.
func (k *keeper) stop(grace time.Duration) (forced bool) {
	k.mu.Lock()
	k.asked = true
	machine := k.machine
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if stream, err := k.openWait(ctx); err == nil && grace > 0 {
		if err := agent.Call(ctx, stream, agent.Request{PowerOff: &agent.PowerOff{}}); err != nil {
			k.log.Warn("asking the shed to power off", "err", err)
		} else {
			stream.Close()
			select {
			case <-k.ended:
				return false
			case <-ctx.Done():
			}
		}
	}
	if machine != nil {
		forced = true
		machine.Kill()
	}
	<-k.ended
	return forced
}
