package preset

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/lines"
)

// stopGrace is how long mmdebstrap has to remove its tree when it is stopped.
const stopGrace = 20 * time.Second

// bootstrap is a running mmdebstrap. Reading it yields the tar of the
// tree; the end of the tar comes only when the program has succeeded, and else its error.
type bootstrap struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	stdout io.ReadCloser
	stderr *lines.Lines
	lower  *feeder // nil where there is nothing to start from
	waited bool
	err    error // of the program, once waited
}

// feeder writes the tree to start from to the program.
type feeder struct {
	pipe *os.File
	done chan error // gets the one result
}

// startBootstrap starts mmdebstrap with args, which end with the suite, and what env adds to the environment. lower, if not
// nil, writes a tar that the program gets as its descriptor 3. Once ctx is done, the
// program and its children are stopped. The caller must call stop in the end.
func startBootstrap(ctx context.Context, args, env []string, lower func(io.Writer) error, report func(message string)) (*bootstrap, error) {
	bin, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return nil, shed.Errorf(shed.CodeUnsupported, "mmdebstrap, which builds images, is not installed").
			WithHint("`apt-get install mmdebstrap`, on Debian")
	}
	ctx, cancel := context.WithCancel(ctx)
	b := &bootstrap{cancel: cancel, stderr: messages(report)}
	b.cmd = exec.CommandContext(ctx, bin, append(args, "-")...)
	b.cmd.Env = env
	if os.Getenv("TMPDIR") == "" {
		// The tree has several hundred MB, and /tmp may be in memory. The state directory won't
		// do: subordinate users must be able to get at the tree.
		b.cmd.Env = append(b.cmd.Env, "TMPDIR=/var/tmp")
	}
	b.cmd.Stderr = b.stderr.Writer()
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	b.cmd.WaitDelay = stopGrace
	if b.stdout, err = b.cmd.StdoutPipe(); err != nil {
		cancel()
		return nil, err
	}
	b.cmd.Cancel = func() error {
		// A descendant that keeps the pipe open must not keep its reader waiting.
		if f, ok := b.stdout.(*os.File); ok {
			f.SetReadDeadline(time.Now().Add(stopGrace))
		}
		return b.signal(syscall.SIGTERM)
	}
	if err := b.start(lower); err != nil {
		cancel()
		return nil, err
	}
	return b, nil
}

func (b *bootstrap) start(lower func(io.Writer) error) error {
	if lower == nil {
		return b.cmd.Start()
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	b.cmd.ExtraFiles = []*os.File{r}
	err = b.cmd.Start()
	r.Close()
	if err != nil {
		w.Close()
		return err
	}
	b.lower = &feeder{pipe: w, done: make(chan error, 1)}
	go func() {
		buf := bufio.NewWriterSize(w, 1<<20)
		err := lower(buf)
		if err == nil {
			err = buf.Flush()
		}
		w.Close()
		b.lower.done <- err
	}()
	return nil
}

// stop returns why the tree to start from could not be written, if that was not because nobody read it.
func (f *feeder) stop() error {
	f.pipe.Close() // what outlived the program may have the other end
	if err := <-f.done; !errors.Is(err, syscall.EPIPE) && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// signal sends sig to the program and all its children.
func (b *bootstrap) signal(sig syscall.Signal) error {
	err := syscall.Kill(-b.cmd.Process.Pid, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

func (b *bootstrap) Read(p []byte) (int, error) {
	n, err := b.stdout.Read(p)
	if errors.Is(err, io.EOF) {
		if werr := b.wait(); werr != nil {
			err = werr
		}
	}
	return n, err
}

func (b *bootstrap) wait() error {
	if b.waited {
		return b.err
	}
	err := b.cmd.Wait()
	b.waited = true
	if b.lower != nil {
		if b.err = b.lower.stop(); b.err != nil {
			b.signal(syscall.SIGKILL)
			return b.err
		}
	}
	if err == nil {
		return nil
	}
	b.signal(syscall.SIGKILL) // whatever outlived the program
	b.err = shed.Errorf(shed.CodeInternal, "mmdebstrap failed: %w: %s", err, b.stderr.Last()).
		WithHint("it needs Debian's mirrors, and without root the package uidmap and entries in /etc/subuid and /etc/subgid")
	return b.err
}

// stop ends the program if it still runs. failed is the error that reading it ended with, if any: then
// how the program ends says nothing new.
func (b *bootstrap) stop(failed error) error {
	defer b.cancel()
	if failed == nil {
		return b.wait()
	}
	b.cancel()
	b.stdout.Close()
	b.wait()
	return nil
}

// steps are what mmdebstrap says it does, and how it is reported. What else it says nobody needs to know.
var steps = map[string]string{
	"running apt-get update...":                          "reading the package lists",
	"downloading packages with apt...":                   "downloading packages",
	"extracting archives...":                             "unpacking the essential packages",
	"installing essential packages...":                   "installing the essential packages",
	"installing remaining packages inside the chroot...": "installing the other packages",
	"cleaning package lists and apt cache...":            "cleaning up",
	"creating tarball...":                                "packing the files",
}

// stepPrefix marks the lines with which our own hooks say what they do.
const stepPrefix = "shed: "

// lastLines is how much of what the program said its error has.
const lastLines = 12

// messages takes what the program says, and reports what it does.
func messages(report func(string)) *lines.Lines {
	return lines.New(lastLines, func(line string) {
		if step, ok := strings.CutPrefix(line, stepPrefix); ok {
			report(step)
		} else if step, ok := steps[strings.TrimPrefix(line, "I: ")]; ok {
			report(step)
		}
	})
}
