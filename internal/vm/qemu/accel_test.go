//go:build linux

package qemu

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The guest that tells whether KVM works must itself work: under emulation it does, always.
func TestProbeGuest(t *testing.T) {
	binary, err := FindBinary()
	if err != nil {
		t.Fatal(err)
	}
	bios := filepath.Join(t.TempDir(), "bios")
	if err := os.WriteFile(bios, probeGuest(), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-M", "microvm", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config",
		"-display", "none", "-bios", bios, "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != probeValue<<1|1 {
		t.Fatalf("exit code %d, want %d\n%s", code, probeValue<<1|1, out)
	}
}

// The answer is kept with what it was measured on, and asked again when that changes.
func TestDetectAccelKeepsTheAnswer(t *testing.T) {
	binary, err := FindBinary()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kvm.json")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	accel, reason, err := DetectAccel(ctx, binary, file)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s %s", accel, reason)
	if (accel == TCG) != (reason != "") {
		t.Errorf("%s with the reason %q", accel, reason)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := DetectAccel(ctx, binary, file)
	if err != nil || again != accel {
		t.Fatalf("asked again: %s, %v", again, err)
	}
	if after, err := os.Stat(file); err != nil || !os.SameFile(before, after) {
		t.Error("the kept answer was not used")
	}
	if err := os.WriteFile(file, []byte("{damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, _, err := DetectAccel(ctx, binary, file); err != nil || again != accel {
		t.Fatalf("with a damaged file: %s, %v", again, err)
	}
}
