//go:build linux

package keeper

import (
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

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/vm"
)

// ErrNotRunning is returned where a shed has no keeper.
var ErrNotRunning = errors.New("the shed has no keeper")

// Client is the server's way to a keeper.
type Client struct{ run string }

// Start starts the keeper of the shed in dir, as program "keep dir". It returns when the
// keeper has been started, not when the shed is up: see Ready.
func Start(program, dir string, cfg Config) (*Client, error) {
	run := filepath.Join(dir, RunDir)
	if err := os.MkdirAll(run, 0o700); err != nil {
		return nil, err
	}
	l, err := lock(run)
	if err != nil {
		return nil, fmt.Errorf("the shed already has a keeper: %w", err)
	}
	defer l.Close()
	if err := os.Remove(filepath.Join(dir, exitFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return spawn(record{Config: cfg, Program: program}, dir, l)
}

// Resume starts a keeper for a machine that runs without one, with the same configuration, or returns
// the one that somebody else has started for it. It returns ErrNotRunning where no machine runs.
func Resume(ctx context.Context, program, dir string, driver vm.Driver) (*Client, error) {
	run := filepath.Join(dir, RunDir)
	if _, err := os.Stat(run); err != nil {
		return nil, ErrNotRunning
	}
	l, err := lock(run)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &Client{run}, nil
	}
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if !driver.Running(run) {
		return nil, ErrNotRunning
	}
	rec, err := readRecord(run)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // without one the keeper ends, and its log says why
		return nil, err
	}
	rec.Program, rec.Found = program, true
	return spawn(rec, dir, l)
}

// replace ends a keeper that doesn't answer, and starts another one unless the machine has ended. It may
// be that somebody else does this first.
func (c *Client) replace() error {
	if err := killKeeper(c.run); err != nil {
		return err
	}
	l, err := lock(c.run)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	dir := filepath.Dir(c.run)
	if _, ended := LastExit(dir); ended {
		return nil
	}
	rec, err := readRecord(c.run)
	if err != nil {
		return err
	}
	rec.Found = true
	_, err = spawn(rec, dir, l)
	return err
}

// spawn starts a keeper in dir, which inherits the lock.
func spawn(rec record, dir string, lock *os.File) (*Client, error) {
	run := filepath.Join(dir, RunDir)
	if err := rec.write(run); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(run, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	os.Remove(filepath.Join(run, socketFile))
	cmd := exec.Command(rec.Program, "keep", dir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock} // lockFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the keeper: %w", err)
	}
	// It is ours to bury as long as we live.
	go cmd.Wait()
	return &Client{run}, nil
}

// Find returns the keeper that the shed in dir has, or ErrNotRunning.
func Find(dir string) (*Client, error) {
	run := filepath.Join(dir, RunDir)
	if !locked(run) {
		return nil, ErrNotRunning
	}
	return &Client{run}, nil
}

// dial connects to the keeper, which may only just have been started.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	for {
		conn, err := vm.DialUnix(ctx, c.run, socketFile)
		if err == nil {
			return conn, nil
		}
		if !locked(c.run) {
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
		err = errors.New(r.Error)
	}
	if err != nil {
		conn.Close()
		return nil, r, err
	}
	return conn, r, nil
}

// Ready returns nil when the shed is up, and an error when it failed to come up.
func (c *Client) Ready(ctx context.Context) error {
	conn, _, err := c.call(ctx, request{Ready: true})
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
		if rerr := c.replace(); rerr != nil {
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
	for locked(c.run) {
		if !sleep(ctx, time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return nil
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
