//go:build linux

package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
func TestAnswerIsKept(t *testing.T) {
	for _, refusal := range []string{"", "QEMU says no"} {
		want := KVM
		if refusal != "" {
			want = TCG
		}
		file := filepath.Join(t.TempDir(), "kvm.json")
		here := probe{Kernel: "6.1"}
		asked := 0
		run := func() (string, error) { asked++; return refusal, nil }
		check := func(p probe, wantAsked int) {
			t.Helper()
			if accel, reason, err := p.answer(file, run); accel != want || reason != refusal || err != nil {
				t.Errorf("%s, %q, %v; want %s, %q", accel, reason, err, want, refusal)
			}
			if asked != wantAsked {
				t.Errorf("asked %d times, want %d", asked, wantAsked)
			}
		}
		check(here, 1)
		check(here, 1)
		here.Kernel = "6.2"
		check(here, 2)
		check(here, 2)
		if err := os.WriteFile(file, []byte("{damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		check(here, 3)
		file = filepath.Join(t.TempDir(), "none", "kvm.json")
		if accel, reason, err := here.answer(file, run); accel != want || reason != refusal || err == nil {
			t.Errorf("where it can't be kept: %s, %q, %v; want %s, %q and an error", accel, reason, err, want, refusal)
		}
	}
}

// A guest that hangs is believed for a while.
func TestStuckIsKeptForAWhile(t *testing.T) {
	file, asked := filepath.Join(t.TempDir(), "kvm.json"), 0
	check := func(wantAsked int) {
		t.Helper()
		accel, reason, err := (probe{}).answer(file, func() (string, error) { asked++; return "", errStuck })
		if accel != TCG || reason != errStuck.Error() || err != nil || asked != wantAsked {
			t.Errorf("%s, %q, %v, asked %d times; want %d", accel, reason, err, asked, wantAsked)
		}
	}
	check(1)
	check(1)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var known probe
	if err := json.Unmarshal(text, &known); err != nil {
		t.Fatal(err)
	}
	known.Until = time.Now().Add(-time.Second)
	if text, err = json.Marshal(known); err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	check(2)
}

// What only failed this time isn't kept: the next start tries again.
func TestPassingFailureIsNotKept(t *testing.T) {
	dir := t.TempDir()
	file, binary := filepath.Join(dir, "kvm.json"), filepath.Join(dir, "qemu")
	run := func() (string, error) { return runProbe(t.Context(), binary) }
	qemu := func(script string) {
		t.Helper()
		if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want Accel, wantReason string) {
		t.Helper()
		if accel, reason, err := (probe{}).answer(file, run); accel != want || !strings.Contains(reason, wantReason) || err != nil {
			t.Errorf("%s, %q, %v; want %s, %q", accel, reason, err, want, wantReason)
		}
	}
	check(TCG, "no such file") // the binary
	qemu("exit 1")
	check(TCG, "exit status 1")
	works := fmt.Sprintf("exit %d", probeValue<<1|1)
	qemu(works)
	t.Setenv("TMPDIR", filepath.Join(dir, "none"))
	check(TCG, "none")
	t.Setenv("TMPDIR", dir)
	check(KVM, "")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	qemu("echo KVM is bad >&2; exit 1")
	check(TCG, "KVM is bad")
	qemu(works)
	check(TCG, "KVM is bad") // kept
}
