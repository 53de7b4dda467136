//go:build linux

package keeper

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/vm"
)

// A machine outlives its keeper, and the next keeper takes it over.
func TestResume(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	for range 3 {
		watched := make(chan error, 1)
		go func() {
			_, err := c.Watch(t.Context())
			watched <- err
		}()
		b.killKeeper()
		if err := <-watched; !errors.Is(err, ErrNotRunning) {
			t.Fatalf("Watch: %v, want ErrNotRunning", err)
		}
		if !running(b.run) {
			t.Fatal("the machine ended with its keeper")
		}
		// Several may notice.
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				c, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
				if err != nil {
					t.Error(err)
					return
				}
				if err := c.Ready(t.Context()); err != nil {
					t.Error(err)
				}
				b.echo(c)
			})
		}
		wg.Wait()
	}
	b.stop(c, time.Minute, "")
	b.wantBoots(1)
	if _, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Resume of nothing: %v, want ErrNotRunning", err)
	}
	if _, err := Resume(t.Context(), os.Args[0], t.TempDir(), fakeDriver{}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Resume of a shed that never ran: %v, want ErrNotRunning", err)
	}
}

// A machine that was up is left running, whatever its agent does.
func TestResumeWithoutAgent(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	b.endAgent(c)
	b.killKeeper()
	cfg := config(wellBehaved)
	cfg.BootTimeout = time.Millisecond
	b.writeConfig(record{Config: cfg, Program: os.Args[0]})
	c, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.stop(c, time.Hour, "its agent has ended")
	b.wantBoots(1)
}

// A machine that ends while its next keeper comes is not started again.
func TestResumeOfWhatHasEnded(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	b.killKeeper()
	if err := (fakeMachine{b.run}).Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.replace(t.Context()); err != nil {
		t.Fatal(err)
	}
	for {
		exit, ok := LastExit(b.dir)
		if ok && (exit.Cause != vm.Killed || exit.Detail != errNotFound.Error()) {
			t.Errorf("exit %+v", exit)
		}
		if ok {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := c.waitEnd(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.nothingRuns()
	b.wantBoots(1)
}

// Where it can't be told whether something runs, nobody may take it for ended.
func TestNobodyKnowsWhetherItRuns(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	b.killKeeper()
	lock := filepath.Join(b.run, lockFile)
	if err := errors.Join(os.Rename(lock, lock+".saved"), os.Symlink(lock, lock)); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(b.dir); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("Find: %v", err)
	}
	if _, err := c.Stop(t.Context(), 0); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("Stop: %v", err)
	}
	if err := os.Rename(lock+".saved", lock); err != nil {
		t.Fatal(err)
	}
	if _, err := Resume(t.Context(), os.Args[0], b.dir, blindDriver{}); !errors.Is(err, errBlind) {
		t.Errorf("Resume: %v, want %v", err, errBlind)
	}
	// A keeper that can't see it leaves it alone.
	cfg := config(wellBehaved)
	cfg.Driver = "blind"
	b.writeConfig(record{Config: cfg})
	c, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.waitEnd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exit, ok := LastExit(b.dir); ok || !running(b.run) {
		t.Errorf("exit %+v; the machine runs: %v", exit, running(b.run))
	}
	b.writeConfig(record{Config: config(wellBehaved)})
	if c, err = Resume(t.Context(), os.Args[0], b.dir, fakeDriver{}); err != nil {
		t.Fatal(err)
	}
	b.echo(c)
	b.stop(c, time.Minute, "")
}

// What an agent says again and again, and at length, is no way to fill the host's disk.
func TestAgentThatRefusesForGood(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.startUp(refusesLater)
	b.killKeeper()
	c, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		if fi, err := os.Stat(filepath.Join(b.run, refusals)); err == nil && fi.Size() > 3 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	log, err := os.ReadFile(filepath.Join(b.run, logFile))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(log), "there is no disk"); n != 1 || len(log) > 10_000 {
		t.Errorf("%d times, in %d bytes", n, len(log))
	}
	b.stop(c, 0, "by force")
}

// A record that can't be read is an error, and no reason to end what runs.
func TestDamagedRecords(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	b.killKeeper()
	for _, content := range []string{"", `{"driver": "fa`, "\x00\x00\x00\x00", `["fake"]`} {
		b.writeConfig(content)
		_, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
		if err == nil || errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), configFile) {
			t.Errorf("Resume with %q: %v", content, err)
		}
		if _, err := c.Stop(t.Context(), 0); err == nil || !strings.Contains(err.Error(), configFile) {
			t.Errorf("Stop with %q: %v", content, err)
		}
	}
	if !running(b.run) {
		t.Fatal("the machine has ended")
	}
	// A driver that the keeper doesn't know ends it, and the machine runs on.
	cfg := config(wellBehaved)
	cfg.Driver = "other"
	b.writeConfig(record{Config: cfg})
	c, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), `there is no driver "other"`) {
		t.Errorf("Ready: %v", err)
	}
	b.writeConfig(record{Config: config(wellBehaved)})
	if c, err = Resume(t.Context(), os.Args[0], b.dir, fakeDriver{}); err != nil {
		t.Fatal(err)
	}
	b.echo(c)
	b.stop(c, time.Minute, "")
}

// A keeper that doesn't answer is replaced, and its machine is shut down as cleanly as any.
func TestStopWithAFrozenKeeper(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		grace time.Duration
		words string
	}{
		"cleanly": {time.Minute, ""},
		"at once": {0, "by force"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			c := b.startUp(wellBehaved)
			b.freeze(b.keeperPID())
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			if _, err := c.Open(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Open: %v, want it to end with its context", err)
			}
			// As the server does, somebody else gives the machine a new keeper too.
			watched := make(chan error, 1)
			go func() {
				_, err := c.Watch(t.Context())
				if errors.Is(err, ErrNotRunning) {
					if _, err = Resume(t.Context(), os.Args[0], b.dir, fakeDriver{}); errors.Is(err, ErrNotRunning) {
						err = nil
					}
				}
				watched <- err
			}()
			forced, err := c.Stop(t.Context(), tt.grace)
			if err != nil {
				t.Fatalf("Stop: %v", err)
			}
			// The watcher may only come now, or have come while the machine was ending; then its keeper has nothing to keep.
			if err := <-watched; err != nil {
				t.Errorf("the watcher: %v", err)
			}
			if err := c.waitEnd(t.Context()); err != nil {
				t.Error(err)
			}
			b.ended(forced, tt.words)
			b.wantBoots(1)
		})
	}
}

// A keeper that is killed while it stops its shed is replaced too.
func TestStopWithAKilledKeeper(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(ignoresOffOnce)
	stopped := make(chan error, 1)
	go func() {
		forced, err := c.Stop(t.Context(), time.Hour)
		if err == nil && forced != "" {
			err = errors.New(forced)
		}
		stopped <- err
	}()
	for !exists(filepath.Join(b.run, askedOff)) {
		time.Sleep(time.Millisecond)
	}
	b.killKeeper()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	b.nothingRuns()
}

// Only the process that has the lock is the keeper: not who has its file open.
func TestOnlyTheKeeperIsKilled(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	lock, err := os.Open(filepath.Join(b.run, lockFile))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	other := exec.Command("sleep", "infinity")
	other.ExtraFiles = []*os.File{lock} // as the same descriptor
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		other.Process.Kill()
		other.Wait()
	}()
	for range 2 { // the second time there is none
		if err := killKeeper(b.run); err != nil {
			t.Error(err)
		}
		if b.hasKeeper() {
			t.Error("the lock is held still")
		}
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("another process was ended: %v", err)
	}
	if !running(b.run) {
		t.Error("the machine was ended")
	}

	// A lock whose holder isn't found, as it has it elsewhere, is an error.
	held, err := os.Open(lock.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := killKeeper(b.run); err == nil {
		t.Error("no error about a lock that is held")
	}
	held.Close()

	b.stopBy(c.Stop, 0, "by force") // what is left, by a new keeper
}
