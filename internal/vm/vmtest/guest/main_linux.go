package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

// Main is the init of the machine. It doesn't return.
func Main() {
	fmt.Println("vmtest:", run()) // it ends only by failing
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// portTimeout bounds the time until the port is there.
const portTimeout = time.Minute

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	for _, name := range []string{"virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_console"} {
		if err := load(name); err != nil {
			return fmt.Errorf("loading %s: %w", name, err)
		}
	}
	p, err := agent.OpenPort("shed", portTimeout)
	if err != nil {
		return err
	}
	err = agent.ServePort(p, func(s *agent.Stream) { answer(s, p) })
	for errors.Is(err, os.ErrClosed) { // as it was asked to
		time.Sleep(time.Hour)
	}
	return err
}

// load loads a kernel module and first those that it needs.
func load(name string) error {
	deps, err := os.ReadFile("/modules/modules.dep")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(deps)) {
		if needed, ok := strings.CutPrefix(line, name+":"); ok {
			for _, n := range strings.Fields(needed) {
				if err := load(n); err != nil {
					return err
				}
			}
		}
	}
	f, err := os.Open("/modules/" + name + ".ko")
	if errors.Is(err, os.ErrNotExist) {
		return nil // built into the kernel
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func answer(s *agent.Stream, port io.Closer) {
	defer s.Close()
	var req Request
	if agent.ReadMessage(s, &req) != nil {
		s.Reset()
		return
	}
	var reply Reply
	var err error
	switch req.Op {
	case Look:
		reply.Facts, err = look()
	case Read:
		reply.Data, err = readDisk(req)
	case Write:
		err = writeDisk(req)
	case Log:
		err = os.WriteFile("/dev/console", req.Data, 0)
	case Frames:
		err = startFrames()
	case Leave:
		err = port.Close()
	case PowerOff:
		err = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case Reboot:
		err = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case Panic:
		err = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case Echo:
		if agent.WriteMessage(s, reply) == nil {
			io.Copy(s, s)
		}
		return
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	if err != nil {
		reply.Error = err.Error()
	}
	agent.WriteMessage(s, reply)
}

func look() (Facts, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Facts{}, err
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return Facts{}, err
	}
	var clock unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &clock); err != nil {
		return Facts{}, err
	}
	f := Facts{
		Clock:  time.Duration(clock.Nano()),
		BootID: strings.TrimSpace(string(id)), CPUs: runtime.NumCPU(), MemoryMB: int(uint64(si.Totalram) * uint64(si.Unit) >> 20),
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return f, err
	}
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback == 0 {
			f.MACs = append(f.MACs, i.HardwareAddr.String())
		}
	}
	disks, err := filepath.Glob("/sys/block/vd*")
	if err != nil {
		return f, err
	}
	for _, dir := range disks {
		sectors, err := readInt(dir + "/size")
		if err != nil {
			return f, err
		}
		ro, err := readInt(dir + "/ro")
		if err != nil {
			return f, err
		}
		f.Disks = append(f.Disks, Disk{Name: filepath.Base(dir), Size: sectors * 512, ReadOnly: ro == 1})
	}
	return f, nil
}

func readInt(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

func readDisk(req Request) ([]byte, error) {
	f, err := os.Open("/dev/" + req.Disk)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, req.Length)
	_, err = f.ReadAt(b, req.Offset)
	return b, err
}

func writeDisk(req Request) error {
	f, err := os.OpenFile("/dev/"+req.Disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(req.Data, req.Offset); err != nil {
		return err
	}
	return f.Sync()
}

// startFrames brings up the network card and answers frames in the background.
func startFrames() error {
	// In network byte order, as packet(7) wants it.
	const proto = EtherType>>8 | EtherType&0xff<<8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback != 0 {
			continue
		}
		ifr, err := unix.NewIfreq(i.Name)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
			return err
		}
	}
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				fmt.Println("vmtest: receiving a frame:", err)
				return
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if err := unix.Sendto(fd, buf[:n], 0, from); err != nil {
				fmt.Println("vmtest: sending a frame:", err)
			}
		}
	}()
	return nil
}
