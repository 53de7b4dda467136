//go:build linux

package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/proclock"
	"github.com/charliek/shed/internal/vm"
)

// box is a shed's directory.
type box struct {
	*testing.T
	dir, run string
}

// newBox returns a directory that nothing may run for when the test has ended.
func newBox(t *testing.T) *box {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120)) // longer than the address of a socket
	b := &box{T: t, dir: dir, run: filepath.Join(dir, RunDir)}
	t.Cleanup(func() {
		if running(b.run) {
			if !t.Failed() {
				t.Error("the machine still runs")
			}
			if err := (fakeMachine{b.run}).Kill(); err != nil {
				t.Error(err)
			}
		}
		if b.hasKeeper() {
			if !t.Failed() {
				t.Error("the keeper still runs")
			}
			if err := killKeeper(b.run); err != nil {
				t.Error(err)
			}
		}
		log, err := os.ReadFile(filepath.Join(b.run, logFile))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if strings.Contains(string(log), "DATA RACE") || strings.Contains(string(log), "panic:") {
			t.Error("the keeper was unwell")
		}
		if t.Failed() {
			t.Logf("the keeper's log:\n%s", log)
		}
	})
	return b
}

func config(behaviour string) Config {
	return Config{Driver: "fake", Spec: vm.Spec{Kernel: behaviour}, BootTimeout: time.Minute}
}

func (b *box) start(cfg Config) *Client {
	b.Helper()
	c, err := Start(b.Context(), os.Args[0], b.dir, cfg)
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func (b *box) startUp(behaviour string) *Client {
	b.Helper()
	c := b.start(config(behaviour))
	if err := c.Ready(b.Context()); err != nil {
		b.Fatal(err)
	}
	return c
}

// stop stops the shed with the keeper that there is. It wants that to have taken force for a reason
// with these words, or none for "".
func (b *box) stop(c *Client, grace time.Duration, words string) {
	b.Helper()
	b.stopBy(c.stop, grace, words)
}

// stopBy is stop by one of the ways that there are.
func (b *box) stopBy(stop func(context.Context, time.Duration) (string, error), grace time.Duration, words string) {
	b.Helper()
	forced, err := stop(b.Context(), grace)
	if err != nil {
		b.Fatalf("Stop: %v", err)
	}
	b.ended(forced, words)
}

// ended wants the shed to have ended as it was asked to, by force for a reason with these words.
func (b *box) ended(forced, words string) {
	b.Helper()
	if (forced == "") != (words == "") || !strings.Contains(forced, words) {
		b.Errorf("forced because %q, want %q", forced, words)
	}
	b.nothingRuns()
	if exit, ok := LastExit(b.dir); !ok || !exit.Asked {
		b.Errorf("exit %+v, %v; want one that was asked for", exit, ok)
	}
}

func (b *box) nothingRuns() {
	b.Helper()
	if running(b.run) {
		b.Error("the machine still runs")
	}
	if _, err := Find(b.dir); !errors.Is(err, ErrNotRunning) {
		b.Errorf("Find: %v, want ErrNotRunning", err)
	}
}

// watch returns how the machine ends, or has ended: a keeper that has gone by then can't be asked.
func (b *box) watch(c *Client) Exit {
	exit, err := c.Watch(b.Context())
	if errors.Is(err, ErrNotRunning) {
		var ok bool
		if exit, ok = LastExit(b.dir); ok {
			err = nil
		}
	}
	if err != nil {
		b.Errorf("Watch: %v", err)
	}
	return exit
}

// echo wants the agent to be there.
func (b *box) echo(c *Client) {
	b.Helper()
	conn, err := c.Open(b.Context())
	if err != nil {
		b.Fatalf("Open: %v", err)
	}
	defer conn.Close()
	if err := agent.WriteMessage(conn, agent.Request{Exec: &shed.Command{Script: "echo"}}); err != nil {
		b.Fatal(err)
	}
	want := "hello"
	if _, err := io.WriteString(conn, want); err != nil {
		b.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		b.Fatalf("%q, %v; want %q", got, err, want)
	}
}

// endAgent lets the agent of a machine end.
func (b *box) endAgent(c *Client) {
	b.Helper()
	conn, err := c.Open(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	if err := agent.WriteMessage(conn, agent.Request{Exec: &shed.Command{Script: "end the agent"}}); err != nil {
		b.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); n != 0 { // or it ends with an error
		b.Fatalf("%d bytes, %v", n, err)
	}
}

// boots is how often the machine was started.
func (b *box) boots() int {
	b.Helper()
	s, err := os.ReadFile(filepath.Join(b.run, monitorBoots))
	if err != nil {
		b.Fatal(err)
	}
	return len(s)
}

func (b *box) wantBoots(want int) {
	b.Helper()
	if n := b.boots(); n != want {
		b.Errorf("%d boots, want %d", n, want)
	}
}

// stuff writes to conn for as long as anything takes it, where nobody reads.
func stuff(conn net.Conn, patience time.Duration) {
	conn.SetWriteDeadline(time.Now().Add(patience))
	for {
		if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
			return
		}
	}
}

func (b *box) hasKeeper() bool {
	b.Helper()
	held, err := locked(b.run)
	if err != nil {
		b.Fatal(err)
	}
	return held
}

// keeperPID returns the pid of the keeper.
func (b *box) keeperPID() int {
	b.Helper()
	p, err := proclock.Find(filepath.Join(b.run, lockFile), lockPatience)
	if err != nil {
		b.Fatalf("there is no keeper: %v", err)
	}
	return p.PID()
}

// freeze stops a process, and returns when none of its threads runs any more.
func (b *box) freeze(pid int) {
	b.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		b.Fatal(err)
	}
	for running := true; running; time.Sleep(time.Millisecond) {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(stats) == 0 {
			b.Fatalf("the threads of process %d: %v, %v", pid, stats, err)
		}
		running = slices.ContainsFunc(stats, func(file string) bool {
			stat, err := os.ReadFile(file)
			return err == nil && !bytes.Contains(stat, []byte(") T "))
		})
	}
}

// killKeeper kills the keeper and waits for its end.
func (b *box) killKeeper() {
	b.Helper()
	if err := syscall.Kill(b.keeperPID(), syscall.SIGKILL); err != nil {
		b.Fatal(err)
	}
	for b.hasKeeper() {
		time.Sleep(time.Millisecond)
	}
}

func (b *box) writeConfig(content any) {
	b.Helper()
	s, ok := content.(string)
	if !ok {
		j, err := json.Marshal(content)
		if err != nil {
			b.Fatal(err)
		}
		s = string(j)
	}
	if err := os.MkdirAll(b.run, 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.run, configFile), []byte(s), 0o600); err != nil {
		b.Fatal(err)
	}
}
