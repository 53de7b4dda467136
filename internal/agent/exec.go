package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/charliek/shed"
)

// FrameType is the first byte of a frame of the exec protocol.
type FrameType byte

// A frame is its type, a 4-byte big-endian length and the payload. To the command go
// stdin, its end, sizes (JSON of shed.Size) and signals (a name); from it
// come stdout, stderr and, last, how it ended (JSON of shed.ExitStatus).
// Whoever closes the stream before that ends the command.
//
// A command that doesn't read its stdin must not keep signals and sizes from it. So at most
// StdinWindow bytes of stdin may be under way: the guest's side sends FrameStdinAck with the
// number of bytes (4-byte big-endian) that the command has taken since the last one.
const (
	FrameStdin    FrameType = 0
	FrameStdinEOF FrameType = 1
	FrameResize   FrameType = 2
	FrameSignal   FrameType = 3
	FrameStdout   FrameType = 16
	FrameStderr   FrameType = 17
	FrameExit     FrameType = 18
	FrameStdinAck FrameType = 19
)

// StdinWindow is how much stdin may be sent before it is acknowledged, in bytes.
const StdinWindow = 1 << 20

// MaxFrame is the longest payload, in bytes.
const MaxFrame = 64 << 10

const frameHeader = 5

// OutputSize is how much output is best sent in a frame, in bytes: it fills a
// message of the link.
const OutputSize = maxMessage - sessionHeader - frameHeader

// FrameWriter writes frames. It is safe for concurrent use.
type FrameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// NewFrameWriter returns a FrameWriter on w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// Write writes p as one frame, or more if it is longer than MaxFrame.
func (f *FrameWriter) Write(t FrameType, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		n := min(len(p), MaxFrame)
		f.buf = append(f.buf[:0], byte(t))
		f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(n))
		f.buf = append(f.buf, p[:n]...)
		if _, err := f.w.Write(f.buf); err != nil {
			return err
		}
		if p = p[n:]; len(p) == 0 {
			return nil
		}
	}
}

// Stream returns a writer that sends what is written to it in frames of type t.
func (f *FrameWriter) Stream(t FrameType) io.Writer { return frameStream{f, t} }

type frameStream struct {
	f *FrameWriter
	t FrameType
}

func (s frameStream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.f.Write(s.t, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// FrameReader reads frames.
type FrameReader struct {
	r   io.Reader
	buf [MaxFrame]byte
}

// NewFrameReader returns a FrameReader on r.
func NewFrameReader(r io.Reader) *FrameReader { return &FrameReader{r: r} }

// Read returns the next frame. The payload is valid until the next call.
func (f *FrameReader) Read() (FrameType, []byte, error) {
	if _, err := io.ReadFull(f.r, f.buf[:frameHeader]); err != nil {
		return 0, nil, err
	}
	t, n := FrameType(f.buf[0]), binary.BigEndian.Uint32(f.buf[1:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes is over the limit of %d", n, MaxFrame)
	}
	if _, err := io.ReadFull(f.r, f.buf[:n]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return t, f.buf[:n], nil
}

// process is the client's end of the exec protocol.
type process struct {
	conn           net.Conn
	w              *FrameWriter
	stdout, stderr *io.PipeReader
	done           chan struct{} // closed when status and err are set
	status         shed.ExitStatus
	err            error

	stdinMu   sync.Mutex // held by the writer of stdin
	windowMu  sync.Mutex
	window    int           // bytes of stdin that may be sent
	windowUpd chan struct{} // signals that window grew
}

// NewProcess returns the command that runs behind conn, which it owns.
func NewProcess(conn net.Conn) shed.Process {
	p := &process{
		conn: conn, w: NewFrameWriter(conn), done: make(chan struct{}),
		window: StdinWindow, windowUpd: make(chan struct{}, 1),
	}
	var out, errw *io.PipeWriter
	p.stdout, out = io.Pipe()
	p.stderr, errw = io.Pipe()
	go func() {
		defer close(p.done)
		p.status, p.err = p.receive(out, errw)
		out.CloseWithError(p.err) // nil means EOF
		errw.CloseWithError(p.err)
	}()
	return p
}

func (p *process) receive(stdout, stderr io.Writer) (shed.ExitStatus, error) {
	frames := NewFrameReader(p.conn)
	for {
		t, b, err := frames.Read()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return shed.ExitStatus{}, fmt.Errorf("the connection to the command was lost: %w", err)
		}
		// A reader that has gone away doesn't keep the command from ending.
		switch t {
		case FrameStdout:
			stdout.Write(b)
		case FrameStderr:
			stderr.Write(b)
		case FrameStdinAck:
			if len(b) != 4 {
				return shed.ExitStatus{}, fmt.Errorf("an acknowledgement of %d bytes, not 4", len(b))
			}
			p.windowMu.Lock()
			p.window += int(binary.BigEndian.Uint32(b))
			p.windowMu.Unlock()
			select {
			case p.windowUpd <- struct{}{}:
			default:
			}
		case FrameExit:
			var status shed.ExitStatus
			if err := json.Unmarshal(b, &status); err != nil {
				return status, fmt.Errorf("the command's exit status: %w", err)
			}
			return status, nil
		}
	}
}

func (p *process) Stdout() io.Reader { return p.stdout }
func (p *process) Stderr() io.Reader { return p.stderr }

func (p *process) Stdin() io.WriteCloser { return stdin{p} }

type stdin struct{ p *process }

// Write sends b as the window allows. It fails when the command has ended.
func (s stdin) Write(b []byte) (n int, err error) {
	p := s.p
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	for len(b) > 0 {
		p.windowMu.Lock()
		m := min(len(b), p.window, MaxFrame)
		p.window -= m
		p.windowMu.Unlock()
		if m == 0 {
			select {
			case <-p.windowUpd:
				continue
			case <-p.done:
				return n, io.ErrClosedPipe
			}
		}
		if err := p.w.Write(FrameStdin, b[:m]); err != nil {
			return n, err
		}
		n, b = n+m, b[m:]
	}
	return n, nil
}

func (s stdin) Close() error {
	s.p.stdinMu.Lock()
	defer s.p.stdinMu.Unlock()
	return s.p.w.Write(FrameStdinEOF, nil)
}

func (p *process) Resize(size shed.Size) error {
	b, err := json.Marshal(size)
	if err != nil {
		return err
	}
	return p.w.Write(FrameResize, b)
}

func (p *process) Signal(name string) error { return p.w.Write(FrameSignal, []byte(name)) }

func (p *process) Wait() (shed.ExitStatus, error) {
	<-p.done
	return p.status, p.err
}

func (p *process) Close() error {
	p.stdout.Close()
	p.stderr.Close()
	err := p.conn.Close()
	<-p.done
	return err
}
