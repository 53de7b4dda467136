//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// killRounds is how often TestKill kills the server, unless SHED_KILL_ROUNDS says otherwise.
const killRounds = 25

// TestKill kills the server at random moments of what it does and looks, each time, whether
// the next server makes sense of what the last one left. SHED_KILL_SEED repeats a run as far
// as chance allows.
func TestKill(t *testing.T) {
	t.Parallel()
	dependOnSources(t)
	rounds := envInt(t, "SHED_KILL_ROUNDS", killRounds)
	seed := envInt(t, "SHED_KILL_SEED", int(time.Now().UnixNano()&0xffffffff))
	t.Logf("SHED_KILL_SEED=%d SHED_KILL_ROUNDS=%d", seed, rounds)

	s, err := newServer("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.log())
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	if err := fillState(t, s.state); err != nil {
		t.Fatal(err)
	}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	k := &killer{server: s, rand: rand.New(rand.NewPCG(uint64(seed), 0)), ctx: t.Context(), marked: map[string]mark{}}
	if err := k.createCanary(); err != nil {
		t.Fatal(err)
	}
	for round := range rounds {
		did, err := k.round()
		if err == nil && round%3 == 2 {
			err = k.use()
		}
		if err != nil {
			t.Fatalf("round %d, %s: %v", round, did, err)
		}
	}
}

func envInt(t *testing.T, name string, otherwise int) int {
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// canary is the shed that nobody touches.
const canary = "canary"

type killer struct {
	*server
	rand   *rand.Rand
	ctx    context.Context
	proof  string          // what the canary's file, process and boot ID look like
	pid    string          // of the canary's process
	marked map[string]mark // by name of the shed
}

// mark is what was written to a shed.
type mark struct {
	created time.Time // of the shed, which may be another one of that name
	text    string
}

func (k *killer) createCanary() error {
	if _, err := k.shed(k.ctx, "create", canary); err != nil {
		return err
	}
	pid, err := k.shed(k.ctx, "exec", canary, "--", "sh", "-c",
		"echo alive >file; echo alive >/dev/shm/memory; sync; sleep 1000000 >/dev/null 2>&1 </dev/null & echo $!")
	if err != nil {
		return err
	}
	k.pid = strings.TrimSpace(pid)
	k.proof, err = k.askCanary()
	return err
}

func (k *killer) askCanary() (string, error) {
	return k.shed(k.ctx, "exec", canary, "--", "sh", "-c",
		"cat file /dev/shm/memory /proc/sys/kernel/random/boot_id && ps -o args= -p "+k.pid)
}

// round lets the server do something, kills it, starts another, and checks what that one finds.
func (k *killer) round() (did string, err error) {
	sheds, err := k.list(k.ctx)
	if err != nil {
		return "", err
	}
	var commands [][]string
	for _, name := range []string{"one", "two"} {
		if k.rand.IntN(4) == 0 {
			continue
		}
		i := slices.IndexFunc(sheds, func(s *shed.Shed) bool { return s.Name == name })
		switch {
		case i < 0:
			commands = append(commands, []string{"create", name})
		case k.rand.IntN(3) == 0:
			commands = append(commands, []string{"delete", "--force", name})
		case sheds[i].Status == shed.StatusRunning:
			commands = append(commands, []string{"stop", name})
		default:
			commands = append(commands, []string{"start", name})
		}
	}
	delay := time.Duration(k.rand.Int64N(int64(3500 * time.Millisecond)))
	did = fmt.Sprintf("%v, killed after %v", commands, delay.Round(time.Millisecond))

	var wg sync.WaitGroup
	for _, args := range commands {
		wg.Go(func() {
			// It fails or not, depending on when the server dies.
			_, _ = k.shed(k.ctx, args...)
		})
	}
	time.Sleep(delay)
	err = k.kill()
	wg.Wait()
	if err == nil {
		err = k.start()
	}
	if err == nil {
		err = eventually(k.check)
	}
	if err != nil {
		return did, err
	}
	proof, err := k.askCanary()
	if err == nil && proof != k.proof {
		err = fmt.Errorf("the canary was\n%sand is\n%s", k.proof, proof)
	}
	return did, err
}

// check compares what is listed with the directories and processes that there are. A shed that was being
// stopped may still be at it.
func (k *killer) check() error {
	sheds, err := k.list(k.ctx)
	if err != nil {
		return err
	}
	processes, err := k.processes()
	if err != nil {
		return err
	}
	listed := map[string]bool{}
	for _, sh := range sheds {
		listed[sh.Name] = true
		want := 0
		switch sh.Status {
		case shed.StatusRunning:
			want = 1
		case shed.StatusStopped:
		default:
			return fmt.Errorf("shed %s is %s: %s", sh.Name, sh.Status, sh.Reason)
		}
		for _, kind := range []string{"keeper", "vmm"} {
			n := 0
			for _, p := range processes {
				if p.shed == sh.Name && p.kind == kind {
					n++
				}
			}
			if n != want {
				return fmt.Errorf("shed %s is %s and has %d processes of kind %s: %v", sh.Name, sh.Status, n, kind, processes)
			}
		}
	}
	if !listed[canary] {
		return permanent{errors.New("the canary is gone")}
	}
	for _, p := range processes {
		if !listed[p.shed] {
			return fmt.Errorf("%v runs, and no such shed is listed", p)
		}
	}
	left, err := filepath.Glob(filepath.Join(k.state, "sheds", "*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if !listed[filepath.Base(dir)] {
			return fmt.Errorf("%s is left, and no such shed is listed", dir)
		}
	}
	return nil
}

// use finds out whether all sheds work, and still have what was written there.
func (k *killer) use() error {
	sheds, err := k.list(k.ctx)
	if err != nil {
		return err
	}
	for _, sh := range sheds {
		if sh.Name == canary {
			continue
		}
		m, ok := k.marked[sh.Name]
		if ok && m.created.Equal(sh.CreatedAt) {
			got, err := k.shed(k.ctx, "exec", sh.Name, "--", "cat", "mark")
			if err != nil {
				return err
			}
			if got != m.text {
				return fmt.Errorf("shed %s has %q where %q was written", sh.Name, got, m.text)
			}
		}
		m = mark{created: sh.CreatedAt, text: fmt.Sprintln(k.rand.Int())}
		if _, err := k.shed(k.ctx, "exec", sh.Name, "--", "sh", "-c", "echo $1 >mark && sync", "sh", strings.TrimSpace(m.text)); err != nil {
			return err
		}
		k.marked[sh.Name] = m
	}
	return nil
}
