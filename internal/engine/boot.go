//go:build linux

package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/network"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
)

// boot starts the keeper of a shed and waits until the shed is up. On error nothing runs, or it is watched.
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
	before, err := announce(cfg.Spec.Console, rec)
	if err != nil {
		return err
	}
	client, err := keeper.Start(ctx, e.Program, dir, cfg)
	if err != nil {
		return err
	}
	if err := client.Ready(ctx); err != nil {
		if kerr := e.kill(context.WithoutCancel(ctx), rec.Name); kerr != nil {
			e.Log.Error("ending a shed that did not come up", "shed", rec.Name, "err", kerr)
			e.watch(en, client) // it may run on
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return e.bootError(rec.Name, err, vm.LastLines(cfg.Spec.Console, before, 20))
	}
	e.watch(en, client)
	return nil
}

// announce writes into a shed's console that it is started, and returns how long the console is then, in bytes.
func announce(console string, rec state.Record) (int64, error) {
	f, err := os.OpenFile(console, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	line := fmt.Sprintf("shed: starting at %s, image %s (%s), kernel %s\n", rec.StartedAt.Format(time.RFC3339), rec.Image, rec.ImageDigest, rec.Kernel)
	if fi.Size() > 0 { // the last boot may have ended within a line
		line = "\n" + line
	}
	n, err := f.WriteString(line)
	return fi.Size() + int64(n), rootfs.NoSpace(err, console)
}

// bootError says why a shed did not come up, with the end of its console.
func (e *Engine) bootError(name string, err error, console string) error {
	msg := fmt.Sprintf("shed %q did not come up: %v", name, err)
	if console != "" {
		msg += "\nthe end of its console:\n" + console
	}
	boot := &shed.Error{Code: shed.CodeBoot, Message: msg, Err: err}
	switch shed.ErrorCode(err) {
	case agent.CodeUpper:
		return boot.WithHint("its disk may be damaged: on the server, `e2fsck -f %s` tries to repair it; or `shed reset %s` "+
			"makes it anew, and what was written there is lost", filepath.Join(e.State.Shed(name), upperFile), name)
	case agent.CodeLayer:
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
