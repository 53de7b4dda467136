//go:build linux

package keeper

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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
		go func() { watched <- b.watch(c) }()
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
			for wait && !running(b.run) {
				time.Sleep(time.Millisecond)
			}
			if _, err := c.Stop(t.Context(), grace); err != nil {
				t.Errorf("Stop: %v", err)
			}
			b.nothingRuns()
			if exit, ok := LastExit(b.dir); !ok || !exit.Asked {
				t.Errorf("exit %+v, %v", exit, ok)
			}
			if err := c.Ready(t.Context()); err == nil {
				t.Error("Ready: no error")
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
			code := shed.CodeInternal
			if behaviour == refusesSetup {
				code = refusal
			}
			if err := c.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) || shed.ErrorCode(err) != code {
				t.Errorf("Ready: %v (%s), want %q (%s)", err, shed.ErrorCode(err), tt.want, code)
			}
			if err := c.waitEnd(t.Context()); err != nil {
				t.Fatal(err)
			}
			// One that has ended can't answer any more.
			if err := c.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) || shed.ErrorCode(err) != code {
				t.Errorf("Ready, later: %v (%s), want %q (%s)", err, shed.ErrorCode(err), tt.want, code)
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
	// Until it is enough for the second boot, slow as the host may be.
	for timeout := 500 * time.Millisecond; ; timeout *= 2 {
		b := newBox(t)
		cfg := config(hangsOnce)
		cfg.BootTimeout = timeout
		c := b.start(cfg)
		err := c.Ready(t.Context())
		if err == nil {
			b.wantBoots(2)
			b.stop(c, time.Minute, "")
			return
		}
		if timeout > time.Minute || !strings.Contains(err.Error(), "the agent did not answer within") {
			t.Fatal(err)
		}
		if err := c.waitEnd(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
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
			if exit := b.watch(c); exit.Exit != tt.want || exit.Asked {
				t.Errorf("%+v, want %+v", exit, tt.want)
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
	b.startUp(wellBehaved)
	pid := b.keeperPID()
	c := b.startUp(wellBehaved)
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
	if _, err := Start(t.Context(), "/none/shed-server", b.dir, config(wellBehaved)); err == nil || !strings.Contains(err.Error(), "/none/shed-server") {
		t.Errorf("Start: %v", err)
	}
	b.nothingRuns()
}

// A keeper that gets a signal, as at a shutdown of the host, shuts its machine down.
func TestSignal(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	watched := make(chan Exit, 1)
	go func() { watched <- b.watch(c) }()
	if err := syscall.Kill(b.keeperPID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	exit := <-watched
	if exit.Cause != vm.PowerOff || !exit.Asked || !exit.Signaled {
		t.Errorf("%+v", exit)
	}
	if err := c.waitEnd(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.ended("", "")
	b.wantBoots(1)
}

// Long logs are emptied, the console's limit being another one, and others are left.
func TestTrimLogs(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	k := &keeper{cfg: record{Config: Config{Spec: vm.Spec{Console: filepath.Join(t.TempDir(), "console.log")}}}, log: slog.New(slog.DiscardHandler)}
	sizes := map[string][2]int64{
		k.cfg.Spec.Console: {maxConsole, 0}, logFile: {maxLog, 0}, "vmm.log": {maxLog + 1, 0}, "short.log": {maxLog - 1, maxLog - 1}, "other": {maxConsole, maxConsole},
	}
	for file, size := range sizes {
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size[0])); err != nil {
			t.Fatal(err)
		}
	}
	k.trimLogs()
	for file, size := range sizes {
		if fi, err := os.Stat(file); err != nil || fi.Size() != size[1] {
			t.Errorf("%s: %v, %v; want %d bytes", file, fi, err, size[1])
		}
	}
	if err := os.Truncate(k.cfg.Spec.Console, maxConsole-1); err != nil {
		t.Fatal(err)
	}
	k.trimLogs()
	if fi, err := os.Stat(k.cfg.Spec.Console); err != nil || fi.Size() != maxConsole-1 {
		t.Errorf("a console that isn't that long: %v, %v", fi, err)
	}
}

// A keeper that ends before it could say anything has said why in its log, and so does Ready.
func TestKeeperThatCannotKeep(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	cfg := config(wellBehaved)
	cfg.Driver = "other"
	for range 2 {
		c := b.start(cfg)
		if err := c.Ready(t.Context()); err == nil || strings.Count(err.Error(), `there is no driver "other"`) != 1 {
			t.Errorf("Ready: %v", err)
		}
	}
	b.nothingRuns()
}

// A shed that has just ended can be started at once, even if somebody doesn't read what there is still to be read of it.
func TestStartWhileTheKeeperLingers(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.startUp(wellBehaved)
	for range 3 {
		conn, err := c.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := agent.WriteMessage(conn, agent.Request{Exec: &shed.Command{Script: "echo"}}); err != nil {
			t.Fatal(err)
		}
		stuff(conn, 300*time.Millisecond)
		watched := make(chan Exit, 1)
		go func() { watched <- b.watch(c) }()
		off, err := c.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		agent.Call(t.Context(), off, agent.Request{PowerOff: &agent.PowerOff{}})
		off.Close()
		if exit := <-watched; exit.Cause != vm.PowerOff {
			t.Errorf("%+v", exit)
		}
		c = b.startUp(wellBehaved)
		b.echo(c)
	}
	b.wantBoots(4)
	b.stop(c, time.Minute, "")
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
	monitor, err := strconv.Atoi(string(pid))
	if err != nil {
		t.Fatal(err)
	}
	b.freeze(monitor)
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
