//go:build linux

package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/vmtest"
)

func TestDriver(t *testing.T) {
	vmtest.Run(t, func(testing.TB) vm.Driver { return &Driver{Accel: TCG} })
}

// Only a start needs QEMU to be installed: a machine that runs can be looked for without.
func TestNotInstalled(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	d, dir := &Driver{Accel: TCG}, t.TempDir()
	if _, err := d.Start(t.Context(), dir, vm.Spec{}); shed.ErrorCode(err) != shed.CodeUnsupported {
		t.Errorf("Start: %v, want %s", err, shed.CodeUnsupported)
	}
	if runs, err := d.Running(dir); runs || err != nil {
		t.Errorf("Running: %v, %v", runs, err)
	}
	if _, err := d.Find(t.Context(), dir); !errors.Is(err, vm.ErrNotRunning) {
		t.Errorf("Find: %v, want ErrNotRunning", err)
	}
}

// That it can't be told whether a machine runs isn't taken for its not running.
func TestUnknownWhetherItRuns(t *testing.T) {
	d, dir := &Driver{Accel: TCG}, t.TempDir()
	file := filepath.Join(dir, lockFile)
	if err := os.Symlink(file, file); err != nil { // a loop
		t.Fatal(err)
	}
	if runs, err := d.Running(dir); err == nil {
		t.Errorf("Running: %v, and no error", runs)
	}
	if _, err := d.Find(t.Context(), dir); err == nil || errors.Is(err, vm.ErrNotRunning) {
		t.Errorf("Find: %v", err)
	}
}

func TestArgsEscapeCommas(t *testing.T) {
	d := &Driver{Accel: TCG}
	args := d.args(vm.Spec{Console: "/a,b/console", Disks: []vm.Disk{{Path: "/a,readonly=off/disk", ReadOnly: true}}})
	for _, want := range []string{
		"file,id=console,append=on,path=/a,,b/console",
		"if=none,id=disk0,format=raw,discard=unmap,file=/a,,readonly=off/disk,readonly=on",
	} {
		if !slices.Contains(args, want) {
			t.Errorf("%q isn't in %q", want, args)
		}
	}
}
