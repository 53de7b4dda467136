//go:build linux

package qemu

const binaryName, packageName = "qemu-system-x86_64", "qemu-system-x86"

// console is the kernel's name of the first serial port.
const console = "ttyS0"

func machineType(Accel) string { return "microvm,acpi=on,rtc=on" }
