//go:build linux

package test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// binDir holds the programs under test. TestMain sets it.
var binDir string

// maxParallel is how many scripts run at a time: emulated machines need a core each.
const maxParallel = 2

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	if testing.Short() {
		fmt.Println("end-to-end tests: not run with -short")
		return 0
	}
	if err := flag.Set("test.parallel", fmt.Sprint(maxParallel)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "shed-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binDir = dir
	if err := build(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Not all of its directories does testscript remove by itself.
	os.Setenv("GOTMPDIR", dir)
	// Machines outlive whatever starts them, so an interrupted test has to end its own.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	unwatch := context.AfterFunc(ctx, func() {
		live.closeAll()
		os.RemoveAll(dir)
		os.Exit(1)
	})
	defer unwatch()
	return m.Run()
}

// build makes the programs as they are installed: side by side.
func build(dir string) error {
	for _, b := range []struct {
		args []string
		env  string
	}{
		{args: []string{"-o", dir, "../cmd/shed", "../cmd/shed-server"}},
		{
			args: []string{"-ldflags", "-s -w", "-o", filepath.Join(dir, "shed-agent-linux-"+runtime.GOARCH), "../cmd/shed-agent"},
			env:  "CGO_ENABLED=0",
		},
	} {
		cmd := exec.Command("go", append([]string{"build"}, b.args...)...)
		cmd.Env = append(os.Environ(), b.env)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
		}
	}
	return nil
}

// dependOnSources looks at all sources, so that go test knows that a cached result isn't
// one of the programs as they are now.
func dependOnSources(t *testing.T) {
	for _, dir := range []string{"../cmd", "../internal"} {
		if err := filepath.WalkDir(dir, func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
			t.Fatal(err)
		}
	}
}

// live are the servers that have not been closed.
var live registry

type registry struct {
	mu      sync.Mutex
	servers map[*server]bool
}

func (r *registry) add(s *server) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.servers == nil {
		r.servers = map[*server]bool{}
	}
	r.servers[s] = true
}

func (r *registry) remove(s *server) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.servers, s)
}

func (r *registry) closeAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var err error
	for s := range r.servers {
		err = errors.Join(err, s.endAll(), os.RemoveAll(s.dir))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
