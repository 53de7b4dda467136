package build

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/lines"
)

// lastLines is how much of what a command said an error has.
const lastLines = 6

// run runs the commands of one build in the builder, as root.
type run struct {
	ctx   context.Context
	sheds shed.Sheds
	dir   string // of the build's files, in the builder
}

// run runs a command. The error of one that fails has the end of what it said.
func (r run) run(stdin io.Reader, stdout io.Writer, args ...string) error {
	if stdout == nil {
		stdout = io.Discard
	}
	said := lines.New(lastLines, nil)
	status, err := r.stream(stdin, stdout, said.Writer(), args...)
	if err != nil {
		return err
	}
	if status.Code != 0 {
		return shed.Errorf(shed.CodeInternal, "%s in shed %s: exit status %d: %s%s", args[0], Shed, status.Code, status.Error, said.Last())
	}
	return nil
}

// stream runs a command and returns how it ended, with all that it wrote copied. A stdin that fails ends the command.
func (r run) stream(stdin io.Reader, stdout, stderr io.Writer, args ...string) (shed.ExitStatus, error) {
	conn, err := r.sheds.Exec(r.ctx, Shed, shed.Command{Args: args, User: "root", Dir: "/"})
	if err != nil {
		return shed.ExitStatus{}, err
	}
	stop := context.AfterFunc(r.ctx, func() { conn.Close() })
	defer stop()
	p := agent.NewProcess(conn)
	defer p.Close()
	var wg sync.WaitGroup
	var outErr, errErr error
	wg.Go(func() { _, outErr = io.Copy(stdout, p.Stdout()) })
	wg.Go(func() { _, errErr = io.Copy(stderr, p.Stderr()) })
	var inErr error
	if stdin != nil {
		in := &source{Reader: stdin}
		io.Copy(p.Stdin(), in) // a command may well end before it has read all
		if in.err != nil {
			inErr = in.err
			p.Close() // a half must not look like the whole
		}
	}
	p.Stdin().Close()
	wg.Wait()
	status, err := p.Wait()
	if r.ctx.Err() != nil {
		return status, r.ctx.Err()
	}
	if inErr != nil {
		return status, inErr
	}
	return status, errors.Join(err, outErr, errErr)
}

// source remembers the error of its Reader.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(b []byte) (int, error) {
	n, err := s.Reader.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

func (r run) write(content io.Reader, file string) error {
	return r.run(content, nil, "sh", "-c", `cat >"$1"`, "sh", file)
}

// read copies a file, whose size is limited, to w.
func (r run) read(file string, limit int64, w io.Writer) error {
	return r.run(nil, &limitedWriter{w: w, left: limit}, "cat", file)
}

type limitedWriter struct {
	w    io.Writer
	left int64
}

func (l *limitedWriter) Write(b []byte) (int, error) {
	if l.left -= int64(len(b)); l.left < 0 {
		return 0, errors.New("the file is too large")
	}
	return l.w.Write(b)
}

// open runs a command and yields its output as it comes. Closing the reader early ends the command.
func (r run) open(ctx context.Context, args ...string) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	o := &output{PipeReader: pr, cancel: cancel, done: make(chan struct{})}
	r.ctx = ctx
	go func() {
		defer close(o.done)
		pw.CloseWithError(r.run(nil, pw, args...))
	}()
	return o
}

type output struct {
	*io.PipeReader
	cancel context.CancelFunc
	done   chan struct{}
}

func (o *output) Close() error {
	o.cancel()
	o.PipeReader.Close()
	<-o.done
	return nil
}
