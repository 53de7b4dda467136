//go:build linux

package keeper

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/vm"
)

// serveLink keeps the link to the agent. After the first time the guest may be in the middle of a
// session. It closes booted, unless that is closed, when the agent has answered.
func (k *keeper) serveLink(ctx context.Context, m vm.Machine, resync bool, booted chan struct{}) {
	select {
	case <-booted:
		booted = nil
	default:
	}
	var logged string // a failure that goes on is logged once
	for first := true; ctx.Err() == nil; first = false {
		client, err := k.connectAgent(ctx, m, resync || !first, booted == nil)
		if err != nil {
			var setup setupError
			if errors.As(err, &setup) && booted != nil {
				// The agent is there and can't make the machine the shed: waiting doesn't help.
				k.mu.Lock()
				k.setupErr = setup
				k.mu.Unlock()
				k.kill(m)
				return
			}
			if ctx.Err() == nil && err.Error() != logged && !errors.Is(err, vm.ErrLinkClosed) { // which has been logged
				logged = err.Error()
				k.log.Warn("the link to the agent", "err", err)
			}
			sleep(ctx, linkInterval)
			continue
		}
		logged = ""
		k.mu.Lock()
		k.client = client
		k.mu.Unlock()
		if booted != nil {
			// Of use only for as long as the machine runs: there is no need to sync it.
			if err := os.WriteFile(upFile, nil, 0o600); err != nil {
				k.log.Error("recording that the machine is up", "err", err)
			}
			close(booted)
			booted = nil
			k.setReady(nil)
		}
		k.keepClock(ctx, client, clockPoll, clockInterval)
		client.Close()
		k.mu.Lock()
		k.client = nil
		k.mu.Unlock()
	}
}

const linkInterval = 100 * time.Millisecond

const (
	clockInterval = time.Minute     // between two times that a machine is told the time
	clockPoll     = 5 * time.Second // between two looks at whether the host's clock has jumped, as when the host slept
	clockLimit    = 500 * time.Millisecond
)

// keepClock tells the agent the time every interval, and when the host's clock has jumped, until the link has ended,
// which it does when ctx is done.
func (k *keeper) keepClock(ctx context.Context, client *agent.Client, poll, interval time.Duration) {
	defer context.AfterFunc(ctx, func() { client.Close() })()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for told := time.Now(); ; {
		select {
		case <-client.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		jump := now.Round(0).Sub(told.Round(0)) - now.Sub(told)
		if now.Sub(told) < interval && jump.Abs() < clockLimit {
			continue
		}
		if err := k.tellTime(ctx, client); err != nil && ctx.Err() == nil {
			k.log.Warn("telling the shed the time", "err", err)
		}
		told = now
	}
}

func (k *keeper) tellTime(ctx context.Context, client *agent.Client) error {
	stream, err := client.Open(ctx)
	if err != nil {
		return err
	}
	now := agent.Clock{UnixNano: time.Now().UnixNano()}
	if err := agent.Call(ctx, stream, agent.Request{Clock: &now}); err != nil {
		return err
	}
	return stream.Close()
}

// connectAgent connects to the agent of a machine that may have been up already, and sets it up.
func (k *keeper) connectAgent(ctx context.Context, m vm.Machine, resync, up bool) (*agent.Client, error) {
	conn, err := m.DialLink(ctx)
	k.setAgentGone(up && errors.Is(err, vm.ErrLinkClosed))
	if err != nil {
		return nil, err
	}
	client, err := agent.Connect(ctx, conn, resync)
	if err != nil {
		return nil, err
	}
	setup := k.cfg.Setup
	setup.Clock = agent.Clock{UnixNano: time.Now().UnixNano()}
	stream, err := client.Open(ctx)
	if err == nil {
		err = agent.Call(ctx, stream, agent.Request{Setup: &setup})
	}
	if err != nil {
		client.Close()
		return nil, setupError{err}
	}
	stream.Close()
	return client, nil
}

// setupError is what the agent says went wrong in making the machine the shed.
type setupError struct{ error }

func (e setupError) Unwrap() error { return e.error }

func (k *keeper) setAgentGone(gone bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case !gone:
		k.agentGone = time.Time{}
	case k.agentGone.IsZero():
		k.agentGone = time.Now()
		k.log.Warn("the shed's agent has closed the link")
	}
}

// agentPatience is how long an agent may be gone before it counts as ended.
const agentPatience = 3 * time.Second

var errAgentEnded = errors.New("the shed's agent has ended: stop and start the shed")

func (k *keeper) open(ctx context.Context) (*agent.Stream, error) {
	k.mu.Lock()
	client, gone := k.client, k.agentGone
	k.mu.Unlock()
	switch {
	case client != nil:
		return client.Open(ctx)
	case !gone.IsZero() && time.Since(gone) >= agentPatience:
		return nil, errAgentEnded
	}
	return nil, errors.New("the shed's agent does not answer: stop and start the shed")
}

// openWait is open, but waits: the machine may be coming up, for the first time or again. It
// doesn't wait for an agent that has ended.
func (k *keeper) openWait(ctx context.Context) (*agent.Stream, error) {
	for {
		stream, err := k.open(ctx)
		if err == nil || errors.Is(err, errAgentEnded) {
			return stream, err
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
