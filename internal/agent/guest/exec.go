//go:build linux

package guest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// Exit codes of commands that can't be started, as shells have them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// How long a command whose client has gone may take to end by itself.
const hangupGrace = 2 * time.Second

// exec runs cmd on s, by the exec protocol.
func (m *machine) exec(s *agent.Stream, cmd shed.Command) {
	frames := agent.NewFrameWriter(s)
	status, err := m.run(s, frames, cmd)
	if err != nil {
		s.Reset()
		return
	}
	b, err := json.Marshal(status)
	if err == nil {
		err = frames.Write(agent.FrameExit, b)
	}
	if err != nil {
		s.Reset()
		return
	}
	s.Close()
}

// run starts cmd and returns how it ended. An error means that nobody is there to be told.
func (m *machine) run(s *agent.Stream, frames *agent.FrameWriter, c shed.Command) (shed.ExitStatus, error) {
	cmd, err := m.command(c)
	if err != nil {
		code := exitNotFound
		if errors.Is(err, os.ErrPermission) {
			code = exitNotExecutable
		}
		return shed.ExitStatus{Code: code, Error: err.Error()}, nil
	}
	if m.cgroup != "" {
		cgroup, err := os.Open(m.cgroup)
		if err != nil {
			return shed.ExitStatus{}, err
		}
		defer cgroup.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	}

	p := &running{cmd: cmd, frames: frames}
	if c.TTY != nil {
		err = p.startTTY(c.TTY.Size)
	} else {
		err = p.startPipes()
	}
	if err != nil {
		return shed.ExitStatus{Code: exitNotExecutable, Error: err.Error()}, nil
	}
	gone := make(chan error, 1)
	go func() { gone <- p.input(s) }()
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case err := <-gone:
		p.hangUp(ended)
		p.close()
		return shed.ExitStatus{}, err
	}
	if err := p.drain(); err != nil {
		return shed.ExitStatus{}, err
	}
	return exitStatus(cmd.ProcessState), nil
}

// command makes the process of c, not started yet.
func (m *machine) command(c shed.Command) (*exec.Cmd, error) {
	a, err := lookupUser(c.User)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	setup := m.setup
	m.mu.Unlock()
	if setup == nil {
		return nil, errors.New("the shed isn't set up yet")
	}
	base := a.baseEnv().with(setup.Env...)
	if c.TTY != nil && c.TTY.Term != "" {
		base = base.with("TERM=" + c.TTY.Term)
	}
	cmd := &exec.Cmd{
		SysProcAttr: &syscall.SysProcAttr{Credential: a.credential(), Setsid: true},
		Dir:         workDir(c.Dir, setup.Workspace, a.home),
	}
	if fi, err := os.Stat(cmd.Dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("the directory %s isn't in the shed", cmd.Dir)
	}
	switch {
	case len(c.Args) > 0:
		env := m.envs.get(a, base).with(c.Env...)
		cmd.Env = env
		cmd.Args = c.Args
		cmd.Path, err = lookPath(c.Args[0], env.get("PATH"), cmd.Dir)
		if err != nil {
			return nil, err
		}
	default:
		cmd.Env = base.with(c.Env...)
		cmd.Path = a.shell
		// A leading dash makes any shell a login shell.
		cmd.Args = []string{"-" + filepath.Base(a.shell)}
		if c.Script != "" {
			cmd.Args = append(cmd.Args, "-c", c.Script)
		}
		if _, err := os.Stat(a.shell); err != nil {
			return nil, fmt.Errorf("the shed has no shell %s", a.shell)
		}
	}
	cmd.Env = environ(cmd.Env).with("PWD=" + cmd.Dir)
	return cmd, nil
}

// workDir resolves the directory asked for. The workspace may be gone, which must
// not keep anybody out.
func workDir(dir, workspace, home string) string {
	if dir == "" {
		for _, d := range []string{workspace, home} {
			if fi, err := os.Stat(d); err == nil && fi.IsDir() {
				return d
			}
		}
		return "/"
	}
	if rest, ok := strings.CutPrefix(dir, "~"); ok && (rest == "" || rest[0] == '/') {
		return filepath.Join(home, rest)
	}
	if !filepath.IsAbs(dir) {
		return filepath.Join(workspace, dir)
	}
	return dir
}

// lookPath finds a program as execvp(3) does, with a relative name taken from dir.
func lookPath(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		if file := filepath.Join(d, name); executable(file) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: command not found in the shed", name)
}

func executable(file string) error {
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	if fi.IsDir() || fi.Mode()&0o111 == 0 {
		return &os.PathError{Op: "exec", Path: file, Err: os.ErrPermission}
	}
	return nil
}

func exitStatus(state *os.ProcessState) shed.ExitStatus {
	ws := state.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		name := strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG")
		return shed.ExitStatus{Code: 128 + int(ws.Signal()), Signal: name}
	}
	return shed.ExitStatus{Code: ws.ExitStatus()}
}

// running is a command whose streams are being carried.
type running struct {
	cmd    *exec.Cmd
	frames *agent.FrameWriter
	tty    *os.File // nil without one

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
	f, err := pty.StartWithAttrs(p.cmd, &pty.Winsize{Rows: size.Rows, Cols: size.Cols},
		withTTY(p.cmd.SysProcAttr))
	if err != nil {
		return err
	}
	p.tty, p.stdin = f, f
	p.carry(f, agent.FrameStdout)
	p.feed()
	return nil
}

func withTTY(attr *syscall.SysProcAttr) *syscall.SysProcAttr {
	attr.Setsid, attr.Setctty = true, true
	return attr
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
		buf := make([]byte, agent.OutputSize)
		for {
			n, err := f.Read(buf)
			if n > 0 {
				if werr := p.frames.Write(t, buf[:n]); werr != nil {
					o.done <- werr
					return
				}
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				o.done <- p.rest(f, t, buf)
				return
			}
			if err != nil { // EOF, or EIO where a terminal has no more users
				o.done <- nil
				return
			}
		}
	}()
}

// rest sends what is in f now: no more than it holds, as a process in the background may
// write without end. What that writes later is nobody's.
func (p *running) rest(f *os.File, t agent.FrameType, buf []byte) error {
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
		if err := p.frames.Write(t, buf[:n]); err != nil {
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
		if p.tty == nil {
			p.stdin.Close()
		} else {
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
				pty.Setsize(p.tty, &pty.Winsize{Rows: size.Rows, Cols: size.Cols})
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
	pgid := p.cmd.Process.Pid
	if p.tty != nil {
		if fg, err := unix.IoctlGetInt(int(p.tty.Fd()), unix.TIOCGPGRP); err == nil && fg > 0 {
			pgid = fg
		}
		unix.SetNonblock(int(p.tty.Fd()), true)
	}
	unix.Kill(-pgid, sig)
}

// hangUp ends a command that nobody waits for any more.
func (p *running) hangUp(ended <-chan struct{}) {
	pgid := p.cmd.Process.Pid
	unix.Kill(-pgid, unix.SIGHUP)
	unix.Kill(-pgid, unix.SIGTERM)
	unix.Kill(-pgid, unix.SIGCONT)
	if p.tty != nil {
		p.tty.Close()
	}
	select {
	case <-ended:
	case <-time.After(hangupGrace):
	}
	unix.Kill(-pgid, unix.SIGKILL)
	<-ended
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
