//go:build linux

package qemu

const binaryName, packageName = "qemu-system-x86_64", "qemu-system-x86"

// console is the kernel's name of the first serial port.
const console = "ttyS0"

func machineType(Accel) string { return "microvm,acpi=on,rtc=on" }

// archCmdline is for this architecture's kernel: without it each boot logs as an error that there is
// no PCI bus, which a microvm doesn't have.
const archCmdline = " initcall_blacklist=pci_arch_init"
