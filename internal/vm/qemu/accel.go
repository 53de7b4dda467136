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
	"strconv"
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
		// Measuring the TSC against emulated timers hangs at times. Told the frequency of the
		// time stamp counter and of the delay loop, the kernel measures nothing.
		khz := hostKHz()
		const hz = 250 // CONFIG_HZ of Debian's kernels
		s += fmt.Sprintf(" tsc=reliable tsc_early_khz=%d lpj=%d", khz, khz*1000/hz)
	}
	return s
}

// hostKHz is the frequency of the host's processor, which TCG passes on as the guest's TSC.
func hostKHz() int {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			key, value, ok := strings.Cut(line, ":")
			if !ok || strings.TrimSpace(key) != "cpu MHz" {
				continue
			}
			if mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil && mhz > 0 {
				return int(mhz * 1000)
			}
		}
	}
	return 1_000_000 // QEMU's own choice where it can't measure
}

// probe is what was found out about KVM, and on what: it holds as long as that is the same.
type probe struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	QEMU   string `json:"qemu"`
	Device string `json:"device"`

	Works  bool   `json:"works"`
	Reason string `json:"reason,omitempty"`
}

// probeTimeout bounds a guest that needs a millisecond.
const probeTimeout = 5 * time.Second

// DetectAccel says whether KVM runs guests here, and if not, why. That /dev/kvm
// opens proves nothing, so a guest is run. The answer is kept in file.
func DetectAccel(ctx context.Context, binary, file string) (accel Accel, reason string, err error) {
	now := surroundings(binary)
	var known probe
	if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &known) == nil {
		asked := known
		asked.Works, asked.Reason = false, ""
		if asked == now {
			return known.accel(), known.Reason, nil
		}
	}
	if err := runProbe(ctx, binary); err != nil {
		if ctx.Err() != nil {
			return "", "", ctx.Err()
		}
		now.Reason = err.Error()
	} else {
		now.Works = true
	}
	b, err := json.MarshalIndent(now, "", "  ")
	if err != nil {
		return "", "", err
	}
	if err := renameio.WriteFile(file, append(b, '\n'), 0o644); err != nil {
		return "", "", fmt.Errorf("keeping what was found out about KVM: %w", err)
	}
	return now.accel(), now.Reason, nil
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
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		p.Device = err.Error()
		return p
	}
	f.Close()
	p.Device = "opens"
	return p
}

// runProbe runs a guest of some ten thousand instructions under KVM.
func runProbe(ctx context.Context, binary string) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w: add the user to the group kvm", err)
		}
		return err
	}
	f.Close()
	if runtime.GOARCH != "amd64" {
		return errors.New("there is no test guest for " + runtime.GOARCH)
	}
	dir, err := os.MkdirTemp("", "shed-kvm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	bios := filepath.Join(dir, "bios")
	if err := os.WriteFile(bios, probeGuest(), 0o600); err != nil {
		return err
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
	if ctx.Err() != nil {
		return fmt.Errorf("KVM is there but a test guest did not get anywhere in %v", probeTimeout)
	}
	// isa-debug-exit ends QEMU with twice the value written, plus one.
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == probeValue<<1|1 {
		return nil
	}
	if said := strings.TrimSpace(stderr.String()); said != "" {
		return errors.New(said)
	}
	return fmt.Errorf("the test guest under KVM failed: %v", err)
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
