//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// earlyMounts are those that the agent itself and every program need. They
// move to the new root, where systemd takes them as they are.
var earlyMounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=20%"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate,memory_recursiveprot"},
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	return nil
}

func runInit() error {
	// No program of the image has run yet: whatever goes wrong here leaves
	// nothing to save, and a reboot tells the host so.
	err := boot()
	logf("%v", err)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	return err
}

func boot() error {
	unix.Umask(0o022)
	// Loading the modules takes longest: the rest goes on meanwhile.
	modules, err := openModules()
	if err != nil {
		return err
	}
	disks := make(chan error, 1)
	// On ready the agent tells that the new root is there, and by its end that an init may start.
	// On entered it is told that disks can be mounted, and by its end that the new root is entered.
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	enteredR, enteredW, err := os.Pipe()
	if err != nil {
		return err
	}
	go func() {
		err := modules.loadDisks()
		if err == nil {
			_, err = enteredW.Write([]byte{1})
		}
		disks <- err
	}()
	if err := mountAll(earlyMounts); err != nil {
		return err
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	agent, err := startAgent(readyW, enteredR)
	if err != nil {
		return fmt.Errorf("starting the agent: %w", err)
	}
	readyW.Close()
	enteredR.Close()
	if err := <-disks; err != nil {
		return err
	}
	if _, err := io.ReadFull(readyR, make([]byte, 1)); err != nil {
		return errors.New("the agent ended before the root file system was ready")
	}
	self, err := os.Open("/init")
	if err != nil {
		return err
	}
	initramfs, err := switchRoot()
	if err != nil {
		return fmt.Errorf("switching to the new root: %w", err)
	}
	enteredW.Close()
	// The shed is there already: without these it has no network, or no clean end.
	if err := modules.loadNetwork(); err != nil {
		logf("%v", err)
	}
	io.Copy(io.Discard, readyR)
	readyR.Close()
	if err := errors.Join(modules.close(), copyFile(self, exitrdBinary, 0o755)); err != nil {
		logf("%v", err)
	}
	if systemd, ok := findSystemd(); ok {
		// It returns only on failure.
		err := unix.Exec(systemd, []string{"/sbin/init"}, []string{"TERM=linux"})
		logf("starting %s: %v", systemd, err)
	}
	return reap(agent, initramfs)
}

// copyFile copies src, which it closes, to the file to.
func copyFile(src *os.File, to string, mode os.FileMode) error {
	defer src.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}

// How many descriptors a process may have: as systemd has it for services.
const softFiles, hardFiles = 1024, 512 << 10

// limitFiles sets how many descriptors what is started from here on may have. The kernel's limit would be too low for the
// agent, which needs one for each forwarded connection, and some beside to start commands with. In a Go program, as it
// is, package syscall raises the soft limit to the hard one, and gives what it starts the soft one again.
func limitFiles(soft, hard uint64) error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: soft, Max: hard}); err != nil {
		return fmt.Errorf("raising the limit of open files: %w", err)
	}
	return nil
}

// startAgent starts the agent, in a cgroup of its own that systemd leaves alone.
func startAgent(ready, entered *os.File) (pid int, err error) {
	for _, dir := range []string{agentCgroup, userCgroup} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return 0, err
		}
	}
	if err := limitFiles(softFiles, hardFiles); err != nil {
		return 0, err
	}
	cgroup, err := os.Open(agentCgroup)
	if err != nil {
		return 0, err
	}
	defer cgroup.Close()
	console, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, err
	}
	defer console.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess("/init", []string{agentName}, &os.ProcAttr{
		Dir:   "/",
		Files: []*os.File{null, console, console, ready, entered},
		Sys:   &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())},
	})
	if err != nil {
		return 0, err
	}
	return p.Pid, nil
}

// switchRoot makes /sysroot the root, as switch_root(8) does for an initramfs,
// which can't be unmounted: its files are deleted, when they are no longer needed, to give back the memory.
// It returns the way back, a descriptor of the initramfs's root.
func switchRoot() (initramfs int, err error) {
	initramfs, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run"} {
		if err := os.MkdirAll(sysroot+dir, 0o755); err != nil {
			return 0, err
		}
		if err := unix.Mount(dir, sysroot+dir, "", unix.MS_MOVE, ""); err != nil {
			return 0, fmt.Errorf("moving %s: %w", dir, err)
		}
	}
	os.Remove("/init")
	if err := unix.Chdir(sysroot); err != nil {
		return 0, err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return 0, err
	}
	if err := unix.Chroot("."); err != nil {
		return 0, err
	}
	return initramfs, unix.Chdir("/")
}

// findSystemd returns the image's systemd. Another init isn't started, though the image may have one:
// OpenRC and busybox's would set up again what is there (mounts, the host name, the network, terminals that this machine
// has not), and at shutdown kill the agent, which only systemd knows to spare, and with it every session before it
// can be ended well. Services of such an image are for its users to start.
func findSystemd() (string, bool) {
	target, err := filepath.EvalSymlinks("/sbin/init")
	if err != nil || !strings.Contains(filepath.Base(target), "systemd") {
		return "", false
	}
	return target, true
}

// reap is all that an init must do where the image has none: bury orphans, and
// end the machine when asked to, by the signals of busybox's and systemd's
// poweroff and reboot.
func reap(agent, initramfs int) error {
	const sigPowerOff, sigReboot = syscall.Signal(34 + 4), syscall.Signal(34 + 5) // SIGRTMIN+4, +5: systemd(1)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGCHLD, unix.SIGUSR1, unix.SIGUSR2, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, sigPowerOff, sigReboot)
	for {
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if err != nil || pid <= 0 {
				break
			}
			if pid == agent {
				return errors.New("the agent ended")
			}
		}
		switch <-signals {
		case unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR, sigPowerOff:
			endSessions(agent)
			return powerOff(initramfs, "poweroff")
		case unix.SIGTERM, unix.SIGINT, sigReboot:
			endSessions(agent)
			return powerOff(initramfs, "reboot")
		}
	}
}

// powerOff ends the machine with its root file system unmounted: it goes back
// to the initramfs and detaches the whole tree, which no other process holds any more.
func powerOff(initramfs int, verb string) error {
	killAll()
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		// The root can be named only by its descriptor: the initramfs's root lies below it.
		err = errors.Join(unix.Chdir("/proc/self/fd"), unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""))
		if err == nil {
			err = unix.Unmount(fmt.Sprint(root), unix.MNT_DETACH)
		}
		err = errors.Join(err, unix.Fchdir(initramfs), unix.Chroot("."))
		unix.Close(root)
	}
	if err != nil {
		logf("unmounting the root file system: %v", err)
	}
	return runShutdown([]string{verb})
}

// endSessions asks all processes but the agent to end, and waits a little.
func endSessions(agent int) {
	unix.Kill(-1, unix.SIGTERM)
	unix.Kill(-1, unix.SIGHUP)
	for range 40 {
		var status unix.WaitStatus
		for {
			if pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil); err != nil || pid <= 0 {
				break
			}
		}
		if !othersRun(agent) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// othersRun says whether there are processes besides PID 1, the agent and the kernel's.
func othersRun(agent int) bool {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return false
	}
	for _, p := range procs {
		pid := filepath.Base(filepath.Dir(p))
		if pid == "1" || pid == fmt.Sprint(agent) {
			continue
		}
		if cmdline, err := os.ReadFile(p); err == nil && len(cmdline) > 0 {
			return true
		}
	}
	return false
}
