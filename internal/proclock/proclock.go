//go:build linux

// Package proclock is a lock on a file that says whether a process runs, and which one that is. The
// lock is taken before the process is started, and inherited by it: there is no moment at which the
// process runs and can't be found, and no record of it that could be wrong.
package proclock

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// FD is the descriptor that a process inherits its lock as.
const FD = 3

var (
	// ErrHeld is returned by Take where another process has the lock.
	ErrHeld = errors.New("another process holds its lock")
	// ErrNotHeld is returned by Find where nobody has the lock.
	ErrNotHeld = errors.New("nobody holds the lock")
)

// Take takes the lock on file, which it makes if need be. A process that was killed lets go
// of the lock only some time after it let go of other files, and who looks for the lock has it for a
// moment: it is waited for as long as patience.
func Take(file string, patience time.Duration) (*os.File, error) {
	opened, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// Who takes the lock must not be mistaken for the process that inherits it.
	fd, err := unix.FcntlInt(opened.Fd(), unix.F_DUPFD_CLOEXEC, FD+1)
	opened.Close()
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", file, err)
	}
	f := os.NewFile(uintptr(fd), file)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		held, err := try(f, unix.LOCK_EX)
		if err == nil && !held {
			return f, nil
		}
		if err == nil && time.Now().After(deadline) {
			err = ErrHeld
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", file, err)
		}
	}
}

// Held says whether somebody has the lock on file. Where there is no file nobody has.
func Held(file string) (bool, error) {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	held, err := try(f, unix.LOCK_SH)
	if err != nil {
		return false, fmt.Errorf("asking for the lock on %s: %w", file, err)
	}
	return held, nil
}

// try takes a lock unless another one is held that keeps it from that.
func try(f *os.File, how int) (held bool, err error) {
	for {
		switch err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); {
		case errors.Is(err, unix.EWOULDBLOCK):
			return true, nil
		case !errors.Is(err, unix.EINTR):
			return false, err
		}
	}
}

// Process is a process that inherited a lock. A Process is that one for ever: its pid may become
// another's.
type Process struct {
	process *os.Process
	ended   chan struct{}
}

// Start starts cmd, which inherits lock and no other file. The caller still has to close lock.
func Start(cmd *exec.Cmd, lock *os.File) (*Process, error) {
	cmd.ExtraFiles = []*os.File{lock} // FD
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{process: cmd.Process, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		// It is ours to bury. How it fared is for its log.
		_ = cmd.Wait()
	}()
	return p, nil
}

// Find returns the process that inherited the lock on file, or ErrNotHeld. One that is only just being started, or
// that is ending, has the lock and can't be found: it is waited for as long as patience.
func Find(file string, patience time.Duration) (*Process, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		held, err := Held(file)
		if err != nil {
			return nil, err
		}
		if !held {
			return nil, ErrNotHeld
		}
		p, err := find(file)
		if err != nil {
			return nil, fmt.Errorf("looking for the process that has the lock on %s: %w", file, err)
		}
		if p != nil {
			return p, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the process that has the lock on %s can't be found", file)
		}
	}
}

// find is Find without patience. It returns nil where no process is found.
func find(file string) (*Process, error) {
	lock, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		ok, err := holds(pid, lock)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		process, err := os.FindProcess(pid)
		if err != nil {
			return nil, err
		}
		// The pid may have become another process's before it was held on to.
		if ok, err := holds(pid, lock); err != nil || !ok {
			process.Release()
			return nil, err
		}
		return watch(process)
	}
	return nil, nil
}

// holds says whether a process has inherited the lock: whether its descriptor FD is the lock's file,
// and has the lock. It is false for processes that may not be looked at.
func holds(pid int, lock os.FileInfo) (bool, error) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	if fi, err := os.Stat(fmt.Sprintf("%s/fd/%d", proc, FD)); err != nil || !os.SameFile(fi, lock) {
		return false, nil
	}
	// Only the descriptor that has a lock shows it, in whichever process: see proc(5).
	info, err := os.ReadFile(fmt.Sprintf("%s/fdinfo/%d", proc, FD))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && f[0] == "lock:" && f[2] == "FLOCK" && f[4] == "WRITE" {
			return true, nil
		}
	}
	return false, nil
}

// watch returns a process that somebody else has started.
func watch(process *os.Process) (*Process, error) {
	p := &Process{process: process, ended: make(chan struct{})}
	opened := make(chan error, 1)
	go func() {
		opened <- process.WithHandle(func(pidfd uintptr) {
			opened <- nil
			defer close(p.ended)
			for {
				_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
				if !errors.Is(err, unix.EINTR) {
					return
				}
			}
		})
	}()
	if err := <-opened; err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", process.Pid, err)
	}
	return p, nil
}

// PID returns the number that the process has or had.
func (p *Process) PID() int { return p.process.Pid }

// Ended returns a channel that is closed when the process has ended, and has let go of the lock.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Kill ends the process with SIGKILL, and doesn't wait for its end. Killing one that has ended is no error.
func (p *Process) Kill() error {
	if err := p.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing process %d: %w", p.process.Pid, err)
	}
	return nil
}
