//go:build linux

package keeper

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/proclock"
	"github.com/charliek/shed/internal/vm"
)

// ErrNotRunning is returned where a shed has no keeper.
var ErrNotRunning = errors.New("the shed has no keeper")

// Client is the server's way to a keeper.
type Client struct{ run string }

// Start starts the keeper of the shed in dir, as program "keep dir". It returns when the
// keeper has been started, not when the shed is up: see Ready. A shed that has a keeper keeps that.
func Start(ctx context.Context, program, dir string, cfg Config) (*Client, error) {
	c := &Client{filepath.Join(dir, RunDir)}
	if err := os.MkdirAll(c.run, 0o700); err != nil {
		return nil, err
	}
	l, err := c.lock(ctx)
	if errors.Is(err, errKept) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	defer l.Close()
	// What is told of a run is nothing that an earlier one has left.
	for _, f := range []string{filepath.Join(dir, exitFile), filepath.Join(c.run, logFile)} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return c, c.spawn(record{Config: cfg, Program: program}, l)
}

// Resume starts a keeper for a machine that runs without one, with the same configuration, or finds
// the one that somebody else has started for it. It returns ErrNotRunning where no machine runs. With
// any other error, one may; the client is for that, and its keeper may come yet.
func Resume(ctx context.Context, program, dir string, driver vm.Driver) (*Client, error) {
	c := &Client{filepath.Join(dir, RunDir)}
	return c, c.takeOver(ctx, program, func() (bool, error) { return driver.Running(c.run) })
}

// replace ends a keeper that doesn't answer, and starts another one unless the machine has ended. It may
// be that somebody else does this first.
func (c *Client) replace(ctx context.Context) error {
	if err := killKeeper(c.run); err != nil {
		return err
	}
	err := c.takeOver(ctx, "", func() (bool, error) {
		_, ended := LastExit(filepath.Dir(c.run))
		return !ended, nil
	})
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	return err
}

// takeOver starts a keeper, unless there is one, for a machine that runs already: else that is ErrNotRunning. A
// program of "" is the one of the keeper before.
func (c *Client) takeOver(ctx context.Context, program string, runs func() (bool, error)) error {
	l, err := c.lock(ctx)
	switch {
	case errors.Is(err, errKept):
		return nil
	case errors.Is(err, os.ErrNotExist): // nothing has ever run there
		return ErrNotRunning
	case err != nil:
		return err
	}
	defer l.Close()
	if ok, err := runs(); err != nil {
		return err
	} else if !ok {
		return ErrNotRunning
	}
	rec, err := readRecord(c.run)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // without one the keeper ends, and its log says why
		return err
	}
	rec.Program, rec.Found = cmp.Or(program, rec.Program), true
	return c.spawn(rec, l)
}

// spawn starts a keeper, which inherits the lock.
func (c *Client) spawn(rec record, lock *os.File) error {
	if err := rec.write(c.run); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(c.run, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	os.Remove(filepath.Join(c.run, socketFile))
	cmd := exec.Command(rec.Program, "keep", filepath.Dir(c.run))
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, err := proclock.Start(cmd, lock); err != nil {
		return fmt.Errorf("starting the keeper: %w", err)
	}
	return nil
}

// Find returns the keeper that the shed in dir has, or ErrNotRunning.
func Find(dir string) (*Client, error) {
	c := &Client{filepath.Join(dir, RunDir)}
	held, err := locked(c.run)
	if err != nil {
		return nil, err
	}
	if !held {
		return nil, ErrNotRunning
	}
	return c, nil
}

// dial connects to the keeper, which may only just have been started.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	for {
		conn, err := vm.DialUnix(ctx, c.run, socketFile)
		if err == nil {
			return conn, nil
		}
		if held, err := locked(c.run); err != nil {
			return nil, err
		} else if !held {
			return nil, ErrNotRunning
		}
		if !sleep(ctx, time.Millisecond) {
			return nil, context.Cause(ctx)
		}
	}
}

// call sends a request and returns the connection after its reply.
func (c *Client) call(ctx context.Context, req request) (net.Conn, reply, error) {
	var r reply
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, r, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	if err = agent.WriteMessage(conn, req); err == nil {
		err = agent.ReadMessage(conn, &r)
	}
	if !stop() && ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if err != nil {
		err = fmt.Errorf("the keeper has gone: %w", errors.Join(ErrNotRunning, err))
	} else if r.Error != "" {
		err = coded(r.Code, r.Error)
	}
	if err != nil {
		conn.Close()
		return nil, r, err
	}
	return conn, r, nil
}

// coded is an error that a keeper had.
func coded(code shed.Code, text string) error {
	return shed.Errorf(cmp.Or(code, shed.CodeInternal), "%s", text)
}

// Ready returns nil when the shed is up, and an error when it failed to come up: with the code that
// the agent gave it, if it is the agent's.
func (c *Client) Ready(ctx context.Context) error {
	conn, _, err := c.call(ctx, request{Ready: true})
	if errors.Is(err, ErrNotRunning) {
		// It may have ended before it got to say why.
		if exit, ok := LastExit(filepath.Dir(c.run)); ok {
			return coded(exit.Code, describe(exit.Exit))
		}
		if said := vm.LastLines(filepath.Join(c.run, logFile), 0, 5); said != "" {
			return fmt.Errorf("its keeper ended: %s", said)
		}
	}
	if err != nil {
		return err
	}
	return conn.Close()
}

// Watch returns when the machine has ended. ErrNotRunning means that the keeper ended without a word.
func (c *Client) Watch(ctx context.Context) (Exit, error) {
	conn, r, err := c.call(ctx, request{Watch: true})
	if err != nil {
		return Exit{}, err
	}
	conn.Close()
	return *r.Exit, nil
}

// answerTimeout is how long a keeper may take to answer, and to end once its machine has. It is far
// more than it needs.
const answerTimeout = 10 * time.Second

var errNoAnswer = fmt.Errorf("the shed's keeper does not answer within %v", answerTimeout)

// Stop shuts the shed down, by force if it takes longer than grace, and waits for the
// keeper's end. It returns why force was needed, "" where it wasn't. A keeper that
// doesn't answer or is killed is replaced, and the next one stops the shed.
func (c *Client) Stop(ctx context.Context, grace time.Duration) (forced string, err error) {
	forced, err = c.stop(ctx, grace)
	if errors.Is(err, errNoAnswer) || errors.Is(err, ErrNotRunning) {
		if rerr := c.replace(ctx); rerr != nil {
			return "", fmt.Errorf("%w; it can't be replaced: %w", err, rerr)
		}
		forced, err = c.stop(ctx, grace)
	}
	if errors.Is(err, ErrNotRunning) {
		return "", nil
	}
	if errors.Is(err, errNoAnswer) {
		err = shed.Errorf(shed.CodeInternal, "%w", err).WithHint("the server may be overloaded: try again when it is not")
	}
	return forced, err
}

// stop is Stop with the keeper that there is. It returns errNoAnswer if that doesn't answer, and
// ErrNotRunning if there is none, or none any more.
func (c *Client) stop(ctx context.Context, grace time.Duration) (forced string, err error) {
	if err := c.ping(ctx); err != nil {
		return "", err
	}
	timed, cancel := context.WithTimeoutCause(ctx, grace+answerTimeout, errNoAnswer)
	defer cancel()
	conn, r, err := c.call(timed, request{Stop: &stop{Grace: grace}})
	if err != nil {
		return "", err
	}
	conn.Close()
	return r.Forced, c.waitEnd(ctx)
}

// ping returns nil if the keeper answers, whatever it says.
func (c *Client) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, errNoAnswer)
	defer cancel()
	conn, r, err := c.call(ctx, request{Ping: true})
	if conn != nil {
		conn.Close()
	}
	if r.Error != "" {
		return nil
	}
	return err
}

// waitEnd returns when no keeper runs.
func (c *Client) waitEnd(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, errNoAnswer)
	defer cancel()
	for {
		if held, err := locked(c.run); !held || err != nil {
			return err
		}
		if !sleep(ctx, time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// Open returns a stream to the shed's agent.
func (c *Client) Open(ctx context.Context) (net.Conn, error) {
	conn, _, err := c.call(ctx, request{Open: true})
	return conn, err
}

// LastExit returns how the last run of the shed in dir ended, if that is known.
func LastExit(dir string) (exit Exit, ok bool) {
	b, err := os.ReadFile(filepath.Join(dir, exitFile))
	return exit, err == nil && json.Unmarshal(b, &exit) == nil
}
