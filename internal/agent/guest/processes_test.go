//go:build linux

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helpers are what the test's program does where it is called so: it is in the place of the agent's processes.
var helpers = map[string]func() error{
	// It has a child that doesn't end, as one that waits for a device.
	"shed-test-shutdown": func() error {
		child := exec.Command("sleep", "1000")
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := child.Start(); err != nil {
			return err
		}
		awaitChildren(10 * time.Millisecond)
		if err := unix.Kill(child.Process.Pid, 0); err != nil {
			return fmt.Errorf("the child that was to be waited for in vain: %w", err)
		}
		if err := child.Process.Kill(); err != nil {
			return err
		}
		awaitChildren(time.Hour)
		if err := unix.Kill(child.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("the child that has ended: %v", err)
		}
		return nil
	},
	"shed-test-init": func() error {
		if err := limitFiles(1000, 3000); err != nil {
			return err
		}
		cmd := exec.Command(selfExe)
		cmd.Args, cmd.Stdout, cmd.Stderr = []string{"shed-test-agent"}, os.Stdout, os.Stderr
		return cmd.Run()
	},
	"shed-test-agent": func() error {
		var own unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
			return err
		}
		fmt.Println(own.Cur >= 2999)
		cmd := exec.Command("sh", "-c", "ulimit -Sn; ulimit -Hn")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	},
}

// runHelper runs one of helpers, and returns what it prints.
func runHelper(t *testing.T, name string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), selfExe)
	cmd.Args = []string{name}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// A process that can't be killed must not keep a machine from powering off.
func TestShutdownWaits(t *testing.T) {
	runHelper(t, "shed-test-shutdown")
}

// The agent may have many files open, and what it starts as many as usual.
func TestLimitFiles(t *testing.T) {
	if got := runHelper(t, "shed-test-init"); got != "true\n1000\n3000\n" {
		t.Errorf("%q", got)
	}
}

// Where starting a command takes the last descriptor, the next one must not be spared for that.
func TestStartCommandRestores(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: the agent runs as root, and so must this test")
	}
	score := func() string {
		t.Helper()
		b, err := os.ReadFile(oomFile)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	before := score()
	set := func(s string) {
		t.Helper()
		starting.Lock()
		defer starting.Unlock()
		if starting.oom != nil {
			if err := starting.oom.Close(); err != nil {
				t.Error(err)
			}
		}
		starting.oom = nil
		if err := os.WriteFile(oomFile, []byte(s), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("500")
	defer set(before)
	for range 2 {
		if err := startCommand(func() error {
			if got := score(); got != "0" {
				t.Errorf("a command gets %s", got)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if got := score(); got != "500" {
			t.Fatalf("after a start the agent has %s", got)
		}
	}
	giveBack := func() {}
	if err := startCommand(func() error {
		giveBack = takeFiles(t)
		return nil
	}); err != nil {
		t.Error(err)
	}
	giveBack()
	if got := score(); got != "500" {
		t.Errorf("without a descriptor the agent is left with %s", got)
	}
}

// takeFiles leaves the process no descriptor until giveBack is called.
func takeFiles(t *testing.T) (giveBack func()) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	// Cur is one more than the highest that there may be; above some that are in use there are gaps.
	low := unix.Rlimit{Cur: 64, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		files = append(files, f)
	}
	return func() {
		for _, f := range files {
			f.Close()
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Error(err)
		}
	}
}
