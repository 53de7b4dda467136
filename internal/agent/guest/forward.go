//go:build linux

package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// dialTimeout is how long an address inside the machine, or behind it, may take to answer.
const dialTimeout = time.Minute

// dial connects the stream with an address inside the machine. It ends with the stream.
func (m *machine) dial(s *agent.Stream, to shed.Endpoint) {
	conn, err := m.connect(to)
	if !answer(s, err) {
		if conn != nil {
			conn.Close()
		}
		return
	}
	agent.Splice(s, conn)
}

func (m *machine) connect(to shed.Endpoint) (conn net.Conn, err error) {
	switch to.Network {
	case "accepted":
		return m.accepted.Take(to.Address)
	case "unix":
		a, err := lookupUser("")
		if err != nil {
			return nil, err
		}
		err = a.do(func() error {
			conn, err = net.DialTimeout("unix", to.Address, dialTimeout)
			return err
		})
		return conn, err
	case "tcp":
		m.awaitNetwork()
		return net.DialTimeout("tcp", to.Address, dialTimeout)
	default:
		return nil, fmt.Errorf("the agent doesn't know the network %q", to.Network)
	}
}

// listen listens inside the machine until the stream ends.
func (m *machine) listen(s *agent.Stream, on shed.Endpoint) {
	l, err := listener(on)
	if !answer(s, err) {
		if l != nil {
			l.Close()
		}
		return
	}
	m.accepted.Serve(s, l)
}

func listener(on shed.Endpoint) (net.Listener, error) {
	switch on.Network {
	case "unix":
		a, err := lookupUser("")
		if err != nil {
			return nil, err
		}
		return a.listenUnix(on.Address)
	case "tcp":
		return net.Listen("tcp", on.Address)
	default:
		return nil, fmt.Errorf("the agent can't listen on the network %q", on.Network)
	}
}

// userListener is a Unix socket of a user, whose file it removes at its end.
type userListener struct {
	*net.UnixListener
	a    *account
	path string
	dir  string // that was made for the socket, or ""
}

// listenUnix makes a socket that only a can use. One that nobody listens on any more is
// replaced. Without a path, the socket is in a new directory.
func (a *account) listenUnix(path string) (net.Listener, error) {
	l := &userListener{a: a, path: path}
	if path == "" {
		var err error
		if l.dir, err = os.MkdirTemp("/tmp", "ssh-"); err != nil {
			return nil, err
		}
		if err := os.Lchown(l.dir, int(a.uid), int(a.gid)); err != nil {
			return nil, errors.Join(err, os.Remove(l.dir))
		}
		l.path = filepath.Join(l.dir, "agent")
	}
	err := a.do(func() error {
		// Of this thread alone.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		unix.Umask(0o177)
		addr := &net.UnixAddr{Name: l.path, Net: "unix"}
		var err error
		l.UnixListener, err = net.ListenUnix("unix", addr)
		if errors.Is(err, unix.EADDRINUSE) && isStale(l.path) && os.Remove(l.path) == nil {
			l.UnixListener, err = net.ListenUnix("unix", addr)
		}
		return err
	})
	if err != nil {
		if l.dir != "" {
			os.Remove(l.dir)
		}
		return nil, err
	}
	l.SetUnlinkOnClose(false) // that would be done by root
	return l, nil
}

// isStale says whether path is a socket that nobody listens on.
func isStale(path string) bool {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Type() != os.ModeSocket {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

func (l *userListener) Close() error {
	if err := l.UnixListener.Close(); err != nil {
		return err // it was closed before
	}
	err := l.a.do(func() error { return os.Remove(l.path) })
	if l.dir != "" {
		err = errors.Join(err, os.Remove(l.dir))
	}
	return err
}

// do runs f with what a may do, and no more: on a thread of its own, which ends with it.
func (a *account) do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread can't end, and its user is the process's to the others.
			defer runtime.UnlockOSThread()
			done <- a.do(f)
			return
		}
		err := a.become()
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// become makes the calling thread, and no other, a's.
func (a *account) become() error {
	groups := unsafe.Pointer(unsafe.SliceData(a.groups))
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(a.groups)), uintptr(groups), 0); errno != 0 {
		return os.NewSyscallError("setgroups", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(a.gid), uintptr(a.gid), uintptr(a.gid)); errno != 0 {
		return os.NewSyscallError("setresgid", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(a.uid), uintptr(a.uid), uintptr(a.uid)); errno != 0 {
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}
