//go:build linux

// Package qemu runs machines with QEMU's microvm machine, which has no firmware
// and no buses but virtio-mmio. It needs neither root nor KVM.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/proclock"
	"github.com/charliek/shed/internal/vm"
)

// Files in a machine's directory.
const (
	qmpSocket  = "qmp.sock"
	linkSocket = "link.sock"
	netSocket  = "net.sock"
	logFile    = "vmm.log"
	lockFile   = "vmm.lock" // inherited by QEMU
	openedFile = "link.opened"
)

// lockPatience is how long who looks whether QEMU runs may delay its start, and how long it may be on its
// way into existence or out of it. It is far more than that takes.
const lockPatience = 5 * time.Second

// What QEMU calls the link's port, and the host's end of it.
const linkID, linkChardev = "link-port", "link"

// mmioSlots is how many virtio-mmio devices a microvm with ACPI can use: it has one more, but a
// device there gets no interrupts (QEMU 7.2). The link, the network card, the
// random number generator and the balloon take one each.
const mmioSlots, otherDevices = 23, 4

// Driver is the QEMU driver.
type Driver struct {
	Accel Accel
}

var _ vm.Driver = (*Driver)(nil)

func (d *Driver) Features() vm.Features {
	return vm.Features{MaxDisks: mmioSlots - otherDevices}
}

// FindBinary returns the path of QEMU for this architecture.
func FindBinary() (string, error) {
	path, err := exec.LookPath(binaryName)
	if err != nil {
		return "", shed.Errorf(shed.CodeUnsupported, "the qemu backend needs %s, which is not installed", binaryName).
			WithHint("apt-get install %s", packageName)
	}
	return path, nil
}

func (d *Driver) Start(ctx context.Context, dir string, spec vm.Spec) (vm.Machine, error) {
	binary, err := FindBinary()
	if err != nil {
		return nil, err
	}
	lock, err := proclock.Take(filepath.Join(dir, lockFile), lockPatience)
	if err != nil {
		return nil, fmt.Errorf("QEMU did not start: %w", err)
	}
	defer lock.Close()
	for _, f := range []string{qmpSocket, linkSocket, netSocket, logFile, openedFile} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	log, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, d.args(spec)...)
	// Sockets are named relative to the directory: a path of one can't be longer than 107 bytes.
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p, err := startThroughShutdowns(cmd, lock)
	if err != nil {
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	m := &machine{dir: dir, process: p, qmp: newQMP(dir)}
	if err := m.connect(ctx); err != nil {
		return nil, errors.Join(d.startError(dir, err), m.Kill())
	}
	return m, nil
}

// startThroughShutdowns starts cmd so that the signals that a host sends all processes before it goes down don't
// end it: QEMU would quit at once, which is a power cut for its guest. A signal that is
// blocked where a process is started is blocked there too, and QEMU leaves it at that.
func startThroughShutdowns(cmd *exec.Cmd, lock *os.File) (*proclock.Process, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var blocked, before unix.Sigset_t
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGHUP} {
		blocked.Val[0] |= 1 << (sig - 1)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &blocked, &before); err != nil {
		return nil, fmt.Errorf("blocking signals: %w", err)
	}
	p, err := proclock.Start(cmd, lock)
	if merr := unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil); merr != nil {
		panic(merr) // there is no such failure with valid arguments
	}
	return p, err
}

func (d *Driver) startError(dir string, err error) error {
	if said := vm.LastLines(filepath.Join(dir, logFile), 0, 5); said != "" {
		return fmt.Errorf("QEMU did not start: %s", said)
	}
	return fmt.Errorf("QEMU did not start: %w", err)
}

func (d *Driver) Find(ctx context.Context, dir string) (vm.Machine, error) {
	p, err := proclock.Find(filepath.Join(dir, lockFile), lockPatience)
	if errors.Is(err, proclock.ErrNotHeld) {
		return nil, vm.ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("finding QEMU: %w", err)
	}
	m := &machine{dir: dir, process: p, qmp: newQMP(dir)}
	// QEMU talks to one client at a time, and to none while it is stopped. What is begun here
	// ends with QEMU.
	go func() {
		if m.connect(context.WithoutCancel(ctx)) == nil {
			m.qmp.takeOver()
		}
	}()
	return m, nil
}

func (d *Driver) Running(dir string) (bool, error) {
	return proclock.Held(filepath.Join(dir, lockFile))
}

// args is QEMU's command line. Commas in values are doubled, as its option parser wants.
func (d *Driver) args(spec vm.Spec) []string {
	escape := strings.NewReplacer(",", ",,")
	args := []string{
		"-M", machineType(d.Accel), "-accel", d.Accel.option(), "-cpu", d.Accel.cpu(),
		"-smp", fmt.Sprint(spec.CPUs), "-m", fmt.Sprint(spec.MemoryMB),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-kernel", spec.Kernel, "-initrd", spec.Initrd, "-append", d.Accel.cmdline(),
		"-qmp", "unix:" + qmpSocket + ",server=on,wait=off",
		"-chardev", "file,id=console,append=on,path=" + escape.Replace(spec.Console), "-serial", "chardev:console",
		"-device", "virtio-serial-device",
		"-chardev", "socket,id=" + linkChardev + ",server=on,wait=off,path=" + linkSocket,
		"-device", "virtserialport,chardev=" + linkChardev + ",name=shed,id=" + linkID,
		"-device", "virtio-rng-device",
		"-device", "virtio-balloon-device,free-page-reporting=on",
	}
	for i, disk := range spec.Disks {
		drive := fmt.Sprintf("if=none,id=disk%d,format=raw,discard=unmap,file=%s", i, escape.Replace(disk.Path))
		if disk.ReadOnly {
			drive += ",readonly=on"
		}
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("virtio-blk-device,drive=disk%d", i))
	}
	if spec.MAC != "" {
		// QEMU listens: only so can the network's process be replaced.
		args = append(args,
			"-netdev", "stream,id=net,server=on,addr.type=unix,addr.path="+netSocket,
			"-device", "virtio-net-device,netdev=net,mac="+spec.MAC)
	}
	return args
}

// machine is a running QEMU.
type machine struct {
	dir     string
	process *proclock.Process
	qmp     *qmp
}

// connect waits until QEMU answers on its control socket.
func (m *machine) connect(ctx context.Context) error {
	for {
		conn, err := vm.DialUnix(ctx, m.dir, qmpSocket)
		if err == nil {
			return m.qmp.open(ctx, conn)
		}
		select {
		case <-m.process.Ended():
			err = errors.New("it ended at once")
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(time.Millisecond):
			continue
		}
		close(m.qmp.done)
		return err
	}
}

func (m *machine) DialLink(ctx context.Context) (net.Conn, error) {
	if m.qmp.linkClosed() {
		return nil, vm.ErrLinkClosed
	}
	conn, err := vm.DialUnix(ctx, m.dir, linkSocket)
	if err != nil {
		return nil, err
	}
	m.qmp.closeWithGuest(conn)
	return conn, nil
}

func (m *machine) DialNetwork(ctx context.Context) (net.Conn, error) {
	return vm.DialUnix(ctx, m.dir, netSocket)
}

func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-m.process.Ended():
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
	<-m.qmp.done
	reason, panicked := m.qmp.shutdownReason()
	switch {
	case panicked || reason == "guest-panic":
		return vm.Exit{Cause: vm.Panic}, nil
	case reason == "guest-shutdown":
		return vm.Exit{Cause: vm.PowerOff}, nil
	case reason == "guest-reset":
		return vm.Exit{Cause: vm.Reboot}, nil
	case reason == "":
		detail := vm.LastLines(filepath.Join(m.dir, logFile), 0, 5)
		if detail == "" {
			return vm.Exit{Cause: vm.Killed, Detail: "QEMU was killed"}, nil
		}
		return vm.Exit{Cause: vm.Failed, Detail: detail}, nil
	default:
		return vm.Exit{Cause: vm.Killed, Detail: "QEMU was told to quit (" + reason + ")"}, nil
	}
}

func (m *machine) Kill() error {
	if err := m.process.Kill(); err != nil {
		return fmt.Errorf("QEMU: %w", err)
	}
	<-m.process.Ended()
	return nil
}
