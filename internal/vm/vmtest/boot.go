//go:build linux

package vmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/kernel"
	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/vmtest/guest"
)

// bootFiles returns a kernel and an initramfs with the suite's guest. The kernel is kept in
// SHED_TEST_CACHE, or below the user's cache directory.
func bootFiles(t *testing.T) (kernelFile, initrd string) {
	t.Helper()
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", init, "github.com/charliek/shed/internal/vm/vmtest/guest/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the guest: %v\n%s", err, out)
	}
	root := os.Getenv("SHED_TEST_CACHE")
	if root == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			cache = os.TempDir()
		}
		root = filepath.Join(cache, "shed-e2e")
	}
	kernelFile, initrd, err := fromCache(t.Context(), root, init, dir)
	if err != nil {
		t.Fatalf("a kernel from the cache %s: %v", root, err)
	}
	return kernelFile, initrd
}

// fromCache copies what it returns to dir: the cache may be emptied by others, who hold its lock.
func fromCache(ctx context.Context, root, init, dir string) (kernelFile, initrd string, err error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", "", err
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", "", err
	}
	store, err := kernel.Open(filepath.Join(root, "kernels"))
	if err != nil {
		return "", "", err
	}
	bundle, err := store.Default(ctx, nil)
	if err != nil {
		return "", "", err
	}
	made, err := bundle.Initramfs(ctx, init)
	if err != nil {
		return "", "", err
	}
	kernelFile, initrd = filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")
	err = errors.Join(copyFile(bundle.Kernel(), kernelFile), copyFile(made, initrd), os.Remove(made))
	return kernelFile, initrd, err
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// bootTimeout is when a machine is given up and started once more: under
// emulation a boot may hang for good, one in some hundreds.
const bootTimeout = time.Minute

// boot starts a machine in dir and connects to its guest. When the test ends, so does the machine.
func boot(t *testing.T, d vm.Driver, dir string, spec vm.Spec) (vm.Machine, *link) {
	t.Helper()
	return bootWith(t, spec, func() (vm.Machine, error) { return d.Start(t.Context(), dir, spec) })
}

// bootElsewhere does the same with a machine that is started by another process, which has
// ended by then.
func (s *suite) bootElsewhere(t *testing.T, d vm.Driver, dir string, spec vm.Spec) (vm.Machine, *link) {
	t.Helper()
	return bootWith(t, spec, func() (vm.Machine, error) {
		if err := startElsewhere(s.test, dir, spec); err != nil {
			return nil, err
		}
		return d.Find(t.Context(), dir)
	})
}

func bootWith(t *testing.T, spec vm.Spec, start func() (vm.Machine, error)) (vm.Machine, *link) {
	t.Helper()
	for try := 0; ; try++ {
		m, err := start()
		if err != nil {
			t.Fatalf("starting a machine: %v", err)
		}
		t.Cleanup(func() {
			if err := m.Kill(); err != nil {
				t.Errorf("Kill: %v", err)
			}
			if t.Failed() {
				t.Logf("the end of the console:\n%s", vm.LastLines(spec.Console, 0, 20))
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
		l, err := dial(ctx, t, m, false)
		cancel()
		if err == nil {
			return m, l
		}
		if try > 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the guest doesn't answer: %v", err)
		}
		t.Logf("the guest didn't answer; starting the machine once more. The end of the console:\n%s", vm.LastLines(spec.Console, 0, 20))
		if err := m.Kill(); err != nil {
			t.Fatalf("Kill: %v", err)
		}
	}
}

// link is a connection to the guest.
type link struct {
	*agent.Client
	conn net.Conn
}

func dial(ctx context.Context, t *testing.T, m vm.Machine, resync bool) (*link, error) {
	conn, err := m.DialLink(ctx)
	if err != nil {
		return nil, err
	}
	c, err := agent.Connect(ctx, conn, resync)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return &link{Client: c, conn: conn}, nil
}

// relink connects to a guest that has had a link.
func relink(t *testing.T, m vm.Machine) *link {
	t.Helper()
	l, err := dial(t.Context(), t, m, true)
	if err != nil {
		t.Fatalf("connecting again: %v", err)
	}
	return l
}

// send sends a request on a stream of its own.
func (l *link) send(t *testing.T, req guest.Request) *agent.Stream {
	t.Helper()
	s, err := l.Open(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", req.Op, err)
	}
	if err := agent.WriteMessage(s, req); err != nil {
		t.Fatalf("%s: %v", req.Op, err)
	}
	return s
}

// ask returns the reply to a request, which may be an error.
func (l *link) ask(t *testing.T, req guest.Request) guest.Reply {
	t.Helper()
	s := l.send(t, req)
	defer s.Close()
	var reply guest.Reply
	if err := agent.ReadMessage(s, &reply); err != nil {
		t.Fatalf("%s: no reply: %v", req.Op, err)
	}
	return reply
}

// must is ask for a request that has to succeed.
func (l *link) must(t *testing.T, req guest.Request) guest.Reply {
	t.Helper()
	reply := l.ask(t, req)
	if reply.Error != "" {
		t.Fatalf("%s: %s", req.Op, reply.Error)
	}
	return reply
}

func (l *link) look(t *testing.T) guest.Facts {
	t.Helper()
	return l.must(t, guest.Request{Op: guest.Look}).Facts
}

// ahead returns by how much the guest's clock is ahead of the time since start, as far as it can be told: when
// on the way of a request the guest reads it isn't known.
func (l *link) ahead(t *testing.T, start time.Time) (least, most time.Duration) {
	t.Helper()
	least, most = math.MinInt64, math.MaxInt64
	for range 20 {
		before := time.Since(start)
		clock := l.look(t).Clock
		least, most = max(least, clock-time.Since(start)), min(most, clock-before)
	}
	return least, most
}

// startEnv has what a process of its own is to start for the suite, and then to leave alone.
const startEnv = "SHED_VMTEST_START"

type startRequest struct {
	Dir  string  `json:"dir"`
	Spec vm.Spec `json:"spec"`
}

// starterOf returns a process that starts a machine, and ends.
func starterOf(test, dir string, spec vm.Spec) (*exec.Cmd, error) {
	b, err := json.Marshal(startRequest{dir, spec})
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(os.Args[0], "-test.run", test)
	cmd.Env = append(os.Environ(), startEnv+"="+string(b))
	return cmd, nil
}

// startElsewhere starts a machine from another process, which has ended when it returns.
func startElsewhere(test, dir string, spec vm.Spec) error {
	cmd, err := starterOf(test, dir, spec)
	if err != nil {
		return err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("from another process: %w\n%s", err, out)
	}
	return nil
}

// startAndLeave is what that process does.
func startAndLeave(t *testing.T, d vm.Driver, request string) {
	var req startRequest
	if err := json.Unmarshal([]byte(request), &req); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Start(t.Context(), req.Dir, req.Spec); err != nil {
		t.Fatal(err)
	}
	os.Exit(0)
}
