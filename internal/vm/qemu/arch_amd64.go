//go:build linux

package qemu

import (
	"fmt"
	"math"
	"time"
)

const binaryName, packageName = "qemu-system-x86_64", "qemu-system-x86"

// console is the kernel's name of the first serial port.
const console = "ttyS0"

func machineType(Accel) string { return "microvm,acpi=on,rtc=on" }

// archCmdline is for this architecture's kernel: without it each boot logs as an error that there is
// no PCI bus, which a microvm doesn't have.
const archCmdline = " initcall_blacklist=pci_arch_init"

// tcgCmdline is for this architecture's kernel under emulation. Measuring the time stamp counter against
// emulated timers hangs at times. Told the frequency of that and of the delay loop, the kernel measures nothing.
func tcgCmdline() string {
	khz := tscKHz()
	const hz = 250 // CONFIG_HZ of Debian's kernels
	return fmt.Sprintf(" tsc=reliable tsc_early_khz=%d lpj=%d", khz, khz*1000/hz)
}

// tscKHz measures the frequency of the host's time stamp counter, which TCG passes on to the guest. It is a
// constant of the host; what /proc/cpuinfo has is the frequency that a processor runs at just then.
func tscKHz() int64 {
	start := time.Now()
	// now reads both clocks at once: of a few tries the one that nothing came between.
	now := func() (ns, ticks int64) {
		shortest := int64(math.MaxInt64)
		for range 10 {
			before := time.Since(start).Nanoseconds()
			t := readTSC()
			if took := time.Since(start).Nanoseconds() - before; took < shortest {
				shortest, ns, ticks = took, before+took/2, t
			}
		}
		return ns, ticks
	}
	ns, ticks := now()
	time.Sleep(20 * time.Millisecond)
	endNS, endTicks := now()
	return (endTicks - ticks) * 1_000_000 / (endNS - ns)
}

// readTSC returns the processor's time stamp counter, in ticks.
func readTSC() int64
