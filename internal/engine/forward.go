//go:build linux

package engine

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/keeper"
)

func (e *Engine) Dial(ctx context.Context, name string, to shed.Endpoint) (net.Conn, error) {
	return e.request(ctx, name, to, agent.Request{Dial: &to})
}

func (e *Engine) Listen(ctx context.Context, name string, on shed.Endpoint) (net.Conn, error) {
	return e.request(ctx, name, on, agent.Request{Listen: &on})
}

// request makes a request about an address of the agent of a running shed, and returns the stream
// once it is granted.
func (e *Engine) request(ctx context.Context, name string, at shed.Endpoint, req agent.Request) (net.Conn, error) {
	if err := at.Validate(); err != nil {
		return nil, err
	}
	for tries := 0; ; tries++ {
		_, client, err := e.running(ctx, name)
		if err != nil {
			return nil, err
		}
		conn, err := client.Open(ctx)
		if err == nil {
			if err = agent.Call(ctx, conn, req); err == nil {
				return conn, nil
			}
			if ctx.Err() == nil {
				err = shed.Errorf(shed.CodeConnect, "in shed %q: %w", name, err)
			}
			return nil, err
		}
		if tries > 2 || ctx.Err() != nil || !errors.Is(err, keeper.ErrNotRunning) {
			return nil, err
		}
		// It has just stopped, or its keeper is being replaced.
		time.Sleep(50 * time.Millisecond)
	}
}
