package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/spf13/cobra"
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
	_, stdinTTY := terminal(c.in)
	if tty {
		cmd.TTY = c.newTTY()
	}
	caught, release := catchSignals()
	defer release()
	conn, err := t.client.Exec(ctx, t.name, cmd)
	if err != nil {
		return err
	}
	r := &relay{cli: c, p: agent.NewProcess(conn), tty: cmd.TTY, caught: caught}
	defer r.p.Close()
	if tty && stdinTTY {
		// Only now: until here Ctrl-C has to end this program.
		restore, err := c.makeRaw()
		if err != nil {
			return err
		}
		defer restore()
	}
	stdin := c.in
	if !interactive && !tty && stdinTTY {
		stdin = strings.NewReader("")
	}
	// The goroutine that reads stdin isn't waited for: a read can't be
	// interrupted, and the program is about to end when the command has.
	go r.feed(stdin)
	status, err := r.run()
	if err != nil {
		return err
	}
	if status.Error != "" {
		c.message("shed: %s", status.Error)
	}
	return exitStatus(status.Code)
}

// needsTerminal returns an error unless stdin is a terminal, in which cmd shows the shed that ref names.
func (c *cli) needsTerminal(cmd *cobra.Command, ref string) error {
	if err := refuseJSON(c, cmd, "it is for people"); err != nil {
		return err
	}
	if _, ok := terminal(c.in); !ok {
		return shed.Errorf(shed.CodeInvalid, "%s needs a terminal", cmd.CommandPath()).
			WithHint("run a command with: shed exec %s CMD", ref)
	}
	return nil
}

// catchSignals makes signals the command's, from now on until release is called. SIGPIPE, which
// would end this program before it could give the terminal back, becomes an error of a write.
func catchSignals() (caught chan os.Signal, release func()) {
	caught = make(chan os.Signal, 16)
	for sig := range signals {
		signal.Notify(caught, sig)
	}
	signal.Ignore(syscall.SIGPIPE)
	return caught, func() {
		signal.Stop(caught)
		signal.Reset(syscall.SIGPIPE)
	}
}

// makeRaw has the terminal on stdin pass on everything as it is, and messages still begin at the
// left. restore makes it what it was.
func (c *cli) makeRaw() (restore func(), err error) {
	fd, _ := terminal(c.in)
	saved, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("the terminal: %w", err)
	}
	stderr := c.err
	c.redirectMessages(rawWriter{stderr})
	return func() {
		term.Restore(fd, saved)
		c.redirectMessages(stderr)
	}, nil
}

// redirectMessages makes w stderr.
func (c *cli) redirectMessages(w io.Writer) {
	c.messages.Lock()
	defer c.messages.Unlock()
	c.err = w
}

// rawWriter writes lines to a raw terminal.
type rawWriter struct{ w io.Writer }

func (r rawWriter) Write(p []byte) (int, error) {
	if _, err := r.w.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n"))); err != nil {
		return 0, err
	}
	return len(p), nil
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

// relay ties a command in a shed to this program's output and signals.
type relay struct {
	*cli
	p      shed.Process
	tty    *shed.TTY // as the command got it; nil if it has none
	caught chan os.Signal
}

// lostError is the end of a command's connection without the end of the command.
type lostError struct{ error }

func (e lostError) Unwrap() error { return e.error }

// run returns how the command ended. Where a signal ended this instead, the error is an
// exitStatus; where the connection did, a lostError.
func (r *relay) run() (shed.ExitStatus, error) {
	stopSignals := r.forwardSignals()
	defer stopSignals()
	var output sync.WaitGroup
	var outErr, errErr error
	output.Go(func() { outErr = r.drain(r.out, r.p.Stdout()) })
	output.Go(func() { errErr = r.drain(r.err, r.p.Stderr()) })
	output.Wait()
	status, err := r.p.Wait()
	r.p.Close() // so that no signal that is on its way is stuck
	if sig := stopSignals(); sig != nil {
		return status, exitStatus(128 + int(sig.(syscall.Signal)))
	}
	for _, err := range []error{outErr, errErr} {
		if errors.Is(err, syscall.EPIPE) {
			return status, exitStatus(128 + int(syscall.SIGPIPE)) // as for any program in a pipeline
		}
	}
	// What reading failed with is err too, and a closed pipe is what another error led to.
	for _, outputErr := range []error{outErr, errErr} {
		if outputErr != nil && !errors.Is(outputErr, err) && !errors.Is(outputErr, io.ErrClosedPipe) {
			return status, outputErr
		}
	}
	if err != nil {
		return status, lostError{err}
	}
	return status, nil
}

// drain copies what the command writes. If that fails, the command is let go.
func (r *relay) drain(to io.Writer, from io.Reader) error {
	// The wrapper hides os.File's ReadFrom, which would use a smaller buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, from, make([]byte, copyBuffer))
	if err != nil {
		r.p.Close()
	}
	return err
}

// feed gives the command stdin and then its end.
func (r *relay) feed(stdin io.Reader) {
	w := r.p.Stdin()
	io.CopyBuffer(w, struct{ io.Reader }{stdin}, make([]byte, copyBuffer))
	w.Close()
}

// lastSignal is the signal that lets a command go which did not end on those before: its machine may be frozen.
const lastSignal = 3

// forwardSignals passes signals and sizes on to the command until stop is
// called. In a terminal, keys make the command's signals; one that comes from
// elsewhere lets the command go, as any third one does, and stop returns it.
func (r *relay) forwardSignals() (stop func() os.Signal) {
	quit, done := make(chan struct{}), make(chan struct{})
	var ended os.Signal
	var sending sync.WaitGroup // each may be stuck until the command is let go
	if r.tty != nil {
		sending.Go(func() { r.followSize(quit) })
	}
	go func() {
		defer close(done)
		defer sending.Wait()
		for count := 0; ; {
			select {
			case sig := <-r.caught:
				if count++; r.tty == nil && count < lastSignal {
					sending.Go(func() { r.p.Signal(signals[sig]) })
				} else if ended == nil {
					ended = sig
					r.p.Close()
				}
			case <-quit:
				return
			}
		}
	}()
	var once sync.Once
	return func() os.Signal {
		once.Do(func() {
			close(quit)
			<-done
		})
		return ended
	}
}

// followSize tells the command each new size of the terminal, in order, until quit is closed.
func (r *relay) followSize(quit <-chan struct{}) {
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	for told := r.tty.Size; ; {
		// It may have changed already while the command was being started.
		if size, ok := r.windowSize(); ok && size != told {
			told = size
			if r.p.Resize(size) != nil {
				return // as the command's end
			}
		}
		select {
		case <-resized:
		case <-quit:
			return
		}
	}
}
