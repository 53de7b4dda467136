//go:build linux

// Package qemu runs machines with QEMU's microvm machine, which has no firmware
// and no buses but virtio-mmio. It needs neither root nor KVM.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/vm"
)

// Files in a machine's directory.
const (
	qmpSocket  = "qmp.sock"
	linkSocket = "link.sock"
	netSocket  = "net.sock"
	logFile    = "vmm.log"
	pidFile    = "vmm.json"
	openedFile = "link.opened"
)

// What QEMU calls the link's port, and the host's end of it.
const linkID, linkChardev = "link-port", "link"

// mmioSlots is how many virtio-mmio devices a microvm with ACPI can use: it has one more, but a
// device there gets no interrupts (QEMU 7.2). The link, the network card, the
// random number generator and the balloon take one each.
const mmioSlots, otherDevices = 23, 4

// Driver is the QEMU driver.
type Driver struct {
	Binary string // of QEMU for this architecture
	Accel  Accel
}

var _ vm.Driver = (*Driver)(nil)

func (d *Driver) Name() string { return "qemu" }

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
	for _, f := range []string{qmpSocket, linkSocket, netSocket, pidFile, logFile, openedFile} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	log, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(d.Binary, d.args(spec)...)
	// Sockets are named relative to the directory: a path of one can't be longer than 107 bytes.
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	reaped := make(chan struct{})
	go func() {
		cmd.Wait()
		close(reaped)
	}()
	p, err := recordProcess(filepath.Join(dir, pidFile), cmd.Process.Pid)
	if err != nil {
		cmd.Process.Kill()
		<-reaped
		return nil, d.startError(dir, err)
	}
	m := &machine{dir: dir, process: p, qmp: newQMP(dir)}
	if err := m.connect(ctx); err != nil {
		p.kill()
		<-reaped
		return nil, d.startError(dir, err)
	}
	return m, nil
}

func (d *Driver) startError(dir string, err error) error {
	if said := vm.LastLines(filepath.Join(dir, logFile), 0, 5); said != "" {
		return fmt.Errorf("QEMU did not start: %s", said)
	}
	return fmt.Errorf("QEMU did not start: %w", err)
}

func (d *Driver) Find(ctx context.Context, dir string) (vm.Machine, error) {
	p, err := findProcess(filepath.Join(dir, pidFile))
	if err != nil {
		return nil, err
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

func (d *Driver) Running(dir string) bool {
	r, err := readRecord(filepath.Join(dir, pidFile))
	return err == nil && r.runs()
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
	process *process
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
		case <-m.process.ended:
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
	case <-m.process.ended:
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

func (m *machine) Kill() error { return m.process.kill() }

// processRecord names a process for as long as the machine is up: a pid may be used again.
type processRecord struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, from proc(5)
	Boot  string `json:"boot"`  // the kernel's boot ID
}

func readRecord(file string) (processRecord, error) {
	var r processRecord
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return r, vm.ErrNotRunning
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}
