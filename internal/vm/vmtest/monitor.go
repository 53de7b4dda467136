//go:build linux

package vmtest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/vm"
)

// starterKilled checks that a machine is found whose starter is killed while it starts it, from the
// moment on that there is a monitor.
func (s *suite) starterKilled(t *testing.T) {
	d := s.newDriver(t)
	dir, files := dirs(t)
	spec := s.spec(files)
	for try := range 8 {
		starter, err := starterOf(s.test, dir, spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := starter.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- starter.Wait() }()
		// A child that has not become the monitor yet is none: package os makes one to try whether there are pidfds.
		isMonitor := func(pid int) bool {
			program, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
			return err == nil && program != starter.Path
		}
		for !slices.ContainsFunc(usersOf(t, dir, starter.Process.Pid), isMonitor) {
			select {
			case err := <-ended:
				t.Fatalf("the starter ended, and there was no monitor: %v", err)
			default:
			}
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
		starter.Process.Kill()
		<-ended
		checkRunning(t, d, dir, true)
		m, err := d.Find(t.Context(), dir)
		if err != nil {
			t.Errorf("Find, %d ms after the monitor's start: %v", try, err)
		} else if err := m.Kill(); err != nil {
			t.Errorf("Kill: %v", err)
		}
		checkRunning(t, d, dir, false)
		for _, pid := range usersOf(t, dir) {
			t.Errorf("process %d is left", pid)
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// checkHostShutdown sends the monitor what a host sends every process some time before it goes down.
func checkHostShutdown(t *testing.T, dir string, m vm.Machine) {
	t.Helper()
	monitor := usersOf(t, dir)
	if len(monitor) == 0 {
		t.Fatal("no process uses the machine's directory")
	}
	for _, pid := range monitor {
		for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGHUP} {
			if err := unix.Kill(pid, sig); err != nil {
				t.Errorf("sending the monitor %v: %v", sig, err)
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if exit, err := m.Wait(ctx); err == nil {
		t.Fatalf("the machine ended before the host did: %+v", exit)
	}
}

// usersOf returns the other processes, but for some, that have a file in dir open: those of the machine there.
func usersOf(t *testing.T, dir string, except ...int) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var users []int
	for _, file := range files {
		if target, err := os.Readlink(file); err != nil || filepath.Dir(target) != dir {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(file, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		if pid != os.Getpid() && !slices.Contains(except, pid) && !slices.Contains(users, pid) {
			users = append(users, pid)
		}
	}
	return users
}
