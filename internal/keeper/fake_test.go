//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/proclock"
	"github.com/charliek/shed/internal/vm"
)

// The test's program is the keeper and the monitor too.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "keep" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err := Run(ctx, os.Args[2], func(cfg Config) (vm.Driver, error) {
			switch cfg.Driver {
			case "fake":
				return fakeDriver{}, nil
			case "blind":
				return blindDriver{}, nil
			}
			return nil, fmt.Errorf("there is no driver %q", cfg.Driver)
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 2 && os.Args[1] == "monitor" {
		if err := runMonitor(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// What a fake machine does, as its Spec's kernel.
const (
	wellBehaved    = "well-behaved"
	failsToStart   = "fails to start"
	panics         = "panics"           // instead of booting
	neverAnswers   = "never answers"    // its agent doesn't
	refusesSetup   = "refuses setup"    // its agent does
	refusesLater   = "refuses later"    // all but the first setup, at length
	ignoresOff     = "ignores off"      // it is asked to power off and goes on
	ignoresOffOnce = "ignores off once" // the first time
	rebootsAtOnce  = "reboots once"     // when it is asked to power off, the first time
	hangsOnce      = "hangs once"       // like neverAnswers, the first time
)

// Files in a fake machine's directory.
const (
	monitorLock  = "monitor.lock" // locked by the monitor, which wrote its pid there
	monitorExit  = "monitor.exit" // the vm.Cause of its end
	monitorBoots = "monitor.boots"
	noAgent      = "no-agent" // the agent has ended
	askedOff     = "asked-off"
	refusals     = "refusals"
	fakeLink     = "link.sock"
	fakeNet      = "net.sock"
)

// fakeDriver runs machines that are processes of the test's program: they outlive their keepers.
type fakeDriver struct{}

func (fakeDriver) Features() vm.Features { return vm.Features{} }

func (d fakeDriver) Start(ctx context.Context, dir string, spec vm.Spec) (vm.Machine, error) {
	if spec.Kernel == failsToStart {
		return nil, errors.New("the monitor says no")
	}
	for _, f := range []string{monitorExit, noAgent, fakeLink, fakeNet} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	cmd := exec.Command(os.Args[0], "monitor")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "BEHAVIOUR="+spec.Kernel)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go cmd.Wait()
	for !exists(filepath.Join(dir, fakeNet)) {
		time.Sleep(time.Millisecond)
	}
	return fakeMachine{dir}, nil
}

func (d fakeDriver) Find(_ context.Context, dir string) (vm.Machine, error) {
	if !running(dir) {
		return nil, vm.ErrNotRunning
	}
	return fakeMachine{dir}, nil
}

func (fakeDriver) Running(dir string) (bool, error) {
	return proclock.Held(filepath.Join(dir, monitorLock))
}

// refusal is the code that the agent of a machine has for its refusing a setup.
const refusal shed.Code = "NO_DISK"

// blindDriver can't tell whether a machine runs.
type blindDriver struct{ fakeDriver }

var errBlind = errors.New("nobody knows")

func (blindDriver) Find(context.Context, string) (vm.Machine, error) { return nil, errBlind }
func (blindDriver) Running(string) (bool, error)                     { return false, errBlind }

// running says whether a machine runs in dir.
func running(dir string) bool {
	runs, err := fakeDriver{}.Running(dir)
	if err != nil {
		panic(err)
	}
	return runs
}

type fakeMachine struct{ dir string }

func (m fakeMachine) DialLink(ctx context.Context) (net.Conn, error) {
	if exists(filepath.Join(m.dir, noAgent)) {
		return nil, vm.ErrLinkClosed
	}
	return vm.DialUnix(ctx, m.dir, fakeLink)
}

func (m fakeMachine) DialNetwork(ctx context.Context) (net.Conn, error) {
	return vm.DialUnix(ctx, m.dir, fakeNet)
}

func (m fakeMachine) Wait(ctx context.Context) (vm.Exit, error) {
	for running(m.dir) {
		if !sleep(ctx, time.Millisecond) {
			return vm.Exit{}, ctx.Err()
		}
	}
	b, err := os.ReadFile(filepath.Join(m.dir, monitorExit))
	if err != nil {
		return vm.Exit{Cause: vm.Killed, Detail: "the monitor was killed"}, nil
	}
	return vm.Exit{Cause: vm.Cause(b)}, nil
}

func (m fakeMachine) Kill() error {
	if !running(m.dir) {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(m.dir, monitorLock))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	_, err = m.Wait(context.Background())
	return err
}

// runMonitor is a machine with its agent, in the working directory.
func runMonitor() error {
	behaviour := os.Getenv("BEHAVIOUR")
	lock, err := os.OpenFile(monitorLock, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // and not before
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	if _, err := fmt.Fprint(lock, os.Getpid()); err != nil {
		return err
	}
	boots, err := os.OpenFile(monitorBoots, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(boots, "x"); err != nil {
		return err
	}
	fi, err := boots.Stat()
	if err != nil {
		return err
	}
	first := fi.Size() == 1
	if behaviour == panics {
		if err := os.WriteFile(monitorExit, []byte(vm.Panic), 0o600); err != nil {
			return err
		}
		return os.WriteFile(fakeNet, nil, 0o600)
	}
	links, err := net.Listen("unix", fakeLink)
	if err != nil {
		return err
	}
	port, hosts, err := fakePort()
	if err != nil {
		return err
	}
	go serveHosts(links, hosts)
	nets, err := net.Listen("unix", fakeNet)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := nets.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, conn)
		}
	}()
	if behaviour == neverAnswers || behaviour == hangsOnce && first {
		select {}
	}
	return agent.ServePort(port, func(s *agent.Stream) {
		var req agent.Request
		if err := agent.ReadMessage(s, &req); err != nil {
			s.Reset()
			return
		}
		var reply agent.Reply
		switch {
		case req.Exec != nil:
			if req.Exec.Script == "end the agent" {
				if err := os.WriteFile(noAgent, nil, 0o600); err != nil {
					panic(err)
				}
				links.Close()
				hosts.Close()
				return
			}
			io.Copy(s, s)
			s.Close()
			return
		case req.Setup != nil && behaviour == refusesSetup:
			reply = agent.Reply{Error: "there is no disk", Code: refusal}
		case req.Setup != nil && behaviour == refusesLater:
			if fi, err := os.Stat(refusals); err == nil {
				reply.Error = strings.Repeat("there is no disk"+strings.Repeat(".", 1000), 1000)
				if err := os.WriteFile(refusals, make([]byte, fi.Size()+1), 0o600); err != nil {
					panic(err)
				}
			} else if err := os.WriteFile(refusals, nil, 0o600); err != nil {
				panic(err)
			}
		case req.PowerOff != nil && (behaviour == ignoresOff || behaviour == ignoresOffOnce && !exists(askedOff)):
			if err := os.WriteFile(askedOff, nil, 0o600); err != nil {
				panic(err)
			}
		case req.PowerOff != nil:
			cause := vm.PowerOff
			if behaviour == rebootsAtOnce && first {
				cause = vm.Reboot
			}
			defer func() {
				if err := os.WriteFile(monitorExit, []byte(cause), 0o600); err != nil {
					panic(err)
				}
				os.Exit(0)
			}()
		}
		agent.WriteMessage(s, reply)
		s.Close()
	})
}

// fakePort returns both ends of a port: the guest's, and the one that hosts are connected to.
func fakePort() (guest *os.File, host net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fds[1]), "host")
	defer f.Close()
	host, err = net.FileConn(f)
	return os.NewFile(uintptr(fds[0]), "port"), host, err
}

// serveHosts gives the port to one connection after the other.
func serveHosts(l net.Listener, port net.Conn) {
	var mu sync.Mutex
	var current net.Conn
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := port.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			conn := current
			mu.Unlock()
			if conn != nil {
				conn.Write(b[:n]) // what is for a host that has gone is lost
			}
		}
	}()
	for {
		conn, err := l.Accept()
		if err != nil {
			mu.Lock()
			if current != nil {
				current.Close()
			}
			mu.Unlock()
			return
		}
		mu.Lock()
		current = conn
		mu.Unlock()
		go io.Copy(port, conn)
	}
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}
