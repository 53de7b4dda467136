//go:build linux

package qemu

const binaryName, packageName = "qemu-system-aarch64", "qemu-system-arm"

// console is the kernel's name of the first serial port.
const console = "ttyAMA0"

// machineType is QEMU's virt machine: microvm exists for x86 only.
func machineType(Accel) string { return "virt,gic-version=max" }

const archCmdline = ""

// tcgCmdline is empty: the processor tells its kernel the frequency of its timer.
func tcgCmdline() string { return "" }
