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
		if (fakeDriver{}).Running(b.run) {
			if !t.Failed() {
				t.Error("the machine still runs")
			}
			if err := (fakeMachine{b.run}).Kill(); err != nil {
				t.Error(err)
			}
		}
		if locked(b.run) {
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
	c, err := Start(os.Args[0], b.dir, cfg)
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
	if (fakeDriver{}).Running(b.run) {
		b.Error("the machine still runs")
	}
	if _, err := Find(b.dir); !errors.Is(err, ErrNotRunning) {
		b.Errorf("Find: %v, want ErrNotRunning", err)
	}
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

// keeperPID returns the pid of the keeper.
func (b *box) keeperPID() int {
	b.Helper()
	lock, err := os.Stat(filepath.Join(b.run, lockFile))
	if err != nil {
		b.Fatal(err)
	}
	pid, err := findHolder(lock)
	if pid == 0 || err != nil {
		b.Fatalf("there is no keeper: %v", err)
	}
	return pid
}

func (b *box) signalKeeper(sig syscall.Signal) {
	b.Helper()
	if err := syscall.Kill(b.keeperPID(), sig); err != nil {
		b.Fatal(err)
	}
}

// freezeKeeper stops the keeper, and returns when none of its threads runs any more.
func (b *box) freezeKeeper() {
	b.Helper()
	b.signalKeeper(syscall.SIGSTOP)
	for running := true; running; time.Sleep(time.Millisecond) {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", b.keeperPID()))
		if err != nil || len(stats) == 0 {
			b.Fatalf("the keeper's threads: %v, %v", stats, err)
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
	b.signalKeeper(syscall.SIGKILL)
	for locked(b.run) {
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
