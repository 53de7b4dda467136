package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"golang.org/x/term"
)

const copyBuffer = 64 << 10

// signals are those that are passed on to a command, by the names it gets.
var signals = map[os.Signal]string{
	syscall.SIGINT: "INT", syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP", syscall.SIGQUIT: "QUIT",
}

// runCommand runs cmd in the shed that ref names, between this program's
// streams, and returns how it ended as an exitStatus.
func (c *cli) runCommand(ctx context.Context, ref string, cmd shed.Command, tty, interactive bool) error {
	t, err := c.resolve(ctx, ref)
	if err != nil {
		return err
	}
	stdinFD, stdinTTY := terminal(c.in)
	if tty {
		cmd.TTY = c.newTTY()
	}

	// From here on a signal is the command's. SIGPIPE would end this program
	// before it could give the terminal back; as an error it is dealt with below.
	caught := make(chan os.Signal, 16)
	for sig := range signals {
		signal.Notify(caught, sig)
	}
	defer signal.Stop(caught)
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)

	conn, err := t.client.Exec(ctx, t.name, cmd)
	if err != nil {
		return err
	}
	p := agent.NewProcess(conn)
	defer p.Close()
	if tty && stdinTTY {
		// Only now: until here Ctrl-C has to end this program.
		saved, err := term.MakeRaw(stdinFD)
		if err != nil {
			return fmt.Errorf("the terminal: %w", err)
		}
		defer term.Restore(stdinFD, saved)
	}
	a := &attachment{cli: c, p: p, tty: tty, caught: caught}
	return a.run(interactive || tty || !stdinTTY)
}

// newTTY describes the terminal that this program runs in.
func (c *cli) newTTY() *shed.TTY {
	tty := &shed.TTY{Term: os.Getenv("TERM"), Size: shed.Size{Rows: 24, Cols: 80}}
	if tty.Term == "" {
		tty.Term = "xterm"
	}
	if size, ok := c.windowSize(); ok {
		tty.Size = size
	}
	return tty
}

func (c *cli) windowSize() (shed.Size, bool) {
	for _, stream := range []any{c.in, c.out, c.err} {
		if fd, ok := terminal(stream); ok {
			if cols, rows, err := term.GetSize(fd); err == nil && rows > 0 && cols > 0 {
				return shed.Size{Rows: uint16(rows), Cols: uint16(cols)}, true
			}
		}
	}
	return shed.Size{}, false
}

// attachment ties a command in a shed to this program's streams and signals.
type attachment struct {
	*cli
	p      shed.Process
	tty    bool
	caught chan os.Signal
}

func (a *attachment) run(passStdin bool) error {
	stopSignals := a.forwardSignals()
	defer stopSignals()
	// The goroutine that reads stdin isn't waited for: a read can't be
	// interrupted, and the program is about to end when the command has.
	go a.feed(passStdin)

	var output sync.WaitGroup
	var outErr, errErr error
	output.Go(func() { outErr = a.drain(a.out, a.p.Stdout()) })
	output.Go(func() { errErr = a.drain(a.err, a.p.Stderr()) })
	output.Wait()
	status, err := a.p.Wait()
	a.p.Close() // so that no signal that is on its way is stuck
	if sig := stopSignals(); sig != nil {
		return exitStatus(128 + int(sig.(syscall.Signal)))
	}
	for _, err := range []error{outErr, errErr} {
		if errors.Is(err, syscall.EPIPE) {
			return exitStatus(128 + int(syscall.SIGPIPE)) // as for any program in a pipeline
		}
	}
	// Of two errors, a closed pipe is what the other one led to.
	for _, err := range []error{outErr, errErr} {
		if err != nil && !errors.Is(err, io.ErrClosedPipe) {
			return err
		}
	}
	if err != nil {
		return err
	}
	if status.Error != "" {
		a.message("shed: %s", status.Error)
	}
	return exitStatus(status.Code)
}

// drain copies what the command writes to w. If w fails, the command is let go.
func (a *attachment) drain(w io.Writer, r io.Reader) error {
	// The wrapper hides os.File's ReadFrom, which would use a smaller buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{w}, r, make([]byte, copyBuffer))
	if err != nil {
		a.p.Close()
	}
	return err
}

func (a *attachment) feed(pass bool) {
	stdin := a.p.Stdin()
	if pass {
		io.CopyBuffer(stdin, struct{ io.Reader }{a.in}, make([]byte, copyBuffer))
	}
	stdin.Close()
}

// lastSignal is the signal that lets a command go which did not end on those before: its machine may be frozen.
const lastSignal = 3

// forwardSignals passes signals and sizes on to the command until stop is
// called. In a terminal, keys make the command's signals; one that comes from
// elsewhere lets the command go, as any third one does, and stop returns it.
func (a *attachment) forwardSignals() (stop func() os.Signal) {
	resized := make(chan os.Signal, 1)
	if a.tty {
		signal.Notify(resized, syscall.SIGWINCH)
	}
	quit, done := make(chan struct{}), make(chan struct{})
	var ended os.Signal
	var sending sync.WaitGroup // each may be stuck until the command is let go
	go func() {
		defer close(done)
		defer sending.Wait()
		for count := 0; ; {
			select {
			case <-resized:
				if size, ok := a.windowSize(); ok {
					sending.Go(func() { a.p.Resize(size) })
				}
			case sig := <-a.caught:
				if count++; !a.tty && count < lastSignal {
					sending.Go(func() { a.p.Signal(signals[sig]) })
				} else if ended == nil {
					ended = sig
					a.p.Close()
				}
			case <-quit:
				return
			}
		}
	}()
	var once sync.Once
	return func() os.Signal {
		once.Do(func() {
			signal.Stop(resized)
			close(quit)
			<-done
		})
		return ended
	}
}
