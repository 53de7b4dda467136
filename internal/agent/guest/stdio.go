//go:build linux

package guest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// running is a command whose streams are being carried.
type running struct {
	cmd    *exec.Cmd
	frames *agent.FrameWriter
	ended  chan struct{} // closed when cmd has ended
	tty    *os.File      // nil without one

	attached bool // the command shows a session

	stdin   *os.File
	queue   *stdinQueue
	outputs []*output
}

// pipeSize is what the pipes to and from commands hold, in bytes.
const pipeSize = 1 << 20

// output is a stream from the command to the host.
type output struct {
	file *os.File
	done chan error
}

func (p *running) startTTY(size shed.Size) error {
	f, err := startOnTTY(p.cmd, size)
	if err != nil {
		return err
	}
	p.tty, p.stdin = f, f
	p.carry(f, agent.FrameStdout)
	p.feed()
	return nil
}

// ttySize returns the size of the command's terminal where the client's has size. What keeps a session has memory
// for each cell, and work with it.
func (p *running) ttySize(size shed.Size) shed.Size {
	if p.attached {
		return limitSize(size)
	}
	return size
}

// startOnTTY starts cmd on a new terminal and returns the terminal's other end.
func startOnTTY(cmd *exec.Cmd, size shed.Size) (*os.File, error) {
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	f, err := pty.StartWithAttrs(cmd, &pty.Winsize{Rows: size.Rows, Cols: size.Cols}, cmd.SysProcAttr)
	if err != nil {
		return nil, err
	}
	// Starting it made the terminal blocking, which would keep deadlines from working.
	controlTTY(f, func(fd int) { unix.SetNonblock(fd, true) })
	return f, nil
}

// controlTTY calls f with the terminal's descriptor, without making that blocking as os.File.Fd does.
func controlTTY(tty *os.File, f func(fd int)) {
	if raw, err := tty.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

// resizeTTY changes the size of a terminal, of which its programs are told.
func resizeTTY(tty *os.File, size shed.Size) {
	controlTTY(tty, func(fd int) {
		unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	})
}

// foreground returns the process group that has a terminal.
func foreground(tty *os.File) (pgid int, ok bool) {
	controlTTY(tty, func(fd int) {
		fg, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		pgid, ok = fg, err == nil && fg > 0
	})
	return pgid, ok
}

func (p *running) startPipes() error {
	var ends [3][2]*os.File // of stdin, stdout, stderr: the command's, ours
	for i := range ends {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		if i == 0 {
			ends[i] = [2]*os.File{r, w}
		} else {
			ends[i] = [2]*os.File{w, r}
		}
		unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, pipeSize)
		// Fd made it blocking, which would keep deadlines from working.
		unix.SetNonblock(int(r.Fd()), i != 0)
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = ends[0][0], ends[1][0], ends[2][0]
	err := p.cmd.Start()
	for i := range ends {
		ends[i][0].Close()
	}
	if err != nil {
		for i := range ends {
			ends[i][1].Close()
		}
		return err
	}
	p.stdin = ends[0][1]
	p.carry(ends[1][1], agent.FrameStdout)
	p.carry(ends[2][1], agent.FrameStderr)
	p.feed()
	return nil
}

// carry sends what the command writes to f.
func (p *running) carry(f *os.File, t agent.FrameType) {
	o := &output{file: f, done: make(chan error, 1)}
	p.outputs = append(p.outputs, o)
	go func() {
		o.done <- readOutput(f, make([]byte, agent.OutputSize), func(b []byte) error { return p.frames.Write(t, b) })
	}()
}

// readOutput calls write with what is written to f, until that has its end or passes its read deadline. It returns
// write's error.
func readOutput(f *os.File, buf []byte, write func([]byte) error) error {
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if werr := write(buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return rest(f, buf, write)
		}
		if err != nil { // EOF, or EIO where a terminal has no more users
			return nil
		}
	}
}

// rest calls write with what is in f now: no more than it holds, as a process in the background may
// write without end. What that writes later is nobody's.
func rest(f *os.File, buf []byte, write func([]byte) error) error {
	f.SetReadDeadline(time.Time{})
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	for left := pipeSize; left > 0; {
		var n int
		var rerr error
		if err := raw.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return true
		}); err != nil || rerr != nil || n <= 0 {
			return nil
		}
		if err := write(buf[:n]); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// drain sends what the ended command has left in its streams.
func (p *running) drain() error {
	for _, o := range p.outputs {
		o.file.SetReadDeadline(time.Unix(1, 0))
	}
	var err error
	for _, o := range p.outputs {
		err = errors.Join(err, <-o.done)
	}
	p.close()
	return err
}

func (p *running) close() {
	for _, o := range p.outputs {
		o.file.Close()
	}
	p.stdin.Close()
}

// feed writes the queue to the command's stdin and acknowledges what it took.
func (p *running) feed() {
	p.queue = newStdinQueue()
	go func() {
		for {
			b, ok := p.queue.take()
			if !ok {
				break
			}
			// A command that closed its stdin takes no more: the rest is dropped.
			p.stdin.Write(b)
			p.queue.taken() // before the client may send more
			p.frames.Write(agent.FrameStdinAck, binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		}
		switch {
		case p.tty == nil:
			p.stdin.Close()
		case !p.attached: // else it would be for what runs in the session
			p.tty.Write([]byte{4}) // EOT, by which a terminal ends its input
		}
	}()
}

// input handles the client's frames until it goes away, and returns why.
func (p *running) input(r io.Reader) error {
	defer p.queue.close()
	frames := agent.NewFrameReader(r)
	for {
		t, b, err := frames.Read()
		if err != nil {
			return err
		}
		switch t {
		case agent.FrameStdin:
			if !p.queue.put(b) {
				return errors.New("more stdin than the window allows")
			}
		case agent.FrameStdinEOF:
			p.queue.close()
		case agent.FrameResize:
			var size shed.Size
			if err := json.Unmarshal(b, &size); err == nil && p.tty != nil {
				resizeTTY(p.tty, p.ttySize(size))
			}
		case agent.FrameSignal:
			if sig := unix.SignalNum("SIG" + string(b)); sig != 0 {
				p.signal(sig)
			}
		}
	}
}

// signal reaches the command and what it started: the group of a session's
// leader, or a terminal's foreground group.
func (p *running) signal(sig syscall.Signal) {
	select {
	case <-p.ended:
		return // its process ID is free for others
	default:
	}
	pgid := p.cmd.Process.Pid
	if p.tty != nil {
		if fg, ok := foreground(p.tty); ok {
			pgid = fg
		}
	}
	unix.Kill(-pgid, sig)
}

// How long a command whose client has gone may take to end after each signal.
const hangUpGrace = time.Second

// hangUp ends a command that nobody waits for any more: as the end of a terminal does,
// then as an init does, then by force.
func (p *running) hangUp() {
	pgid := p.cmd.Process.Pid
	for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGTERM} {
		unix.Kill(-pgid, sig)
		unix.Kill(-pgid, unix.SIGCONT)
		if p.tty != nil {
			p.tty.Close()
		}
		select {
		case <-p.ended:
		case <-time.After(hangUpGrace):
		}
	}
	unix.Kill(-pgid, unix.SIGKILL)
	<-p.ended
}

// stdinQueue holds stdin that the command hasn't taken yet, up to the protocol's window.
type stdinQueue struct {
	mu     sync.Mutex
	more   sync.Cond
	buf    []byte
	out    int // bytes that are being written
	closed bool
}

func newStdinQueue() *stdinQueue {
	q := &stdinQueue{}
	q.more.L = &q.mu
	return q
}

// put appends b. It returns false if that is more than the window.
func (q *stdinQueue) put(b []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return true
	}
	if len(q.buf)+q.out+len(b) > agent.StdinWindow {
		return false
	}
	q.buf = append(q.buf, b...)
	q.more.Signal()
	return true
}

// take returns all that is there, when there is something, and false at the end.
func (q *stdinQueue) take() ([]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.buf) == 0 && !q.closed {
		q.more.Wait()
	}
	b := q.buf
	q.buf, q.out = nil, len(b)
	return b, len(b) > 0
}

// taken says that what take returned is written.
func (q *stdinQueue) taken() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.out = 0
}

func (q *stdinQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.more.Signal()
}
