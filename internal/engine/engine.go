//go:build linux

// Package engine is the life of sheds: create, start, stop, reset, delete. It keeps
// their order, undoes what fails, and finds out after a crash what was going on.
package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/build"
	"github.com/charliek/shed/internal/image"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/kernel"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
)

// Files of a shed, besides its record and what the keeper has.
const (
	upperFile     = "upper.img"
	consoleFile   = "console.log"
	provisionFile = "provision.log"
)

// Backend is a machine monitor and what its sheds get unless they ask for something else.
type Backend struct {
	Driver   vm.Driver
	Accel    string
	Image    string
	Aliases  map[string]string
	Pull     PullPolicy
	CPUs     int
	MemoryMB int
	// BootTimeout bounds the time that a machine may take to come up.
	BootTimeout time.Duration
}

// maxLayers is how many block images of layers a machine has room for, besides the upper and the modules.
func (b Backend) maxLayers() int { return b.Driver.Features().MaxDisks - 2 }

// Config is what an Engine works with.
type Config struct {
	State          *state.Dir
	Images         *image.Store
	Kernels        *kernel.Store
	Backends       map[string]Backend // by name
	DefaultBackend string
	Program        string // shed-server itself: it is run as the keepers
	AgentBinary    string // the agent for the guest
	ServerName     string // SHED_SERVER
	Version        string // of this program: v{version} in a reference
	EnvFile        string // K=V lines for every command; "" means none
	AllowHostPorts []int
	Log            *slog.Logger
}

// Engine implements shed.Sheds and shed.Images.
type Engine struct {
	Config
	builder *build.Builder

	ctx    context.Context // of the watchers
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	sheds map[string]*entry
}

var (
	_ shed.Sheds  = (*Engine)(nil)
	_ shed.Images = (*Engine)(nil)
)

// entry is what is known of a shed now. Its fields are guarded by the engine's mutex.
type entry struct {
	op chan struct{} // holds a token while nobody works on the shed

	rec     state.Record
	status  shed.Status
	reason  string
	keeper  *keeper.Client
	watched chan struct{} // closed when the end of the run has been seen
}

// New returns an Engine that knows what the last one left, with what was cut
// off finished or undone. Close must be called.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	e := &Engine{Config: cfg, sheds: map[string]*entry{}}
	e.builder = build.New(e, buildImages{e})
	e.ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := e.reconcile(ctx); err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// Close lets go of the sheds, which run on.
func (e *Engine) Close() {
	e.cancel()
	e.wg.Wait()
}

func newEntry(rec state.Record, status shed.Status) *entry {
	en := &entry{op: make(chan struct{}, 1), rec: rec, status: status}
	en.op <- struct{}{}
	return en
}

// acquire waits until nobody else works on the named shed.
func (e *Engine) acquire(ctx context.Context, name string) (*entry, error) {
	if err := shed.ValidateName(name); err != nil {
		return nil, err
	}
	for {
		e.mu.Lock()
		en, ok := e.sheds[name]
		creating := ok && en.status == shed.StatusCreating
		e.mu.Unlock()
		if !ok {
			return nil, notFound(name)
		}
		if creating {
			return nil, shed.Errorf(shed.CodeConflict, "shed %q is being created", name).
				WithHint("wait until it is there, or interrupt the create")
		}
		select {
		case <-en.op:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		e.mu.Lock()
		current := e.sheds[name]
		e.mu.Unlock()
		if current == en {
			return en, nil
		}
		en.release() // it was deleted meanwhile
	}
}

func (en *entry) release() { en.op <- struct{}{} }

func notFound(name string) error {
	return shed.Errorf(shed.CodeNotFound, "there is no shed named %q", name).
		WithHint("`shed list` shows those that there are; `shed create %s` makes it", name)
}

func damaged(en *entry) error {
	return shed.Errorf(shed.CodeConflict, "shed %q is damaged: %s", en.rec.Name, en.reason).
		WithHint("restore its shed.json from a backup and restart shed-server, or remove it: shed delete %s", en.rec.Name)
}

// halfDeleted is about a shed whose removal failed.
func halfDeleted(en *entry) error {
	return shed.Errorf(shed.CodeConflict, "shed %q is being deleted: %s", en.rec.Name, en.reason).
		WithHint("shed delete %s tries that again", en.rec.Name)
}

// set changes what is known of a shed.
func (e *Engine) set(en *entry, status shed.Status, reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	en.status, en.reason = status, reason
}

func (e *Engine) List(ctx context.Context) ([]*shed.Shed, error) {
	e.mu.Lock()
	sheds := make([]*shed.Shed, 0, len(e.sheds))
	for _, en := range e.sheds {
		sheds = append(sheds, e.view(en))
	}
	e.mu.Unlock()
	sort.Slice(sheds, func(i, j int) bool { return sheds[i].Name < sheds[j].Name })
	for _, s := range sheds {
		s.DiskUsed = e.diskUsed(s.Name)
	}
	return sheds, nil
}

func (e *Engine) Get(ctx context.Context, name string) (*shed.Shed, error) {
	if err := shed.ValidateName(name); err != nil {
		return nil, err
	}
	e.mu.Lock()
	en, ok := e.sheds[name]
	var s *shed.Shed
	if ok {
		s = e.view(en)
	}
	e.mu.Unlock()
	if !ok {
		return nil, notFound(name)
	}
	s.DiskUsed = e.diskUsed(name)
	return s, nil
}

// view is the public face of an entry. The mutex is held.
func (e *Engine) view(en *entry) *shed.Shed {
	r := en.rec
	return &shed.Shed{
		Name: r.Name, Backend: r.Backend, Status: en.status, Reason: en.reason,
		Image: r.Image, ImageDigest: r.ImageDigest, Kernel: r.Kernel,
		CPUs: r.CPUs, MemoryMB: r.MemoryMB, UpperSize: r.UpperSize,
		Repo: r.Repo, Workspace: r.Workspace, CreatedAt: r.CreatedAt, StartedAt: r.StartedAt,
	}
}

// diskUsed counts what only this shed has.
func (e *Engine) diskUsed(name string) int64 {
	dir := e.State.Shed(name)
	return rootfs.DiskUsage(filepath.Join(dir, upperFile), filepath.Join(dir, consoleFile), filepath.Join(dir, provisionFile))
}

// reconcile compares the records with what is there.
func (e *Engine) reconcile(ctx context.Context) error {
	records, damaged, err := e.State.Load()
	if err != nil {
		return fmt.Errorf("reading the records: %w", err)
	}
	for _, d := range damaged {
		if e.leftover(d.Name, d.Err) {
			continue
		}
		en := newEntry(state.Record{Name: d.Name}, shed.StatusDamaged)
		en.reason = d.Err.Error()
		e.sheds[d.Name] = en
		e.Log.Error("a shed's record can't be read; its files are left alone", "shed", d.Name, "err", d.Err)
	}
	for _, rec := range records {
		switch rec.Phase {
		case state.Creating, state.Deleting:
			e.Log.Info("removing a shed whose create or delete was cut off", "shed", rec.Name)
			if err := e.destroy(ctx, rec.Name, nil); err != nil {
				e.Log.Error("removing a shed whose create or delete was cut off", "shed", rec.Name, "err", err)
				en := newEntry(rec, shed.StatusDeleting)
				en.reason = fmt.Sprintf("it was cut off while %s, and removing it failed: %v", rec.Phase, err)
				e.sheds[rec.Name] = en
			}
		default:
			e.adopt(ctx, rec)
		}
	}
	return nil
}

// leftover removes the directory of a shed that holds nothing: what a create makes
// before the record is written, or a delete leaves after it is gone.
func (e *Engine) leftover(name string, err error) bool {
	if !errors.Is(err, os.ErrNotExist) {
		return false
	}
	files, err := os.ReadDir(e.State.Shed(name))
	if err != nil {
		return false
	}
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), ".tmp-") {
			return false
		}
	}
	return e.State.Remove(name) == nil
}

// adopt finds out how a shed fares that an earlier server made.
func (e *Engine) adopt(ctx context.Context, rec state.Record) {
	en := newEntry(rec, shed.StatusStopped)
	e.sheds[rec.Name] = en
	dir := e.State.Shed(rec.Name)
	client, err := keeper.Find(dir)
	if err != nil {
		client, err = e.resume(ctx, rec)
	}
	if errors.Is(err, keeper.ErrNotRunning) {
		en.reason = e.lastReason(dir)
		return
	}
	en.status = shed.StatusRunning
	e.watch(en, client) // which tries again, if err says anything
}

// resume gives a machine that lost its keeper a new one. Only keeper.ErrNotRunning says that there is no
// machine; after another error the client may have one yet.
func (e *Engine) resume(ctx context.Context, rec state.Record) (*keeper.Client, error) {
	b, ok := e.Backends[rec.Backend]
	if !ok {
		return nil, keeper.ErrNotRunning
	}
	client, err := keeper.Resume(ctx, e.Program, e.State.Shed(rec.Name), b.Driver)
	if err == nil {
		e.Log.Warn("a shed's keeper had gone; its machine has a new one", "shed", rec.Name)
	}
	return client, err
}

// lastReason is reasonStopped for the last run of the shed in dir.
func (e *Engine) lastReason(dir string) string {
	if exit, ok := keeper.LastExit(dir); ok {
		return reasonStopped(exit)
	}
	if _, err := os.Stat(filepath.Join(dir, keeper.RunDir)); err == nil {
		return "its keeper and its machine were ended from outside, or the host went down"
	}
	return ""
}

// reasonStopped says why a shed stopped that nobody stopped, and "" otherwise.
func reasonStopped(exit keeper.Exit) string {
	if exit.Signaled {
		return "the host was shutting down, or its keeper was told to end"
	}
	if exit.Asked {
		return ""
	}
	switch exit.Cause {
	case vm.PowerOff:
		return "it powered itself off"
	case vm.Panic:
		return "its kernel panicked"
	}
	if exit.Detail == "" {
		return "its machine ended: " + string(exit.Cause)
	}
	return "its machine ended: " + exit.Detail
}

// A keeper that ends again and again is started again only after a delay, which grows, until one lasts for longer than it can get.
const minResumeDelay, maxResumeDelay = 100 * time.Millisecond, 10 * time.Second

// watch notices the end of a run. Until it is certain that no machine runs, the shed counts as running.
func (e *Engine) watch(en *entry, client *keeper.Client) {
	watched := make(chan struct{})
	e.mu.Lock()
	en.keeper, en.watched = client, watched
	rec := en.rec
	e.mu.Unlock()
	e.wg.Go(func() {
		defer close(watched)
		var reason string
		for delay := time.Duration(0); ; {
			began := time.Now()
			exit, err := client.Watch(e.ctx)
			if err == nil {
				reason = reasonStopped(exit)
				break
			}
			if e.ctx.Err() != nil {
				return
			}
			// The keeper is gone without a word: its machine may live.
			if time.Since(began) > maxResumeDelay {
				delay = 0
			}
			select {
			case <-time.After(delay):
			case <-e.ctx.Done():
				return
			}
			if _, err = e.resume(e.ctx, rec); errors.Is(err, keeper.ErrNotRunning) {
				reason = e.lastReason(e.State.Shed(rec.Name))
				break
			}
			if err != nil && e.ctx.Err() == nil {
				e.Log.Error("a shed's keeper has gone and can't be replaced yet", "shed", rec.Name, "err", err)
			}
			delay = min(max(2*delay, minResumeDelay), maxResumeDelay)
		}
		if reason != "" {
			e.Log.Warn("a shed has stopped", "shed", rec.Name, "reason", reason)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		en.keeper = nil
		if en.status != shed.StatusDeleting {
			en.reason = reason
		}
		if en.status == shed.StatusRunning || en.status == shed.StatusStarting {
			en.status = shed.StatusStopped
		}
	})
}

// settle ends an operation on a shed: it runs if it has a keeper. Where it is stopped, that is for the reason
// that was seen, or else the one given.
func (e *Engine) settle(en *entry, reason string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if en.keeper != nil {
		en.status, en.reason = shed.StatusRunning, ""
	} else {
		en.status, en.reason = shed.StatusStopped, cmp.Or(en.reason, reason)
	}
}

// destroy ends a shed's machine at once and removes its files. The channel is the shed's watched, or nil.
func (e *Engine) destroy(ctx context.Context, name string, watched <-chan struct{}) error {
	dir := e.State.Shed(name)
	if err := e.kill(ctx, name); err != nil {
		return err
	}
	if watched != nil {
		<-watched
	}
	if err := e.State.Remove(name); err != nil {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	return nil
}

// kill ends whatever runs for a shed, with or without a keeper.
func (e *Engine) kill(ctx context.Context, name string) error {
	dir := e.State.Shed(name)
	client, err := keeper.Find(dir)
	if err == nil {
		_, err = client.Stop(ctx, 0)
	}
	if err != nil && !errors.Is(err, keeper.ErrNotRunning) {
		return err
	}
	for _, b := range e.Backends {
		m, err := b.Driver.Find(ctx, filepath.Join(dir, keeper.RunDir))
		if errors.Is(err, vm.ErrNotRunning) {
			continue
		}
		if err != nil {
			return err
		}
		if err := m.Kill(); err != nil {
			return err
		}
	}
	return nil
}
