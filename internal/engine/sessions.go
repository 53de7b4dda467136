//go:build linux

package engine

import (
	"cmp"
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// sessionsTimeout is how long all sheds together are waited for: one may be frozen.
const sessionsTimeout = 5 * time.Second

func (e *Engine) Sessions(ctx context.Context, name string) ([]shed.Session, error) {
	sh, err := e.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if sh.Status != shed.StatusRunning {
		return nil, nil
	}
	conn, err := e.call(ctx, name, false, agent.Request{Sessions: &agent.Sessions{}}, shed.CodeInternal)
	if shed.ErrorCode(err) == shed.CodeConflict { // it has just stopped
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var sessions []shed.Session
	if err := agent.ReadMessage(conn, &sessions); err != nil {
		return nil, shed.Errorf(shed.CodeInternal, "the sessions of shed %q: %w", name, err)
	}
	for i := range sessions {
		sessions[i].Shed = name
	}
	slices.SortFunc(sessions, func(a, b shed.Session) int { return cmp.Compare(a.Name, b.Name) })
	return sessions, nil
}

func (e *Engine) AllSessions(ctx context.Context) (shed.SessionList, error) {
	var all shed.SessionList
	sheds, err := e.List(ctx)
	if err != nil {
		return all, err
	}
	limited, cancel := context.WithTimeout(ctx, sessionsTimeout)
	defer cancel()
	answers := make([][]shed.Session, len(sheds))
	errs := make([]error, len(sheds))
	var asked sync.WaitGroup
	for i, sh := range sheds {
		asked.Go(func() { answers[i], errs[i] = e.Sessions(limited, sh.Name) })
	}
	asked.Wait()
	for i, sh := range sheds {
		all.Sessions = append(all.Sessions, answers[i]...)
		if errs[i] != nil && shed.ErrorCode(errs[i]) != shed.CodeNotFound { // deleted meanwhile
			reason := errs[i].Error()
			if limited.Err() != nil {
				reason = "no answer within " + sessionsTimeout.String()
			}
			all.Unanswered = append(all.Unanswered, shed.Unanswered{Shed: sh.Name, Reason: reason})
		}
	}
	return all, ctx.Err()
}

func (e *Engine) KillSession(ctx context.Context, name, session string) error {
	if err := shed.ValidateSession(session); err != nil {
		return err
	}
	sh, err := e.Get(ctx, name)
	if err != nil {
		return err
	}
	if sh.Status != shed.StatusRunning {
		return noSession(name, session)
	}
	conn, err := e.call(ctx, name, false, agent.Request{KillSession: &agent.KillSession{Name: session}}, shed.CodeInternal)
	if err != nil {
		if agent.ReplyCode(err) == shed.CodeNoSession || shed.ErrorCode(err) == shed.CodeConflict { // it has just stopped
			return noSession(name, session)
		}
		return err
	}
	return conn.Close()
}

func noSession(name, session string) error {
	return shed.Errorf(shed.CodeNoSession, "shed %q has no session %q", name, session).
		WithHint("`shed sessions %s` lists those that there are", name)
}

// attach is Exec of a session.
func (e *Engine) attach(ctx context.Context, name string, cmd shed.Command) (net.Conn, error) {
	join := cmd.Attach.Mode == shed.AttachJoin
	if join {
		// A shed that is about to stop isn't waited for.
		sh, err := e.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		if sh.Status != shed.StatusRunning {
			return nil, shed.Errorf(shed.CodeConflict, "shed %q is %s", name, sh.Status)
		}
	}
	rec, conn, err := e.open(ctx, name, !join)
	if err != nil {
		return nil, err
	}
	if err := e.execOn(ctx, conn, rec, cmd); err != nil {
		switch agent.ReplyCode(err) {
		case shed.CodeNoSession:
			return nil, noSession(name, cmd.Attach.Session)
		case shed.CodeConflict:
			return nil, shed.Errorf(shed.CodeConflict, "shed %q has a session %q", name, cmd.Attach.Session).
				WithHint("attach to it without --new, or name another one with --session")
		}
		return nil, err
	}
	return conn, nil
}
