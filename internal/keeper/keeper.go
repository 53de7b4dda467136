//go:build linux

// Package keeper is the process that each running shed has, and how the server
// talks to it. A keeper owns its shed's machine, network and link to the agent, so
// that the server may come and go. If a keeper itself is killed, its machine runs on, and the
// next keeper takes that over.
package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/network"
	"github.com/charliek/shed/internal/vm"
)

// Files in a shed's run directory, next to those of the driver.
const (
	RunDir     = "run"
	configFile = "keeper.json"
	lockFile   = "keeper.lock"
	socketFile = "keeper.sock"
	logFile    = "keeper.log"
	exitFile   = "exit.json"
)

// Config is what a keeper is started with.
type Config struct {
	Driver         string      `json:"driver"`
	Accel          string      `json:"accel"`
	Spec           vm.Spec     `json:"spec"`
	Setup          agent.Setup `json:"setup"`
	AllowHostPorts []int       `json:"allow_host_ports,omitempty"`
	// BootTimeout bounds the time until the agent has set the machine up. A
	// machine that takes longer is started once more, and then given up.
	BootTimeout time.Duration `json:"boot_timeout"`
}

// Exit is how a shed's run ended.
type Exit struct {
	vm.Exit
	Asked bool      `json:"asked"` // the server asked for it
	At    time.Time `json:"at"`
}

// keeper is the process's state.
type keeper struct {
	dir    string // the run directory, which is the working directory too
	cfg    Config
	driver vm.Driver
	log    *slog.Logger

	ready chan struct{} // closed when the agent answers, or booting has failed
	ended chan struct{} // closed when exit is set

	mu       sync.Mutex
	machine  vm.Machine
	client   *agent.Client
	bootErr  error
	setupErr error
	asked    bool
	exit     Exit
}

// Run is the keeper of the shed in dir until its machine has ended. newDriver makes the driver
// that the configuration names. The lock on the run directory is inherited from the server.
func Run(ctx context.Context, dir string, newDriver func(Config) (vm.Driver, error)) error {
	run := filepath.Join(dir, RunDir)
	// The machine's monitor, which outlives its keeper, must not inherit the lock.
	unix.CloseOnExec(lockFD)
	// Sockets and the driver's files are named relative to it: paths of sockets are short.
	if err := os.Chdir(run); err != nil {
		return err
	}
	b, err := os.ReadFile(configFile)
	if err != nil {
		return err
	}
	k := &keeper{
		dir: run, log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		ready: make(chan struct{}), ended: make(chan struct{}),
	}
	if err := json.Unmarshal(b, &k.cfg); err != nil {
		return fmt.Errorf("%s: %w", configFile, err)
	}
	if k.driver, err = newDriver(k.cfg); err != nil {
		return err
	}
	if err := os.Remove(socketFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socketFile)
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { k.serve(listener, &serving) })

	exit := k.keep(ctx)
	exit.At = time.Now().UTC()
	if b, err := json.Marshal(exit); err != nil {
		k.log.Error("recording the end", "err", err)
	} else if err := renameio.WriteFile(filepath.Join("..", exitFile), b, 0o600); err != nil {
		k.log.Error("recording the end", "err", err)
	}
	k.mu.Lock()
	k.exit = exit
	k.mu.Unlock()
	close(k.ended)
	listener.Close()
	serving.Wait()
	return nil
}

// keep runs the machine, again after each reboot, until it has ended.
func (k *keeper) keep(ctx context.Context) Exit {
	nw, err := network.New(network.Config{AllowHostPorts: k.cfg.AllowHostPorts, Log: k.log})
	if err != nil {
		return k.failed(err)
	}
	defer nw.Close()
	m, err := k.driver.Find(ctx, k.dir)
	found := err == nil
	if err != nil && !errors.Is(err, vm.ErrNotRunning) {
		return k.failed(err)
	}
	for retried := false; ; {
		if !found {
			if m, err = k.driver.Start(ctx, k.dir, k.cfg.Spec); err != nil {
				return k.failed(err)
			}
		}
		exit, up := k.run(ctx, m, nw, found)
		found = false
		switch {
		case k.setupErr != nil:
			return k.failed(fmt.Errorf("the agent could not set the machine up: %w", k.setupErr))
		case !up && !retried && !k.isAsked():
			// Under emulation a boot may hang for good: one in some hundreds.
			k.log.Warn("the machine did not come up, trying once more", "cause", exit.Cause, "detail", exit.Detail)
			retried = true
		case !up:
			return k.failed(fmt.Errorf("the machine did not come up: %s", describe(exit)))
		case exit.Cause == vm.Reboot && !k.isAsked():
			k.log.Info("the machine reboots")
		default:
			k.setReady(nil)
			return Exit{Exit: exit, Asked: k.isAsked()}
		}
	}
}

// run sees one machine through: up says whether its agent ever answered.
func (k *keeper) run(ctx context.Context, m vm.Machine, nw *network.Network, found bool) (exit vm.Exit, up bool) {
	k.mu.Lock()
	k.machine = m
	asked := k.asked
	k.mu.Unlock()
	if asked { // before there was a machine to end
		m.Kill()
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { k.serveNetwork(ctx, m, nw) })
	wg.Go(func() { k.trimConsole(ctx) })

	booted := make(chan struct{})
	var timedOut bool
	wg.Go(func() {
		select {
		case <-booted:
		case <-ctx.Done():
		case <-time.After(k.cfg.BootTimeout):
			k.mu.Lock()
			timedOut = true
			k.mu.Unlock()
			m.Kill()
		}
	})
	wg.Go(func() { k.serveLink(ctx, m, found, booted) })
	exit, err := m.Wait(ctx)
	if err != nil {
		exit = vm.Exit{Cause: vm.Killed, Detail: "the keeper was told to end"}
		m.Kill()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if timedOut {
		exit.Detail = fmt.Sprintf("the agent did not answer within %v", k.cfg.BootTimeout)
	}
	select {
	case <-booted:
		return exit, true
	default:
		return exit, false
	}
}

func describe(e vm.Exit) string {
	if e.Detail != "" {
		return e.Detail
	}
	switch e.Cause {
	case vm.Panic, vm.Reboot:
		return "its kernel gave up"
	case vm.PowerOff:
		return "it turned itself off"
	}
	return string(e.Cause)
}

// serveNetwork connects the machine's card to the network, again when the connection breaks.
func (k *keeper) serveNetwork(ctx context.Context, m vm.Machine, nw *network.Network) {
	for ctx.Err() == nil {
		conn, err := m.DialNetwork(ctx)
		if err == nil {
			err = nw.Serve(ctx, conn)
			conn.Close()
		}
		if ctx.Err() == nil {
			k.log.Debug("the machine's network", "err", err)
			sleep(ctx, 20*time.Millisecond)
		}
	}
}

// serveLink keeps the link to the agent. After the first time the guest may be in the middle of a session.
func (k *keeper) serveLink(ctx context.Context, m vm.Machine, resync bool, booted chan<- struct{}) {
	for first := true; ctx.Err() == nil; first = false {
		client, err := k.connectAgent(ctx, m, resync || !first)
		if err != nil {
			var setup setupError
			if errors.As(err, &setup) && booted != nil {
				// The agent is there and can't make the machine the shed: waiting doesn't help.
				k.mu.Lock()
				k.setupErr = setup
				k.mu.Unlock()
				m.Kill()
				return
			}
			if ctx.Err() == nil {
				k.log.Warn("the link to the agent", "err", err)
				sleep(ctx, 100*time.Millisecond)
			}
			continue
		}
		k.mu.Lock()
		k.client = client
		k.mu.Unlock()
		if booted != nil {
			close(booted)
			booted = nil
			k.setReady(nil)
		}
		select {
		case <-client.Done():
		case <-ctx.Done():
		}
		client.Close()
		k.mu.Lock()
		k.client = nil
		k.mu.Unlock()
	}
}

func (k *keeper) connectAgent(ctx context.Context, m vm.Machine, resync bool) (*agent.Client, error) {
	conn, err := m.DialLink(ctx)
	if err != nil {
		return nil, err
	}
	client, err := agent.Connect(ctx, conn, resync)
	if err != nil {
		return nil, err
	}
	setup := k.cfg.Setup
	setup.Clock = agent.Clock{UnixNano: time.Now().UnixNano()}
	stream, err := client.Open(ctx)
	if err == nil {
		err = agent.Call(ctx, stream, agent.Request{Setup: &setup})
	}
	if err != nil {
		client.Close()
		return nil, setupError{err}
	}
	stream.Close()
	return client, nil
}

// setupError is what the agent says went wrong in making the machine the shed.
type setupError struct{ error }

func (e setupError) Unwrap() error { return e.error }

// A console that a guest writes to without end must not fill the host's disk.
const maxConsole = 16 << 20

func (k *keeper) trimConsole(ctx context.Context) {
	for sleep(ctx, 30*time.Second) {
		fi, err := os.Stat(k.cfg.Spec.Console)
		if err != nil || fi.Size() < maxConsole {
			continue
		}
		// The monitor appends: it goes on at the new end.
		if err := os.Truncate(k.cfg.Spec.Console, 0); err != nil {
			k.log.Warn("trimming the console", "err", err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (k *keeper) failed(err error) Exit {
	k.log.Error("the shed did not start", "err", err)
	k.setReady(err)
	return Exit{Exit: vm.Exit{Cause: vm.Failed, Detail: err.Error()}, Asked: k.isAsked()}
}

// setReady settles whether the shed came up; only the first call counts.
func (k *keeper) setReady(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.ready:
	default:
		k.bootErr = err
		close(k.ready)
	}
}

func (k *keeper) isAsked() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

// lockFD is the descriptor of the lock in a keeper.
const lockFD = 3

const lockPatience = 2 * time.Second

// lock takes the lock on a run directory. It is held by whoever has the file open: the
// server while it starts a keeper, and then the keeper, which inherits it.
func lock(run string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(run, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// A keeper that is killed lets go of the lock only after its sockets, and who looks
	// for a keeper holds it for a moment.
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			return nil, err
		}
	}
}
