//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// request is the first message on a connection to a keeper, in the form of the agent's
// messages. Exactly one field is set; each is answered with a reply.
type request struct {
	Ping  bool  `json:"ping,omitempty"`  // answered at once
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
	Error  string    `json:"error,omitempty"`
	Code   shed.Code `json:"code,omitempty"` // of the error, if the agent gave it one
	Exit   *Exit     `json:"exit,omitempty"`
	Forced string    `json:"forced_because,omitempty"` // why a Stop ended the machine by force
}

// serve answers requests until l is closed, with a goroutine of wg for each. When ctx is done,
// all connections are closed.
func (k *keeper) serve(ctx context.Context, l net.Listener, wg *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
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
	case req.Ping:
	case req.Ready:
		<-k.ready
		k.mu.Lock()
		if k.bootErr != nil {
			r.Error, r.Code = k.bootErr.Error(), agent.ReplyCode(k.bootErr)
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

// stop ends the machine and returns when it has ended, and why that took force, if it did.
func (k *keeper) stop(grace time.Duration) (forced string) {
	k.mu.Lock()
	k.asked = true
	k.mu.Unlock()
	// Where the machine is frozen, asking it may last until it has ended, whatever ctx says.
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	forced = "it was ended by force"
	if grace > 0 {
		forced = fmt.Sprintf("it did not shut down within %v and was ended by force", grace)
		agentEnded := make(chan struct{})
		asking.Go(func() {
			if errors.Is(k.askPowerOff(ctx), errAgentEnded) {
				close(agentEnded)
			}
		})
		select {
		case <-k.ended:
			return ""
		case <-agentEnded:
			forced = "its agent has ended, so it was ended by force"
		case <-ctx.Done():
		}
	}
	k.mu.Lock()
	k.force = true // a machine that comes only now is ended too
	machine := k.machine
	k.mu.Unlock()
	if machine != nil {
		k.kill(machine)
	}
	<-k.ended
	return forced
}

// shutdownGrace is less than the 90 seconds after which systemd kills what a host's shutdown hasn't ended.
const shutdownGrace = 60 * time.Second

// stopWhenDone stops the machine when ctx is done, and returns when it has ended.
func (k *keeper) stopWhenDone(ctx context.Context) {
	select {
	case <-k.ended:
		return
	case <-ctx.Done():
	}
	k.mu.Lock()
	k.signaled = !k.asked
	k.mu.Unlock()
	k.log.Info("told to end: the machine is shut down")
	if forced := k.stop(shutdownGrace); forced != "" {
		k.log.Warn("the machine was told to shut down", "forced", forced)
	}
}

// askPowerOff returns when the shed has been asked to power off.
func (k *keeper) askPowerOff(ctx context.Context) error {
	for {
		stream, err := k.openWait(ctx)
		if err != nil {
			return err
		}
		if err = agent.Call(ctx, stream, agent.Request{PowerOff: &agent.PowerOff{}}); err == nil {
			return stream.Close()
		}
		k.log.Warn("asking the shed to power off", "err", err)
		if !sleep(ctx, linkInterval) {
			return err
		}
	}
}
