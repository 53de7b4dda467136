//go:build linux

package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/vm"
)

// process is a QEMU that may be somebody else's child.
type process struct {
	pidfd *os.File
	ended chan struct{} // closed when the process has ended
}

// recordProcess writes down which process runs, so that findProcess finds it.
func recordProcess(file string, pid int) (*process, error) {
	start, err := startTime(pid)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(processRecord{PID: pid, Start: start, Boot: boot})
	if err != nil {
		return nil, err
	}
	if err := renameio.WriteFile(file, b, 0o600); err != nil {
		return nil, err
	}
	return openProcess(pid)
}

// findProcess returns the recorded process, or vm.ErrNotRunning.
func findProcess(file string) (*process, error) {
	r, err := readRecord(file)
	if err != nil {
		return nil, err
	}
	p, err := openProcess(r.PID)
	if errors.Is(err, unix.ESRCH) {
		return nil, vm.ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	// Only now that the descriptor holds on to the process can it be compared.
	if !r.runs() {
		return nil, vm.ErrNotRunning
	}
	return p, nil
}

// runs says whether the process that has the recorded pid is the recorded one.
func (r processRecord) runs() bool {
	boot, err := bootID()
	if err != nil || boot != r.Boot {
		return false
	}
	start, err := startTime(r.PID)
	return err == nil && start == r.Start
}

func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open of QEMU: %w", err)
	}
	p := &process{pidfd: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	return p, nil
}

func (p *process) kill() error {
	if err := unix.PidfdSendSignal(int(p.pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing QEMU: %w", err)
	}
	<-p.ended
	return nil
}

// startTime returns when a process started, field 22 of proc(5)'s stat.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command's name, the second field, may hold spaces and parentheses.
	_, rest, ok := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is not as expected", pid)
	}
	if fields[0] == "Z" {
		return 0, os.ErrProcessDone
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
