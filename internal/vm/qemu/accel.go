//go:build linux

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Accel is how QEMU runs the guest's instructions.
type Accel string

const (
	KVM Accel = "kvm"
	TCG Accel = "tcg" // software emulation
)

func (a Accel) cpu() string {
	if a == KVM {
		return "host"
	}
	return "max"
}

// option is the value of -accel.
func (a Accel) option() string {
	if a == TCG {
		// The translated code may take up to 1 GB by default, and QEMU fills that before it
		// drops any. Guests get no slower with less.
		return "tcg,tb-size=256"
	}
	return string(a)
}

// cmdline is the kernel's command line.
func (a Accel) cmdline() string {
	// The guest ends QEMU by a power-off or, with -no-reboot, a reset by triple fault. The security modules are
	// those without a policy of their own to load: where the kernel has AppArmor, Docker fails unless the image
	// has its tools, and without it SELinux comes in its place.
	s := "console=" + console + " quiet reboot=t panic=-1 lsm=landlock,lockdown,yama,integrity,bpf rdinit=/init" + archCmdline
	if a == TCG {
		s += tcgCmdline()
	}
	return s
}

// probe is what was found out about KVM, and on what: it holds as long as that is the same.
type probe struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	QEMU   string `json:"qemu"`

	Works  bool      `json:"works"`
	Reason string    `json:"reason,omitempty"`
	Until  time.Time `json:"until,omitzero"` // when to ask again in any case; zero means never
}

// probeTimeout bounds a guest that needs a millisecond.
const probeTimeout = 5 * time.Second

// errStuck is for a guest that didn't get anywhere. Mostly none ever does then; but the host may have been busy, so
// that is believed for stuckHolds.
var errStuck = fmt.Errorf("KVM is there but a test guest did not get anywhere in %v", probeTimeout)

const stuckHolds = time.Hour

// DetectAccel says whether KVM runs guests here, and if not, why. That /dev/kvm
// opens proves nothing, so a guest is run. The answer is kept in file, unless another try could
// give another one. An error says that it could not be kept: it holds all the same, unless ctx is done.
func DetectAccel(ctx context.Context, binary, file string) (accel Accel, reason string, err error) {
	if err := openKVM(); err != nil {
		return TCG, err.Error(), nil
	}
	if runtime.GOARCH != "amd64" {
		return TCG, "there is no test guest for " + runtime.GOARCH, nil
	}
	return surroundings(binary).answer(file, func() (string, error) { return runProbe(ctx, binary) })
}

// openKVM says whether the device can be opened.
func openKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: add the user to the group kvm", err)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// answer is what is kept in file, if that was found out in the same surroundings, or what run returns.
func (p probe) answer(file string, run func() (refusal string, err error)) (accel Accel, reason string, err error) {
	var known probe
	if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &known) == nil {
		asked := known
		asked.Works, asked.Reason, asked.Until = false, "", time.Time{}
		if asked == p && (known.Until.IsZero() || time.Now().Before(known.Until)) {
			return known.accel(), known.Reason, nil
		}
	}
	p.Reason, err = run()
	switch {
	case errors.Is(err, errStuck):
		p.Reason, p.Until = err.Error(), time.Now().Add(stuckHolds)
	case err != nil:
		return TCG, err.Error(), nil
	}
	p.Works = p.Reason == ""
	b, err := json.MarshalIndent(p, "", "  ")
	if err == nil {
		err = renameio.WriteFile(file, append(b, '\n'), 0o644)
	}
	if err != nil {
		err = fmt.Errorf("keeping what was found out about KVM: %w", err)
	}
	return p.accel(), p.Reason, err
}

func (p probe) accel() Accel {
	if p.Works {
		return KVM
	}
	return TCG
}

// surroundings describes what the answer depends on.
func surroundings(binary string) probe {
	var p probe
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		p.Kernel = unix.ByteSliceToString(uts.Release[:]) + " " + unix.ByteSliceToString(uts.Version[:])
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				p.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	if fi, err := os.Stat(binary); err == nil {
		p.QEMU = fmt.Sprintf("%s %d %d", binary, fi.Size(), fi.ModTime().UnixNano())
	}
	return p
}

// runProbe runs a guest of some ten thousand instructions under KVM. It returns why QEMU refused, "" if it didn't, and
// an error where that was not found out.
func runProbe(ctx context.Context, binary string) (refusal string, err error) {
	dir, err := os.MkdirTemp("", "shed-kvm-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	bios := filepath.Join(dir, "bios")
	if err := os.WriteFile(bios, probeGuest(), 0o600); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, binary, "-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "16",
		"-nodefaults", "-no-user-config", "-display", "none", "-bios", bios,
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=1", probePort))
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "", errStuck
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	// isa-debug-exit ends QEMU with twice the value written, plus one.
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == probeValue<<1|1 {
		return "", nil
	}
	if said := strings.TrimSpace(stderr.String()); said != "" {
		return said, nil
	}
	return "", fmt.Errorf("the test guest under KVM failed: %v", err)
}

const probePort, probeValue = 0xf4, 0x21

// probeGuest is a firmware of 64 KiB that counts down and tells QEMU to end.
func probeGuest() []byte {
	rom := make([]byte, 64<<10)
	copy(rom, []byte{
		0xb9, 0x10, 0x27, // mov cx, 10000
		0xe2, 0xfe, // loop to itself
		0xb0, probeValue, // mov al, value
		0xe6, probePort, // out port, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to the hlt
	})
	// The processor starts 16 bytes before the end of the ROM.
	copy(rom[len(rom)-16:], []byte{0xe9, 0x0d, 0x00}) // jmp to offset 0 of the segment
	return rom
}
