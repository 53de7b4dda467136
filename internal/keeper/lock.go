//go:build linux

package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockFD is the descriptor of the lock in a keeper.
const lockFD = 3

const lockPatience = 2 * time.Second

// lock takes the lock on a run directory. It is held by whoever has the file open: the
// server while it starts a keeper, and then the keeper, which inherits it.
func lock(run string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(run, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// A keeper that is killed lets go of the lock only after its sockets, and who looks
	// for a keeper holds it for a moment.
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			return nil, err
		}
	}
}

// locked says whether somebody holds the lock on a run directory.
func locked(run string) bool {
	f, err := os.Open(filepath.Join(run, lockFile))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// holdsLock says whether a process is the keeper of a run directory: whether its descriptor
// lockFD is the lock's file, and has the lock. It is false where that can't be told.
func holdsLock(pid int, lock os.FileInfo) bool {
	fd := fmt.Sprintf("/proc/%d/fd/%d", pid, lockFD)
	if fi, err := os.Stat(fd); err != nil || !os.SameFile(fi, lock) {
		return false
	}
	// Only the descriptor that has a lock shows it, in whichever process: see proc(5).
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, lockFD))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && f[0] == "lock:" && f[2] == "FLOCK" && f[4] == "WRITE" {
			return true
		}
	}
	return false
}

// killKeeper ends the keeper of a run directory with SIGKILL, however it fares, and returns when
// it has ended. Where there is none, that is no error.
func killKeeper(run string) error {
	// One that is ending already has the lock for a moment longer than it can be found by it.
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(time.Millisecond) {
		found, err := killHolder(run)
		if found || err != nil || !locked(run) {
			return err
		}
		if time.Now().After(deadline) {
			return errors.New("the process that holds its lock can't be found")
		}
	}
}

// killHolder is killKeeper for a keeper that can be found.
func killHolder(run string) (found bool, err error) {
	lock, err := os.Stat(filepath.Join(run, lockFile))
	if err != nil {
		return false, err
	}
	pid, err := findHolder(lock)
	if pid == 0 || err != nil {
		return false, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return true, fmt.Errorf("pidfd_open of the keeper: %w", err)
	}
	defer unix.Close(pidfd)
	// The pid may have become another process's before the descriptor held on to it.
	if !holdsLock(pid, lock) {
		return true, nil
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return true, fmt.Errorf("killing the keeper: %w", err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(answerTimeout.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0:
			return true, fmt.Errorf("the keeper, process %d, was killed and did not end within %v", pid, answerTimeout)
		}
		return true, err
	}
}

// findHolder returns the pid of the other process that is the keeper by holdsLock, or 0.
func findHolder(lock os.FileInfo) (pid int, err error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		if pid, err := strconv.Atoi(p.Name()); err == nil && pid != os.Getpid() && holdsLock(pid, lock) {
			return pid, nil
		}
	}
	return 0, nil
}
