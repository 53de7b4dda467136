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
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/state"
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
		if derr := e.destroy(context.WithoutCancel(ctx), rec.Name, en.watched); derr != nil {
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
	e.settle(en, "")
	return nil
}

// save writes a record and makes it the current one.
func (e *Engine) save(en *entry, rec state.Record) error {
	if err := e.State.Save(rec); err != nil {
		if shed.ErrorCode(err) == shed.CodeNoSpace {
			return err
		}
		// It may have failed only after the record was replaced.
		if serr := e.State.Save(en.rec); serr != nil {
			e.Log.Error("writing again the record that a shed had", "shed", rec.Name, "err", serr)
		}
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en.rec = rec
	return nil
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
	err := e.boot(ctx, en, p)
	e.settle(en, reason)
	return err
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
		e.settle(en, "") // it may have ended all the same
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
		// Whatever is known: a machine must not lose the disk under it.
		client, err := e.resume(ctx, rec)
		if err != nil && !errors.Is(err, keeper.ErrNotRunning) {
			return nil, err
		}
		if err == nil {
			e.watch(en, client)
			e.settle(en, "")
			return nil, notStopped(name, shed.StatusRunning)
		}
	default:
		return nil, notStopped(name, status)
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

func notStopped(name string, status shed.Status) error {
	return shed.Errorf(shed.CodeConflict, "shed %q is %s: only a stopped one can be reset", name, status).
		WithHint("shed stop %s", name)
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
		err := e.save(en, rec)
		if shed.ErrorCode(err) == shed.CodeNoSpace {
			// Its own logs, which nobody needs any more, make room for that.
			e.emptyLogs(name)
			err = e.save(en, rec)
		}
		if err != nil {
			return err
		}
	}
	e.set(en, shed.StatusDeleting, "")
	// From here on it goes through: what is left the next start of the server removes.
	ctx = context.WithoutCancel(ctx)
	if err := e.destroy(ctx, name, watched); err != nil {
		e.set(en, shed.StatusDeleting, fmt.Sprintf("removing it failed: %v", err))
		return err
	}
	e.forget(name)
	return nil
}

// emptyLogs gives back what the logs of a shed take, also of one that runs and has them open.
func (e *Engine) emptyLogs(name string) {
	dir := e.State.Shed(name)
	for _, pattern := range []string{"*.log", keeper.RunDir + "/*.log"} {
		logs, err := filepath.Glob(filepath.Join(dir, pattern))
		for _, f := range logs {
			err = errors.Join(err, os.Truncate(f, 0))
		}
		if err != nil {
			e.Log.Warn("emptying the logs of a shed", "shed", name, "err", err)
		}
	}
}
