//go:build linux

package qemu

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/charliek/shed/internal/vm"
)

// A pid may have become somebody else's: only the recorded process is the machine.
func TestFindProcess(t *testing.T) {
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	file := filepath.Join(t.TempDir(), pidFile)
	if _, err := recordProcess(file, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	good, err := readRecord(file)
	if err != nil {
		t.Fatal(err)
	}
	write := func(r processRecord) {
		t.Helper()
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, change := range map[string]func(*processRecord){
		"started at another time": func(r *processRecord) { r.Start++ },
		"before a reboot":         func(r *processRecord) { r.Boot = "another" },
		"of another process":      func(r *processRecord) { r.PID = os.Getpid() },
		"of no process":           func(r *processRecord) { r.PID = 1<<22 + 1 },
	} {
		r := good
		change(&r)
		write(r)
		if p, err := findProcess(file); !errors.Is(err, vm.ErrNotRunning) {
			t.Errorf("a record %s: %v, %v; want ErrNotRunning", name, p, err)
		}
		if r.runs() {
			t.Errorf("a record %s: runs is true", name)
		}
	}
	write(good)
	p, err := findProcess(file)
	if err != nil || !good.runs() {
		t.Fatalf("the record itself: %v, runs %v", err, good.runs())
	}
	// Once as a zombie, once as nothing.
	if err := p.kill(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if good.runs() {
			t.Error("runs is true after the end")
		}
		if _, err := findProcess(file); !errors.Is(err, vm.ErrNotRunning) {
			t.Errorf("after the end: %v, want ErrNotRunning", err)
		}
		if err := p.kill(); err != nil {
			t.Errorf("killing it again: %v", err)
		}
		cmd.Wait()
	}

	// Of a damaged record nothing is known: a machine may run.
	if err := os.WriteFile(file, []byte(`{"pid": 1`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := findProcess(file); err == nil || errors.Is(err, vm.ErrNotRunning) {
		t.Errorf("a damaged record: %v", err)
	}
}

func TestArgsEscapeCommas(t *testing.T) {
	d := &Driver{Binary: "qemu", Accel: TCG}
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
