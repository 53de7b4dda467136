//go:build linux

package engine

import (
	"context"
	"net"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
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
	return e.call(ctx, name, !at.NoStart, req, shed.CodeConnect)
}

// call makes a request of a shed's agent, and returns the stream once it is granted. What the
// agent refuses has the code refused. See open for start.
func (e *Engine) call(ctx context.Context, name string, start bool, req agent.Request, refused shed.Code) (net.Conn, error) {
	_, conn, err := e.open(ctx, name, start)
	if err != nil {
		return nil, err
	}
	if err := agent.Call(ctx, conn, req); err != nil {
		if ctx.Err() == nil {
			err = shed.Errorf(refused, "in shed %q: %w", name, err)
		}
		return nil, err
	}
	return conn, nil
}
