//go:build linux

// Command guest is the init of the bare machine that the benchmarks compare with: it
// moves bytes over the virtio-serial port with nothing in between.
package main

import (
	"bufio"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

func main() {
	os.Stderr.WriteString(run().Error() + "\n") // it ends only by failing
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// portTimeout bounds the time until the port is there.
const portTimeout = time.Minute

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return err
		}
	}
	for _, name := range []string{"virtio_ring", "virtio", "virtio_mmio", "virtio_console"} {
		f, err := os.Open("/modules/" + name + ".ko")
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			return err
		}
		f.Close()
	}
	port, err := agent.OpenPort("shed", portTimeout)
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(port, 64<<10)
	for {
		// A command is one byte; the count that follows is always the same.
		cmd, err := r.ReadByte()
		if err == io.EOF {
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		const total = 256 << 20
		switch cmd {
		case 's':
			buf := make([]byte, 64<<10)
			for n := 0; n < total; n += len(buf) {
				if _, err := port.Write(buf); err != nil {
					return err
				}
			}
		case 'r':
			if _, err := io.CopyN(io.Discard, r, total); err != nil {
				return err
			}
			if _, err := port.Write([]byte{1}); err != nil {
				return err
			}
		}
	}
}
