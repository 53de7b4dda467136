//go:build linux

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// keptListener is the socket of a kept session.
type keptListener struct {
	net.Listener
	dir string
}

// listenKept makes the socket of a session. A process may be about to make the same, and one that was killed has left
// its own: so it is done, and undone, with the directory locked.
func listenKept(dir, name string) (*keptListener, error) {
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	path := filepath.Join(dir, name)
	conn, err := dialKept(dir, name)
	if err == nil {
		conn.Close()
		return nil, errors.New(keptTaken)
	}
	if !errors.Is(err, errNotKept) {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return &keptListener{l, dir}, nil
}

// errNotKept says that there is no such session.
var errNotKept = errors.New("nobody keeps the session")

// dialKept connects to the process of a session. Only errNotKept means that there is none: another may
// come of a lack of memory or descriptors, or of a process that is busy.
func dialKept(dir, name string) (net.Conn, error) {
	conn, err := net.Dial("unix", filepath.Join(dir, name))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, errNotKept
	}
	return conn, err
}

func (l *keptListener) close() error {
	unlock, err := lockDir(l.dir)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer unlock()
	return l.Close()
}

// lockDir locks a directory of sessions. A session's name has no dot.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// runAttach shows a kept session on the process's terminal, and returns the exit code.
func runAttach(dir, name string, mode shed.AttachMode) int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGHUP, unix.SIGTERM, unix.SIGINT)
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	conn, err := connectKept(dir, name, mode)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer conn.Close()
	restore, err := makeRaw(int(os.Stdin.Fd()))
	if err != nil {
		fmt.Fprintf(os.Stderr, "no terminal to show the session on: %v\n", err)
		return 1
	}
	code, last := showKept(conn, name, signals, resized)
	os.Stdout.WriteString(closeTerminal)
	restore()
	fmt.Println(last)
	return code
}

// showKept carries the terminal to the session and back until one of them ends. It returns the exit code, and what to say last.
func showKept(conn net.Conn, name string, signals, resized <-chan os.Signal) (code int, last string) {
	detached := make(chan struct{})
	ended := make(chan bool, 1) // in order
	frames := agent.NewFrameWriter(conn)
	go func() {
		var keys detachKeys
		b := make([]byte, 4096)
		for {
			n, err := os.Stdin.Read(b)
			pass, detach := keys.filter(b[:n])
			if len(pass) > 0 && frames.Write(agent.FrameStdin, pass) != nil {
				return
			}
			if detach {
				close(detached)
			}
			if detach || err != nil {
				return
			}
		}
	}()
	go func() {
		r := agent.NewFrameReader(conn)
		for {
			t, b, err := r.Read()
			if err != nil || t == agent.FrameExit {
				ended <- err == nil
				return
			}
			if t == agent.FrameStdout {
				os.Stdout.Write(b)
			}
		}
	}()
	for {
		select {
		case <-resized:
			if b, err := json.Marshal(terminalSize()); err == nil {
				frames.Write(agent.FrameResize, b)
			}
		case inOrder := <-ended:
			if !inOrder {
				return 1, fmt.Sprintf("[lost session %s: its process has ended]", name)
			}
			return 0, "[exited]"
		case <-detached:
			return 0, fmt.Sprintf("[detached (from session %s)]", name)
		case <-signals:
			return 1, fmt.Sprintf("[detached (from session %s)]", name)
		}
	}
}

// connectKept returns a connection to a session, which shows it.
func connectKept(dir, name string, mode shed.AttachMode) (net.Conn, error) {
	const tries = 10 // a session may end, or be made by another, in the moment that it is looked for
	for range tries {
		conn, err := dialKept(dir, name)
		switch {
		case err != nil && !errors.Is(err, errNotKept):
			return nil, fmt.Errorf("attaching to the session %s: %w", name, err)
		case err == nil && mode == shed.AttachNew:
			conn.Close()
			return nil, fmt.Errorf("duplicate session: %s", name)
		case err != nil && mode == shed.AttachJoin:
			return nil, fmt.Errorf("can't find session: %s", name)
		case err != nil:
			if conn, err = spawnKeeper(dir, name); err != nil {
				return nil, fmt.Errorf("starting the session %s: %w", name, err)
			}
		}
		size := terminalSize()
		var reply agent.Reply
		err = agent.WriteMessage(conn, keptRequest{Attach: &size})
		if err == nil {
			err = agent.ReadMessage(conn, &reply)
		}
		if err == nil && reply.Error == "" {
			return conn, nil
		}
		conn.Close()
		if err == nil && reply.Error != keptTaken {
			return nil, fmt.Errorf("starting the session %s: %s", name, reply.Error)
		}
	}
	return nil, fmt.Errorf("the session %s ends as soon as it is there", name)
}

// spawnKeeper starts the process that keeps a session, and returns a connection to it.
func spawnKeeper(dir, name string) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "keeper"), os.NewFile(uintptr(fds[1]), "client")
	defer ours.Close()
	defer theirs.Close()
	cmd := &exec.Cmd{
		Path: selfExe, Args: []string{sessionName, "keep", dir, name},
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go cmd.Wait() // unless it lives longer than this process, as it mostly does
	return net.FileConn(ours)
}

func terminalSize() shed.Size {
	ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return shed.Size{}
	}
	return shed.Size{Rows: ws.Row, Cols: ws.Col}
}

// makeRaw has a terminal pass on every byte as it is, and returns what undoes that: see cfmakeraw(3).
func makeRaw(fd int) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, err
	}
	return func() { unix.IoctlSetTermios(fd, unix.TCSETSF, old) }, nil
}

// detachKeys finds the keys that detach: C-b d, as in tmux. C-b twice is one for the session; before
// any other key it is passed on.
type detachKeys struct {
	prefix bool // C-b was the last key
}

const detachPrefix = 0x02 // C-b

// filter returns what of b is for the session. If that is detached from, the rest of b is nobody's.
func (d *detachKeys) filter(b []byte) (pass []byte, detach bool) {
	for _, key := range b {
		switch {
		case !d.prefix && key == detachPrefix:
			d.prefix = true
		case d.prefix && key == 'd':
			return pass, true
		case d.prefix && key == detachPrefix:
			d.prefix = false
			pass = append(pass, key)
		case d.prefix:
			d.prefix = false
			pass = append(pass, detachPrefix, key)
		default:
			pass = append(pass, key)
		}
	}
	return pass, false
}
