//go:build linux

package keeper

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/vm"
)

func TestStartAndStop(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for range 2 { // once more in the same directory
		c := b.startUp(wellBehaved)
		b.echo(c)
		found, err := Find(b.dir)
		if err != nil {
			t.Fatal(err)
		}
		b.echo(found)
		watched := make(chan Exit, 1)
		go func() {
			exit, err := c.Watch(t.Context())
			if err != nil {
				t.Error(err)
			}
			watched <- exit
		}()
		b.stop(found, time.Minute, "")
		exit := <-watched
		if exit.Cause != vm.PowerOff || !exit.Asked || exit.At.IsZero() {
			t.Errorf("Watch: %+v", exit)
		}
		if last, ok := LastExit(b.dir); !ok || last != exit {
			t.Errorf("LastExit: %+v, %v; want %+v", last, ok, exit)
		}
	}
	b.wantBoots(2)
}

func TestStopByForce(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		behaviour string
		grace     time.Duration
		words     string
	}{
		"at once":             {wellBehaved, 0, "ended by force"},
		"an unwilling shed":   {ignoresOff, 10 * time.Millisecond, "did not shut down within 10ms"},
		"a rebooting machine": {rebootsAtOnce, time.Minute, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			b.stop(b.startUp(tt.behaviour), tt.grace, tt.words)
			b.wantBoots(1)
		})
	}
}

// A machine may be stopped before it is up, or even there.
func TestStopWhileItBoots(t *testing.T) {
	t.Parallel()
	for _, grace := range []time.Duration{0, 10 * time.Millisecond} {
		for _, wait := range []bool{false, true} {
			b := newBox(t)
			c := b.start(config(neverAnswers))
			for wait && !(fakeDriver{}).Running(b.run) {
				time.Sleep(time.Millisecond)
			}
			if _, err := c.Stop(t.Context(), grace); err != nil {
				t.Errorf("Stop: %v", err)
			}
			b.nothingRuns()
			if exit, ok := LastExit(b.dir); !ok || !exit.Asked {
				t.Errorf("exit %+v, %v", exit, ok)
			}
			if err := c.Ready(t.Context()); !errors.Is(err, ErrNotRunning) {
				t.Errorf("Ready: %v", err)
			}
		}
	}
}

// A shed that does not come up says why, and nothing of it runs on.
func TestBootFails(t *testing.T) {
	t.Parallel()
	for behaviour, tt := range map[string]struct {
		want  string
		boots int
	}{
		failsToStart: {"the monitor says no", 0},
		panics:       {"its kernel gave up", 2}, // one that did not come up is tried once more
		neverAnswers: {"the agent did not answer within 200ms", 2},
		refusesSetup: {"the agent could not set the machine up: there is no disk", 1},
	} {
		t.Run(behaviour, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			cfg := config(behaviour)
			if behaviour == neverAnswers {
				cfg.BootTimeout = 200 * time.Millisecond
			}
			c := b.start(cfg)
			if err := c.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Ready: %v, want %q", err, tt.want)
			}
			if err := c.waitEnd(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.nothingRuns()
			if exit, ok := LastExit(b.dir); !ok || exit.Cause != vm.Failed || exit.Asked || !strings.Contains(exit.Detail, tt.want) {
				t.Errorf("exit %+v, %v", exit, ok)
			}
			if tt.boots == 0 {
				return
			}
			b.wantBoots(tt.boots)
		})
	}
}

func TestBootThatHangsIsRepeated(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	cfg := config(hangsOnce)
	cfg.BootTimeout = 5 * time.Second // enough for the second, slow as the host may be
	c := b.start(cfg)
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.wantBoots(2)
	b.stop(c, time.Minute, "")
}

// The end of a machine that nobody asked for is noticed, with its reason, as is a reboot.
func TestMachineEndsByItself(t *testing.T) {
	t.Parallel()
	powerOff := func(b *box, c *Client) {
		conn, err := c.Open(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		// The machine may end before its answer is out.
		agent.Call(b.Context(), conn, agent.Request{PowerOff: &agent.PowerOff{}})
		conn.Close()
	}
	for name, tt := range map[string]struct {
		behaviour string
		end       func(*box, *Client)
		want      vm.Exit
	}{
		"powered off": {wellBehaved, powerOff, vm.Exit{Cause: vm.PowerOff}},
		"killed": {
			wellBehaved, func(b *box, _ *Client) {
				if err := (fakeMachine{b.run}).Kill(); err != nil {
					b.Fatal(err)
				}
			},
			vm.Exit{Cause: vm.Killed, Detail: "the monitor was killed"},
		},
		"rebooted": {
			rebootsAtOnce, func(b *box, c *Client) {
				powerOff(b, c)
				for b.boots() < 2 {
					time.Sleep(time.Millisecond)
				}
				b.echo(c)
				powerOff(b, c)
			},
			vm.Exit{Cause: vm.PowerOff},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			c := b.startUp(tt.behaviour)
			tt.end(b, c)
			exit, err := c.Watch(t.Context())
			if errors.Is(err, ErrNotRunning) { // it has ended already
				err = nil
				exit, _ = LastExit(b.dir)
			}
			if err != nil || exit.Exit != tt.want || exit.Asked {
				t.Errorf("%+v, %v; want %+v", exit, err, tt.want)
			}
			if err := c.waitEnd(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.nothingRuns()
		})
	}
}

func TestOneKeeperForADirectory(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	pid := b.keeperPID()
	if _, err := Start(os.Args[0], b.dir, config(wellBehaved)); err == nil || !strings.Contains(err.Error(), "already has a keeper") {
		t.Errorf("a second Start: %v", err)
	}
	if now := b.keeperPID(); now != pid {
		t.Errorf("the keeper is process %d, and was %d", now, pid)
	}
	b.echo(c)
	b.stop(c, time.Minute, "")
}

func TestFindOnLeftovers(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	if _, err := Find(b.dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a directory: %v", err)
	}
	b.writeConfig(record{Config: config(wellBehaved)})
	for _, file := range []string{socketFile, fakeLink, fakeNet} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: shortPath(t, b.run, file), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	for _, file := range []string{lockFile, monitorLock, monitorExit, upFile} {
		if err := os.WriteFile(filepath.Join(b.run, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.dir, exitFile), []byte(`{"cause": "pow`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(b.dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Find: %v", err)
	}
	if _, err := Resume(t.Context(), os.Args[0], b.dir, fakeDriver{}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Resume: %v", err)
	}
	if exit, ok := LastExit(b.dir); ok {
		t.Errorf("LastExit: %+v", exit)
	}
	c := b.startUp(wellBehaved) // they are in nobody's way
	b.echo(c)
	b.stop(c, time.Minute, "")
}

// shortPath returns a name for a file that fits a socket's address.
func shortPath(t *testing.T, dir, file string) string {
	t.Helper()
	link := filepath.Join(t.TempDir(), "l")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(link, file)
}

// A program that can't be run is an error of Start.
func TestNoProgram(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	if _, err := Start("/none/shed-server", b.dir, config(wellBehaved)); err == nil || !strings.Contains(err.Error(), "/none/shed-server") {
		t.Errorf("Start: %v", err)
	}
	b.nothingRuns()
}

// Without its agent a shed can't be asked for anything: nobody waits for it.
func TestAgentEnds(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	b.endAgent(c)
	if _, err := c.Open(t.Context()); err == nil || !strings.Contains(err.Error(), "agent has ended") {
		t.Errorf("Open: %v", err)
	}
	b.stop(c, time.Hour, "its agent has ended")
}

// Who doesn't read what a machine says, or says nothing, doesn't keep its keeper from ending.
func TestStopWithIdleClients(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	silent, err := c.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	conn, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := agent.WriteMessage(conn, agent.Request{Exec: &shed.Command{Script: "echo"}}); err != nil {
		t.Fatal(err)
	}
	stuff(conn, 500*time.Millisecond)
	b.stop(c, time.Minute, "")
}

// A machine that is frozen is ended when its grace is over, however much is on its way to it.
func TestStopOfAFrozenMachine(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	pid, err := os.ReadFile(filepath.Join(b.run, monitorLock))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("kill", "-STOP", string(pid)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// More than fits in between: the link itself takes no more.
	for range 4 {
		conn, err := c.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		stuff(conn, 200*time.Millisecond)
	}
	b.stop(c, 100*time.Millisecond, "did not shut down within 100ms")
}
