//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// The disks come in this order: the upper, the kernel's modules, then the image's layers,
// bottom first.
const (
	upperDisk   = 0
	modulesDisk = 1
	firstLayer  = 2
)

const (
	upper        = "/mnt/upper"
	modulesMount = "/mnt/modules"
)

// runSetup makes the machine the host's shed. Only the first call does all of it.
func (m *machine) runSetup(s agent.Setup) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.setup == nil {
		err = errors.Join(setClock(s.Clock), unix.Sethostname([]byte(s.Hostname)), m.enterRoot(s))
	} else {
		err = m.followClock(s.Clock)
	}
	if err != nil {
		return err
	}
	first := m.setup == nil
	m.setup = &s
	if first {
		network := make(chan struct{})
		m.network = network
		go func() {
			defer close(network)
			// Who has no network finds that out, and can look for why in the shed.
			if err := setupNetwork(s.Network); err != nil {
				logf("the network: %v", err)
			}
		}()
		go m.warmUp(s)
	}
	return nil
}

// How long an init may be kept waiting for the login shell, and then for commands that are there already.
const (
	warmUpLimit  = 2 * time.Second
	commandLimit = 200 * time.Millisecond
)

// warmUp asks the login shell of whom programs run as for its environment, which the first one
// needs, before an init competes for the processors.
func (m *machine) warmUp(s agent.Setup) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if a, base, err := commandUser(s, "", true); err == nil {
			m.shellEnv(a, base)
		}
	}()
	select {
	case <-done:
	case <-time.After(warmUpLimit):
	}
	for end := time.Now().Add(commandLimit); m.commands.Load() > 0 && time.Now().Before(end); {
		time.Sleep(devicePoll)
	}
	m.ready.Close()
}

// enterRoot assembles the root file system, lets PID 1 switch to it, and follows.
func (m *machine) enterRoot(s agent.Setup) error {
	// The kernel would look for a program that loads the driver, again and again.
	if _, err := io.ReadFull(m.entered, make([]byte, 1)); err != nil {
		return errors.New("the modules that disks need could not be loaded")
	}
	own, err := assembleRoot(s.Layers)
	if err != nil {
		return err
	}
	defer own.Close()
	moved := make(chan error, 1)
	go func() { moved <- moveModules() }()
	if err := errors.Join(keepTmp(), maskUnits(), <-moved); err != nil {
		return err
	}
	// Whatever is wrong with these, such as a full disk, is put right in the shed.
	if err := writeIdentity(sysroot, "/run", s); err != nil {
		logf("writing the host's name and name server: %v", err)
	}
	root, err := unix.Open(sysroot, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	if _, err := m.ready.Write([]byte{1}); err != nil {
		return err
	}
	io.Copy(io.Discard, m.entered)
	m.entered.Close()
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return prepareOnce(own, s)
}

// assembleRoot mounts the layers and the upper as one overlay on /sysroot, and the kernel's modules
// beside it. Nothing but what is mounted there holds its parts then, so that unmounting that is all that a
// clean end needs.
//
// It returns the upper's own directory, in which the shed's users see nothing.
func assembleRoot(layers int) (own *os.Root, err error) {
	if layers < 1 {
		return nil, errors.New("an image without layers can't be a root file system")
	}
	// All at once: each waits for its disk to be read.
	errs := make([]error, 2+layers)
	var wg sync.WaitGroup
	wg.Go(func() {
		// A sparse file is to stay one: what is deleted is given back, and inode tables are not filled in.
		if err := mountDisk(upperDisk, upper, 0, "discard,noinit_itable"); err != nil {
			errs[upperDisk] = shed.Errorf(agent.CodeUpper, "mounting the upper: %w", err)
			return
		}
		for _, dir := range []string{"upper", "work"} {
			if err := os.MkdirAll(filepath.Join(upper, dir), 0o755); err != nil {
				errs[upperDisk] = fmt.Errorf("preparing the upper: %w", err)
			}
		}
	})
	wg.Go(func() {
		if err := mountDisk(modulesDisk, modulesMount, unix.MS_RDONLY, ""); err != nil {
			errs[modulesDisk] = fmt.Errorf("mounting the kernel's modules: %w", err)
		}
	})
	mounted := []string{upper}
	var lower []string
	for i := range layers {
		dir := fmt.Sprintf("/mnt/l%d", i)
		mounted = append(mounted, dir)
		lower = append([]string{dir}, lower...) // overlayfs wants the top first
		wg.Go(func() {
			if err := mountDisk(firstLayer+i, dir, unix.MS_RDONLY, ""); err != nil {
				errs[firstLayer+i] = shed.Errorf(agent.CodeLayer, "mounting layer %d of %d: %w", i+1, layers, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	// With redirect_dir a directory of a lower layer can be renamed, as on any
	// other file system; without, rename(2) fails with EXDEV.
	options := "redirect_dir=on,lowerdir=" + strings.Join(lower, ":") +
		",upperdir=" + upper + "/upper,workdir=" + upper + "/work"
	if err := os.MkdirAll(sysroot, 0o755); err != nil {
		return nil, err
	}
	if err := mountEarly("overlay", sysroot, "overlay", 0, options); err != nil {
		return nil, fmt.Errorf("mounting the overlay of %d layers: %w", layers, err)
	}
	if err := bindPlainDirs(); err != nil {
		return nil, err
	}
	if own, err = os.OpenRoot(upper); err != nil {
		return nil, err
	}
	for _, dir := range mounted {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return nil, errors.Join(err, own.Close())
		}
	}
	return own, nil
}

// preparedFile is in the upper's own directory when the image is prepared. It says no more
// than that, and so it need not be synced: file systems keep the order of such changes.
const preparedFile = "prepared"

// prepareOnce prepares the image, which is the root file system by now, at the first boot.
func prepareOnce(own *os.Root, s agent.Setup) error {
	if _, err := own.Stat(preparedFile); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := prepareImage("/", s.Image, time.Unix(0, s.Clock.UnixNano)); err != nil {
		return fmt.Errorf("preparing the image: %w", err)
	}
	f, err := own.Create(preparedFile)
	if err != nil {
		return err
	}
	return f.Close()
}

// keepTmp keeps systemd from emptying /tmp: when it
// comes to that, commands use it already. /run is the one that the new root gets.
func keepTmp() error {
	if err := os.MkdirAll("/run/tmpfiles.d", 0o755); err != nil {
		return err
	}
	return os.WriteFile("/run/tmpfiles.d/tmp.conf", []byte("d /tmp 1777 root root\nd /var/tmp 1777 root root\n"), 0o644)
}

// maskUnits has systemd leave out the file system of its own for /tmp, and logins on the console, which nobody can
// type on: where no udev tells of the console, the boot would wait for it.
func maskUnits() error {
	// Not in /run/systemd/system: programs take that for the sign that systemd runs.
	const units = "/run/systemd/system.control"
	if err := os.MkdirAll(units, 0o755); err != nil {
		return err
	}
	for _, unit := range []string{"tmp.mount", "serial-getty@ttyS0.service", "serial-getty@ttyAMA0.service", "serial-getty@hvc0.service"} {
		if err := os.Symlink(os.DevNull, filepath.Join(units, unit)); err != nil {
			return err
		}
	}
	return nil
}

// moveModules puts the kernel's modules where programs look for them.
func moveModules() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	dir, err := inSysroot("/lib/modules/" + unix.ByteSliceToString(uts.Release[:]))
	if err == nil {
		err = unix.Mount(modulesMount, dir, "", unix.MS_MOVE, "")
	}
	if err != nil {
		return fmt.Errorf("mounting the kernel's modules: %w", err)
	}
	return nil
}

// inSysroot makes the directory path in the new root and returns where it is from
// here. Only /lib may be a link, as on systems with a merged /usr.
func inSysroot(path string) (string, error) {
	rest := strings.TrimPrefix(path, "/lib/")
	dir := sysroot + "/lib"
	if target, err := os.Readlink(dir); err == nil {
		dir = filepath.Join(sysroot, filepath.Join("/", target))
	}
	dir = filepath.Join(dir, rest)
	return dir, os.MkdirAll(dir, 0o755)
}

// mountDisk mounts the ext4 file system on the i-th disk, which may still be appearing.
func mountDisk(i int, dir string, flags uintptr, options string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	disk := diskName(i)
	if err := mountEarly(disk, dir, "ext4", flags, options); err != nil {
		return fmt.Errorf("%s: %w", disk, err)
	}
	return nil
}

// mountEarly mounts what may need a disk or a module that isn't there yet.
func mountEarly(source, dir, fstype string, flags uintptr, options string) error {
	for deadline := time.Now().Add(deviceTimeout); ; time.Sleep(devicePoll) {
		err := unix.Mount(source, dir, fstype, flags, options)
		early := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV)
		if !early || time.Now().After(deadline) {
			return err
		}
	}
}

// diskName names virtio disks as the kernel does: vda to vdz, then vdaa.
func diskName(i int) string {
	name := ""
	for i++; i > 0; i = (i - 1) / 26 {
		name = string(rune('a'+(i-1)%26)) + name
	}
	return "/dev/vd" + name
}

// writeIdentity gives the root file system its host name, at each boot, and where to ask for others'
// unless it says that itself. run is the /run that it gets.
func writeIdentity(root, run string, s agent.Setup) error {
	etc := root + "/etc"
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	return errors.Join(
		replaceIfOther(etc+"/hostname", s.Hostname+"\n"),
		writeHosts(etc+"/hosts", s.Hostname),
		writeResolvConf(etc+"/resolv.conf", run, s.Network.DNS),
	)
}

func writeHosts(path, hostname string) error {
	hosts, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text := string(hosts)
	if !strings.Contains(text, "localhost") {
		text += "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	}
	if !hasHost(text, hostname) {
		text += "127.0.1.1\t" + hostname + "\n"
	}
	return replaceIfOther(path, text)
}

func writeResolvConf(path, run, server string) error {
	if server == "" {
		return nil
	}
	if target, err := os.Readlink(path); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join("/etc", target)
		}
		// What makes the file there, such as systemd-resolved, replaces this one, if it ever runs.
		inRun, ok := strings.CutPrefix(strings.TrimPrefix(filepath.Clean(target), "/var"), "/run/")
		if !ok {
			return nil
		}
		path = filepath.Join(run, inRun)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	if fi, err := os.Lstat(path); err == nil && (fi.Size() > 0 || !fi.Mode().IsRegular()) {
		return nil
	}
	return replaceIfOther(path, "nameserver "+server+"\n")
}

func hasHost(hosts, name string) bool {
	for line := range strings.Lines(hosts) {
		line, _, _ = strings.Cut(line, "#")
		for i, f := range strings.Fields(line) {
			if i > 0 && f == name {
				return true
			}
		}
	}
	return false
}

// replaceIfOther writes a file unless it has that content: all of it or, where that fails, nothing. It doesn't follow
// a link, which would lead out of the new root.
func replaceIfOther(path, content string) error {
	mode, uid, gid := os.FileMode(0o644), 0, 0
	if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() {
		if old, err := os.ReadFile(path); err == nil && string(old) == content {
			return nil
		}
		st := fi.Sys().(*syscall.Stat_t)
		mode, uid, gid = fi.Mode().Perm(), int(st.Uid), int(st.Gid)
	}
	f, err := os.OpenFile(path+newSuffix, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	err = errors.Join(err, f.Chown(uid, gid), f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
