package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/client"
	"github.com/spf13/cobra"
)

func newAttach(c *cli) *cobra.Command {
	at := shed.Attach{}
	var fresh bool
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Open a session in a shed, which goes on when you leave it",
		Long: `Open a session in a shed, which is started if it is stopped.

A session is a terminal with a name. It is made if it isn't there, and what
runs in it goes on when you leave it, with Ctrl-B D, or lose the connection.
Then attach says so and tries again until it is back where it was; Ctrl-C
gives up. Any number of terminals can show one session.

The exit code is 0 when you left the session or it ended, and 255 where shed
itself failed.`,
		Example: `  shed attach web
  shed attach web -S agent
  shed attach web --new`,
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if err := c.needsTerminal(cmd, args[0]); err != nil {
			return err
		}
		return at.Validate()
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		c.failure = exitExec
		if fresh {
			at.Mode = shed.AttachNew
		}
		t, err := c.resolve(ctx, args[0])
		if err != nil {
			return err
		}
		a := &attachment{cli: c, ref: args[0], t: t, at: at}
		if fresh && !cmd.Flags().Changed("session") {
			return a.run(ctx, a.openUnnamed)
		}
		return a.run(ctx, a.open)
	})
	f := cmd.Flags()
	f.StringVarP(&at.Session, "session", "S", shed.DefaultSession, "`name` of the session")
	f.BoolVar(&fresh, "new", false, "make a session; without --session its name is default, 2, 3 or so on")
	cmd.RegisterFlagCompletionFunc("session", c.completeSessions)
	return cmd
}

// Pauses between two attempts to come back. They grow from the first to the last.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 2 * time.Second
)

const (
	// attemptLimit is how long an attempt may take: one that began while there was no network may never end.
	attemptLimit = 10 * time.Second
	// endLimit is how long it may take to find out why a session ended.
	endLimit = 2 * time.Second
)

// attachment is this program's terminal at a session of a shed, over any number of connections.
type attachment struct {
	*cli
	ref    string // as the user named the shed
	t      target
	at     shed.Attach
	tty    *shed.TTY // as the shed was last told
	keys   keyboard
	caught chan os.Signal
}

// run shows the session that open opens until it ends or is left.
func (a *attachment) run(ctx context.Context, open func(context.Context) (net.Conn, error)) error {
	caught, release := catchSignals()
	defer release()
	a.caught = caught
	conn, err := open(ctx)
	if err != nil {
		return err
	}
	restore, err := a.makeRaw()
	if err != nil {
		conn.Close()
		return err
	}
	defer restore()
	a.taken.Store(true)
	a.keys = startKeyboard(a.in)
	for {
		status, err := a.show(conn)
		if err == nil && status.Code == 0 {
			return a.checkShed(ctx)
		}
		// What drew on the terminal had no chance to leave it as it was.
		io.WriteString(a.out, saneTerminal)
		if err == nil {
			return a.failed(ctx, status)
		}
		var lost lostError
		if !errors.As(err, &lost) {
			return err
		}
		if conn, err = a.comeBack(ctx, lost); err != nil {
			return err
		}
	}
}

// open attaches to the session.
func (a *attachment) open(ctx context.Context) (net.Conn, error) {
	a.tty = a.newTTY()
	return a.t.client.Exec(ctx, a.t.name, shed.Command{Attach: &a.at, TTY: a.tty})
}

// openUnnamed makes a session with the first name that is free.
func (a *attachment) openUnnamed(ctx context.Context) (net.Conn, error) {
	for tried := ""; ; tried = a.at.Session {
		sessions, err := a.t.client.Sessions(ctx, a.t.name)
		if err != nil {
			return nil, err
		}
		a.at.Session = freeName(sessions)
		conn, err := a.open(ctx)
		// Somebody else may have taken it since.
		if shed.ErrorCode(err) != shed.CodeConflict || a.at.Session == tried {
			return conn, err
		}
	}
}

func freeName(sessions []shed.Session) string {
	taken := func(name string) bool {
		return slices.ContainsFunc(sessions, func(s shed.Session) bool { return s.Name == name })
	}
	name := shed.DefaultSession
	for n := 2; taken(name); n++ {
		name = strconv.Itoa(n)
	}
	return name
}

// show ties the terminal to a connection, which it closes, and returns how that ended, as relay.run does.
func (a *attachment) show(conn net.Conn) (shed.ExitStatus, error) {
	r := &relay{cli: a.cli, p: agent.NewProcess(conn), tty: a.tty, caught: a.caught}
	ended := make(chan struct{})
	var feeding sync.WaitGroup
	feeding.Go(func() { r.feed(&keyReader{keys: a.keys, ended: ended}) })
	status, err := r.run()
	close(ended)
	feeding.Wait()
	return status, err
}

// checkShed returns an error if it was not the user who ended the session, but the end of the shed.
func (a *attachment) checkShed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	sh, err := a.t.client.Get(ctx, a.t.name)
	if shed.ErrorCode(err) == shed.CodeNotFound || err == nil && sh.Status == shed.StatusDeleting {
		return shed.Errorf(shed.CodeNotFound, "shed %q was deleted", a.t.name)
	}
	if err == nil && sh.Status != shed.StatusRunning {
		return a.stopped(fmt.Errorf("shed %q is %s", sh.Name, sh.Status))
	}
	return nil
}

func (a *attachment) stopped(err error) error {
	return shed.Errorf(shed.CodeConflict, "%w, and with it what ran in it", err).
		WithHint("start it with a new session: shed attach %s", a.ref)
}

// failed returns the error for a terminal in the shed that ended with status.
func (a *attachment) failed(ctx context.Context, status shed.ExitStatus) error {
	if status.Error != "" {
		return shed.Errorf(shed.CodeCommand, "session %q of %s: %s", a.at.Session, a.ref, status.Error)
	}
	if err := a.checkShed(ctx); err != nil {
		return err
	}
	return shed.Errorf(shed.CodeCommand, "what showed session %q of %s ended with exit code %d", a.at.Session, a.ref, status.Code).
		WithHint("what still runs there: shed sessions %s", a.ref)
}

// comeBack says that the connection was lost, and attaches to the session again when that is
// possible. The error is an exitStatus if a key or a signal ended the wait for it.
func (a *attachment) comeBack(ctx context.Context, lost lostError) (net.Conn, error) {
	reason := error(lost)
	if err := errors.Unwrap(lost.error); err != nil {
		reason = err // without the words around it
	}
	a.keys.discard()
	a.message("\nshed: the connection to %s was lost: %s; trying again, Ctrl-C gives up", a.ref, reason)

	// Signals come by a.caught alone.
	ctx, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	var watching sync.WaitGroup
	watching.Go(func() { giveUp(a.watch(ctx)) })
	defer watching.Wait()
	defer giveUp(nil)

	a.at.Mode = shed.AttachJoin // what has ended meanwhile is not made anew
	said := ""
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		attempt, cancel := context.WithTimeout(ctx, attemptLimit)
		conn, err := a.open(attempt)
		cancel()
		if ctx.Err() != nil {
			if conn != nil {
				conn.Close()
			}
			return nil, context.Cause(ctx)
		}
		switch shed.ErrorCode(err) {
		case "":
			return conn, nil
		case shed.CodeNoSession:
			return nil, shed.Errorf(shed.CodeNoSession, "session %q of %s ended while the connection was lost", a.at.Session, a.ref)
		case shed.CodeConflict:
			if ended := a.checkShed(ctx); ended != nil {
				return nil, ended
			}
			return nil, a.stopped(err)
		case shed.CodeNotFound, shed.CodeInvalid, shed.CodeUnsupported:
			return nil, err
		}
		if errors.Is(err, client.ErrRefused) {
			return nil, err
		}
		if err.Error() != said {
			said = err.Error()
			a.message("shed: %s", said)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// watch returns what is to end the wait for a connection, once there is something, or nil when ctx is done.
// Other keys are dropped: who pressed them did not see where they would go.
func (a *attachment) watch(ctx context.Context) error {
	const ctrlC, ctrlD = "\x03", "\x04"
	for {
		select {
		case keys, ok := <-a.keys:
			if !ok || bytes.ContainsAny(keys, ctrlC+ctrlD) {
				a.message("shed: gave up; session %q of %s is left as it is", a.at.Session, a.ref)
				return exitStatus(exitExec)
			}
		case sig := <-a.caught:
			return exitStatus(128 + int(sig.(syscall.Signal)))
		case <-ctx.Done():
			return nil
		}
	}
}
