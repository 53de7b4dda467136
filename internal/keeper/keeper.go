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

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/network"
	"github.com/charliek/shed/internal/proclock"
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
	upFile     = "up" // there is one while the machine that runs has come up
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

// record is what a keeper finds in its directory.
type record struct {
	Config
	Program string `json:"program"` // that keepers are run as: program "keep DIR"
	Found   bool   `json:"found"`   // the machine runs already: none is started
}

func readRecord(run string) (record, error) {
	var r record
	file := filepath.Join(run, configFile)
	b, err := os.ReadFile(file)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

func (r record) write(run string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(run, configFile), b, 0o600)
}

// Exit is how a shed's run ended.
type Exit struct {
	vm.Exit
	Code     shed.Code `json:"code,omitempty"` // of Detail, for Failed, if the agent gave it one
	Asked    bool      `json:"asked"`          // the server asked for it, or who sent the keeper a signal
	Signaled bool      `json:"signaled,omitempty"`
	At       time.Time `json:"at"`
}

// keeper is the process's state.
type keeper struct {
	dir    string // the run directory, which is the working directory too
	cfg    record
	driver vm.Driver
	log    *slog.Logger

	ready chan struct{} // closed when the agent answers, or booting has failed
	ended chan struct{} // closed when exit is set

	mu        sync.Mutex
	machine   vm.Machine
	client    *agent.Client
	agentGone time.Time // when the agent of a machine that was up was found to have ended, or 0
	bootErr   error
	setupErr  error
	asked     bool // to end the machine
	signaled  bool // it was a signal that asked
	force     bool // to end it at once
	exit      Exit
}

// Run is the keeper of the shed in dir until its machine has ended. When ctx is done, the machine is
// shut down cleanly. newDriver makes the driver that the configuration names. The lock on the run
// directory is inherited from the server.
func Run(ctx context.Context, dir string, newDriver func(Config) (vm.Driver, error)) error {
	run := filepath.Join(dir, RunDir)
	// The machine's monitor, which outlives its keeper, must not inherit the lock.
	unix.CloseOnExec(proclock.FD)
	// Sockets and the driver's files are named relative to it: paths of sockets are short.
	if err := os.Chdir(run); err != nil {
		return err
	}
	cfg, err := readRecord(".")
	if err != nil {
		return err
	}
	k := &keeper{
		dir: run, cfg: cfg, log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		ready: make(chan struct{}), ended: make(chan struct{}),
	}
	if k.driver, err = newDriver(cfg.Config); err != nil {
		return err
	}
	// What fails before it is known whether a machine runs is nothing that a machine has ended of.
	m, err := k.driver.Find(ctx, run)
	if err != nil && !errors.Is(err, vm.ErrNotRunning) {
		return err
	}
	nw, err := network.New(network.Config{AllowHostPorts: cfg.AllowHostPorts, Log: k.log})
	if err != nil {
		return err
	}
	defer nw.Close()
	if err := os.Remove(socketFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socketFile)
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	serveCtx, cutOff := context.WithCancel(context.Background())
	defer cutOff()
	serving.Go(func() { k.serve(serveCtx, listener, &serving) })
	serving.Go(func() { k.stopWhenDone(ctx) })

	exit := k.keep(serveCtx, m, nw)
	if exit.At.IsZero() {
		exit.At = time.Now().UTC()
		k.mu.Lock()
		exit.Asked, exit.Signaled = k.asked, k.signaled
		k.mu.Unlock()
	}
	if b, err := json.Marshal(exit); err != nil {
		k.log.Error("recording the end", "err", err)
	} else if err := renameio.WriteFile(filepath.Join("..", exitFile), b, 0o600); err != nil {
		k.log.Error("recording the end", "err", err)
	}
	// Who is told of the end, and starts the shed again, isn't to find this keeper.
	listener.Close()
	k.mu.Lock()
	k.exit = exit
	k.mu.Unlock()
	close(k.ended)
	// Somebody who doesn't read must not keep the keeper from ending.
	defer time.AfterFunc(linger, cutOff).Stop()
	serving.Wait()
	return nil
}

// linger is how long the last of a stream may take to be read once the machine has ended.
const linger = 2 * time.Second

// keep runs the machine, again after each reboot, until it has ended. It takes over the one that was found, if
// that isn't nil. The caller adds who asked for the end, and when it was.
func (k *keeper) keep(ctx context.Context, m vm.Machine, nw *network.Network) Exit {
	found := m != nil
	if !found && k.cfg.Found {
		k.setReady(errNotFound)
		if exit, ok := LastExit(".."); ok { // the keeper before saw the end
			return exit
		}
		return Exit{Exit: vm.Exit{Cause: vm.Killed, Detail: errNotFound.Error()}}
	}
	for retried := false; ; {
		if !found {
			if k.isAsked() {
				return k.failed(errors.New("it was stopped before its machine was started"))
			}
			if err := os.Remove(upFile); err != nil && !errors.Is(err, os.ErrNotExist) {
				return k.failed(err)
			}
			var err error
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
			return Exit{Exit: exit}
		}
	}
}

var errNotFound = errors.New("it ended while it had no keeper")

// run sees one machine through: up says whether its agent ever answered.
func (k *keeper) run(ctx context.Context, m vm.Machine, nw *network.Network, found bool) (exit vm.Exit, up bool) {
	k.mu.Lock()
	k.machine = m
	k.agentGone = time.Time{}
	force := k.force
	k.mu.Unlock()
	if force { // asked for before there was a machine to end
		k.kill(m)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { k.serveNetwork(ctx, m, nw) })
	wg.Go(func() {
		for sleep(ctx, trimInterval) {
			k.trimLogs()
		}
	})

	booted := make(chan struct{})
	if _, err := os.Stat(upFile); found && err == nil {
		// It may be long until its agent answers, or its agent may have ended: what runs there goes on.
		close(booted)
		k.setReady(nil)
	}
	var timedOut bool
	wg.Go(func() {
		select {
		case <-booted:
		case <-ctx.Done():
		case <-time.After(k.cfg.BootTimeout):
			k.mu.Lock()
			timedOut = true
			k.mu.Unlock()
			k.kill(m)
		}
	})
	wg.Go(func() { k.serveLink(ctx, m, found, booted) })
	exit, err := m.Wait(ctx)
	if err != nil {
		exit = vm.Exit{Cause: vm.Killed, Detail: err.Error()}
		k.kill(m)
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

func (k *keeper) kill(m vm.Machine) {
	if err := m.Kill(); err != nil {
		k.log.Error("killing the machine", "err", err)
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

// What a guest writes to without end, or makes others write to, must not fill the host's disk.
const (
	maxConsole   = 16 << 20
	maxLog       = 1 << 20
	trimInterval = 30 * time.Second
)

// trimLogs empties the console, and the keeper's and the monitor's logs, where they have become long. All are appended to: what
// comes then is at the new end.
func (k *keeper) trimLogs() {
	files := map[string]int64{k.cfg.Spec.Console: maxConsole}
	logs, err := filepath.Glob("*.log")
	for _, f := range logs {
		files[f] = maxLog
	}
	for f, limit := range files {
		if fi, serr := os.Stat(f); serr == nil && fi.Size() >= limit {
			err = errors.Join(err, os.Truncate(f, 0))
		}
	}
	if err != nil {
		k.log.Warn("trimming the logs", "err", err)
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
	return Exit{Exit: vm.Exit{Cause: vm.Failed, Detail: err.Error()}, Code: agent.ReplyCode(err)}
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
