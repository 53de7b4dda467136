//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/network"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
)

// stopGrace is how long a shed may take to shut down cleanly.
const stopGrace = 90 * time.Second

const home = "/home/shed"

func (e *Engine) Create(ctx context.Context, opts shed.CreateOptions, p shed.Progress) (*shed.Shed, error) {
	rec, err := e.plan(opts)
	if err != nil {
		return nil, err
	}
	en := newEntry(rec, shed.StatusCreating)
	<-en.op
	e.mu.Lock()
	if _, ok := e.sheds[rec.Name]; ok {
		e.mu.Unlock()
		return nil, shed.Errorf(shed.CodeExists, "there is a shed named %q already", rec.Name).
			WithHint("choose another name, or remove it: shed delete %s", rec.Name)
	}
	e.sheds[rec.Name] = en
	e.mu.Unlock()
	defer en.release()

	// A prune must not take the image before the record says that it is needed.
	img, release, err := e.imageFor(ctx, e.Backends[rec.Backend], rec.Image, p)
	if err == nil {
		defer release()
		rec.ImageDigest = img.Digest
		err = e.record(ctx, en, rec, p)
	}
	if err != nil {
		e.forget(rec.Name)
		return nil, err
	}
	if err := e.create(ctx, en, opts, p); err != nil {
		// Whatever the caller's context says, nothing may stay behind.
		if derr := e.destroy(context.WithoutCancel(ctx), rec.Name); derr != nil {
			e.Log.Error("undoing a create", "shed", rec.Name, "err", derr)
			e.set(en, shed.StatusDeleting, fmt.Sprintf("its create failed and could not be undone: %v", derr))
			return nil, shed.Errorf(shed.ErrorCode(err), "%w; undoing it failed too: %v", err, derr).
				WithHint("shed delete %s tries that again", rec.Name)
		}
		e.forget(rec.Name)
		return nil, err
	}
	return e.Get(ctx, rec.Name)
}

// record writes the record of a shed that is being created.
func (e *Engine) record(ctx context.Context, en *entry, rec state.Record, p shed.Progress) error {
	bundle, err := e.Kernels.Default(ctx, p)
	if err != nil {
		return err
	}
	rec.Kernel = bundle.ID
	if err := e.State.Create(rec); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en.rec = rec
	return nil
}

func (e *Engine) forget(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sheds, name)
}

// plan checks the options and settles what they leave open.
func (e *Engine) plan(opts shed.CreateOptions) (state.Record, error) {
	var rec state.Record
	if err := shed.ValidateName(opts.Name); err != nil {
		return rec, err
	}
	backend := opts.Backend
	if backend == "" {
		backend = e.DefaultBackend
	}
	b, ok := e.Backends[backend]
	if !ok {
		return rec, shed.Errorf(shed.CodeUnsupported, "this server has no backend %q", backend).
			WithHint("it has: %s", strings.Join(e.backendNames(), ", "))
	}
	rec = state.Record{
		Phase: state.Creating, Name: opts.Name, Backend: backend, Image: opts.Image,
		CPUs: opts.CPUs, MemoryMB: opts.MemoryMB, UpperSize: opts.UpperSize,
		Repo: opts.Repo, Workspace: home, CreatedAt: time.Now().UTC().Truncate(time.Second),
	}
	if rec.Image == "" {
		rec.Image = b.Image
	}
	if rec.CPUs == 0 {
		rec.CPUs = min(b.CPUs, runtime.NumCPU())
	}
	if rec.CPUs < 1 || rec.CPUs > runtime.NumCPU() {
		return rec, shed.Errorf(shed.CodeInvalid, "a shed can't have %d CPUs here", rec.CPUs).
			WithHint("this server has %d", runtime.NumCPU())
	}
	total, err := hostMemoryMB()
	if err != nil {
		return rec, err
	}
	if rec.MemoryMB == 0 {
		rec.MemoryMB = min(b.MemoryMB, total*3/4)
	}
	if rec.MemoryMB < shed.MinMemoryMB || rec.MemoryMB > total {
		return rec, shed.Errorf(shed.CodeInvalid, "a shed can't have %s of memory here", formatSize(int64(rec.MemoryMB), "MGT")).
			WithHint("%s at least; this server has %s", formatSize(shed.MinMemoryMB, "MGT"), formatSize(int64(total), "MGT"))
	}
	if rec.UpperSize == 0 {
		rec.UpperSize = shed.DefaultUpperSize
	}
	if rec.UpperSize < shed.MinUpperSize || rec.UpperSize > shed.MaxUpperSize {
		return rec, shed.Errorf(shed.CodeInvalid, "a shed's disk can't have a size of %s", formatSize(rec.UpperSize, "BKMGT")).
			WithHint("from %s to %s", formatSize(shed.MinUpperSize, "BKMGT"), formatSize(shed.MaxUpperSize, "BKMGT"))
	}
	if rec.Repo != "" {
		url, dir, err := parseRepo(rec.Repo)
		if err != nil {
			return rec, err
		}
		rec.Repo, rec.Workspace = url, home+"/"+dir
	}
	return rec, nil
}

// formatSize writes a size as flags take it, such as 1G or 1536M. The first letter of units is the
// unit of n, and each further one is 1024 times the one before it.
func formatSize(n int64, units string) string {
	for len(units) > 1 && n != 0 && n%1024 == 0 {
		n, units = n/1024, units[1:]
	}
	return fmt.Sprintf("%d%c", n, units[0])
}

func (e *Engine) backendNames() []string { return slices.Sorted(maps.Keys(e.Backends)) }

func hostMemoryMB() (int, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, err
	}
	return int(uint64(si.Totalram) * uint64(si.Unit) >> 20), nil
}

// create makes what the record describes. Whoever calls it undoes it on error.
func (e *Engine) create(ctx context.Context, en *entry, opts shed.CreateOptions, p shed.Progress) error {
	rec := en.rec
	done := p.Phase("disk", "")
	dir := e.State.Shed(rec.Name)
	if err := rootfs.CreateUpper(ctx, e.State.Path("templates"), filepath.Join(dir, upperFile), rec.UpperSize); err != nil {
		return err
	}
	done()
	if err := e.boot(ctx, en, p); err != nil {
		return err
	}
	if rec.Repo != "" && !opts.NoProvision {
		done := p.Phase("clone", "cloning "+rec.Repo)
		if err := e.clone(ctx, en); err != nil {
			return err
		}
		done()
	}
	rec = en.rec
	rec.Phase = state.Ready
	if err := e.save(en, rec); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if en.status == shed.StatusCreating {
		en.status = shed.StatusRunning
		if en.keeper == nil { // it has ended already
			en.status, en.reason = shed.StatusStopped, e.reasonStopped(dir)
		}
	}
	return nil
}

// save writes a record and makes it the current one.
func (e *Engine) save(en *entry, rec state.Record) error {
	if err := e.State.Save(rec); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en.rec = rec
	return nil
}

// boot starts the keeper of a shed and waits until the shed is up. On error nothing runs.
func (e *Engine) boot(ctx context.Context, en *entry, p shed.Progress) error {
	cfg, err := e.keeperConfig(ctx, en.rec, p)
	if err != nil {
		return err
	}
	defer p.Phase("boot", "")()
	rec := en.rec
	dir := e.State.Shed(rec.Name)
	rec.StartedAt = time.Now().UTC().Truncate(time.Second)
	if err := e.save(en, rec); err != nil {
		return err
	}
	var before int64 // of the console: what earlier boots have left
	if fi, err := os.Stat(cfg.Spec.Console); err == nil {
		before = fi.Size()
	}
	client, err := keeper.Start(e.Program, dir, cfg)
	if err != nil {
		return err
	}
	if err := client.Ready(ctx); err != nil {
		if kerr := e.kill(context.WithoutCancel(ctx), rec.Name); kerr != nil {
			e.Log.Error("ending a shed that did not come up", "shed", rec.Name, "err", kerr)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return e.bootError(rec.Name, err, vm.LastLines(cfg.Spec.Console, before, 20))
	}
	e.watch(en, client)
	return nil
}

// bootError says why a shed did not come up, with the end of its console.
func (e *Engine) bootError(name string, err error, console string) error {
	msg := fmt.Sprintf("shed %q did not come up: %v", name, err)
	if console != "" {
		msg += "\nthe end of its console:\n" + console
	}
	boot := &shed.Error{Code: shed.CodeBoot, Message: msg, Err: err}
	switch said := err.Error(); { // the agent's own words come last
	case strings.Contains(said, "mounting the upper"):
		return boot.WithHint("its disk may be damaged: on the server, `e2fsck -f %s` tries to repair it; or `shed reset %s` "+
			"makes it anew, and what was written there is lost", filepath.Join(e.State.Shed(name), upperFile), name)
	case strings.Contains(said, "mounting layer"):
		return boot.WithHint("a layer of its image may be damaged on the server: end shed-server and remove %s; "+
			"what sheds need of it is made again from the image", e.State.Path("layers"))
	}
	return boot.WithHint("`shed-server doctor` checks what the host has to offer")
}

// keeperConfig gathers all that the machine of a shed needs.
func (e *Engine) keeperConfig(ctx context.Context, rec state.Record, p shed.Progress) (keeper.Config, error) {
	var cfg keeper.Config
	b, ok := e.Backends[rec.Backend]
	if !ok {
		return cfg, shed.Errorf(shed.CodeUnsupported, "this server has no backend %q any more", rec.Backend)
	}
	bundle, err := e.Kernels.Get(rec.Kernel)
	if err != nil {
		return cfg, err
	}
	initramfs, err := bundle.Initramfs(ctx, e.AgentBinary)
	if err != nil {
		return cfg, err
	}
	img, err := e.Config.Images.Resolve(rec.ImageDigest)
	if err != nil {
		return cfg, err
	}
	layers, image, err := e.Config.Images.RootfsWithin(ctx, img, b.maxLayers(), p)
	if err != nil {
		return cfg, imageError(ctx, rec, err)
	}
	env, err := e.environment(rec)
	if err != nil {
		return cfg, err
	}
	workspace := rec.Workspace
	if workspace == home { // nobody asked for one: the image's directory comes before it
		workspace = ""
	}
	dir := e.State.Shed(rec.Name)
	disks := []vm.Disk{{Path: filepath.Join(dir, upperFile)}, {Path: bundle.Modules(), ReadOnly: true}}
	for _, l := range layers {
		disks = append(disks, vm.Disk{Path: l, ReadOnly: true})
	}
	return keeper.Config{
		Driver: rec.Backend, Accel: b.Accel, BootTimeout: b.BootTimeout, AllowHostPorts: e.AllowHostPorts,
		Spec: vm.Spec{
			CPUs: rec.CPUs, MemoryMB: rec.MemoryMB, Kernel: bundle.Kernel(), Initrd: initramfs,
			Disks: disks, MAC: network.GuestMAC, Console: filepath.Join(dir, consoleFile),
		},
		Setup: agent.Setup{
			Hostname: rec.Name, Env: env, Workspace: workspace, Layers: len(layers),
			Image: agent.Image{Env: image.Config.Env, WorkingDir: image.Config.WorkingDir, User: image.Config.User},
			Network: agent.Network{
				Address: fmt.Sprintf("%s/%d", network.Guest, network.PrefixLen),
				Gateway: network.Gateway, DNS: network.Gateway, MTU: network.MTU,
			},
		},
	}, nil
}

// imageError adds to an error about an image's files, unless it suggests something itself, what to try.
func imageError(ctx context.Context, rec state.Record, err error) error {
	code := shed.ErrorCode(err)
	if ctx.Err() != nil || shed.ErrorHint(err) != "" || code != shed.CodeInternal && code != shed.CodeInvalid {
		return err
	}
	return shed.Errorf(shed.CodeInternal, "%w", err).
		WithHint("the image %s may be damaged on the server: get it anew, or put back from a backup what the error names", rec.Image)
}

func (e *Engine) Start(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	en, err := e.acquire(ctx, name)
	if err != nil {
		return nil, err
	}
	defer en.release()
	if err := e.start(ctx, en, p); err != nil {
		return nil, err
	}
	return e.Get(ctx, name)
}

// start boots a shed that is stopped. The caller works on it alone.
func (e *Engine) start(ctx context.Context, en *entry, p shed.Progress) error {
	e.mu.Lock()
	status, reason := en.status, en.reason
	e.mu.Unlock()
	switch status {
	case shed.StatusRunning:
		return nil
	case shed.StatusDamaged:
		return damaged(en)
	case shed.StatusDeleting:
		return halfDeleted(en)
	case shed.StatusStopped:
	default:
		return shed.Errorf(shed.CodeConflict, "shed %q can't be started: it is %s", en.rec.Name, status)
	}
	e.set(en, shed.StatusStarting, "")
	if err := e.boot(ctx, en, p); err != nil {
		e.set(en, shed.StatusStopped, reason)
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if en.keeper != nil {
		en.status = shed.StatusRunning
	}
	return nil
}

func (e *Engine) Stop(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	en, err := e.acquire(ctx, name)
	if err != nil {
		return nil, err
	}
	defer en.release()
	if err := e.stop(ctx, en, p); err != nil {
		return nil, err
	}
	return e.Get(ctx, name)
}

func (e *Engine) stop(ctx context.Context, en *entry, p shed.Progress) error {
	e.mu.Lock()
	client, watched, status := en.keeper, en.watched, en.status
	e.mu.Unlock()
	switch status {
	case shed.StatusDamaged:
		return damaged(en)
	case shed.StatusDeleting:
		return halfDeleted(en)
	}
	if client == nil {
		e.set(en, shed.StatusStopped, "")
		return nil
	}
	defer p.Phase("stop", "shutting down")()
	e.set(en, shed.StatusStopping, "")
	forced, err := client.Stop(ctx, stopGrace)
	if err == nil {
		select {
		case <-watched:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		en.status = shed.StatusRunning
		if en.keeper == nil { // it has ended all the same
			en.status = shed.StatusStopped
		}
		return err
	}
	e.set(en, shed.StatusStopped, forced)
	return nil
}

func (e *Engine) Reset(ctx context.Context, name string) (*shed.Shed, error) {
	en, err := e.acquire(ctx, name)
	if err != nil {
		return nil, err
	}
	defer en.release()
	e.mu.Lock()
	status, rec := en.status, en.rec
	e.mu.Unlock()
	switch status {
	case shed.StatusDamaged:
		return nil, damaged(en)
	case shed.StatusDeleting:
		return nil, halfDeleted(en)
	case shed.StatusStopped:
	default:
		return nil, shed.Errorf(shed.CodeConflict, "shed %q is %s: only a stopped one can be reset", name, status).
			WithHint("shed stop %s", name)
	}
	bundle, err := e.Kernels.Default(ctx, nil)
	if err != nil {
		return nil, err
	}
	// The kernel comes first: it boots the old upper too, while the old kernel may be gone. Each
	// is replaced in one step.
	before := rec
	rec.Kernel = bundle.ID
	if err := e.save(en, rec); err != nil {
		return nil, err
	}
	if err := rootfs.CreateUpper(ctx, e.State.Path("templates"), filepath.Join(e.State.Shed(name), upperFile), rec.UpperSize); err != nil {
		return nil, errors.Join(err, e.save(en, before))
	}
	return e.Get(ctx, name)
}

func (e *Engine) Delete(ctx context.Context, name string, p shed.Progress) error {
	en, err := e.acquire(ctx, name)
	if err != nil {
		return err
	}
	defer en.release()
	e.mu.Lock()
	rec, watched := en.rec, en.watched
	e.mu.Unlock()
	defer p.Phase("delete", "removing")()
	if rec.Phase == state.Ready { // others are removed by the next start as they are, or their record can't be read
		rec.Phase = state.Deleting
		if err := e.save(en, rec); err != nil {
			return err
		}
	}
	e.set(en, shed.StatusDeleting, "")
	// From here on it goes through: what is left the next start of the server removes.
	ctx = context.WithoutCancel(ctx)
	if err := e.destroy(ctx, name); err != nil {
		e.set(en, shed.StatusDeleting, fmt.Sprintf("removing it failed: %v", err))
		return err
	}
	if watched != nil {
		<-watched
	}
	e.forget(name)
	return nil
}
