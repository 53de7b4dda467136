//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

// The disks come in this order: the upper, the kernel's modules, then the image's layers,
// bottom first.
const (
	upperDisk   = 0
	modulesDisk = 1
	firstLayer  = 2
)

// runSetup makes the machine the host's shed. Only the first call does all of it.
func (m *machine) runSetup(s agent.Setup) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := setClock(s.Clock)
	if m.setup == nil {
		network := make(chan error, 1)
		go func() { network <- setupNetwork(s.Network) }()
		err = errors.Join(err, unix.Sethostname([]byte(s.Hostname)), m.enterRoot(s), <-network)
	}
	if err != nil {
		return err
	}
	first := m.setup == nil
	m.setup = &s
	if first {
		go m.warmUp(s)
	}
	return nil
}

// warmUpLimit is how long an init may be kept waiting.
const warmUpLimit = 2 * time.Second

// warmUp asks the default user's login shell for its environment, which the first
// command needs, before an init competes for the processors.
func (m *machine) warmUp(s agent.Setup) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if a, err := lookupUser(""); err == nil {
			m.envs.get(a, a.baseEnv().with(s.Env...))
		}
	}()
	select {
	case <-done:
	case <-time.After(warmUpLimit):
	}
	m.ready.Close()
}

// enterRoot assembles the root file system, lets PID 1 switch to it, and follows.
func (m *machine) enterRoot(s agent.Setup) error {
	if err := assembleRoot(s.Layers); err != nil {
		return err
	}
	if err := mountModules(); err != nil {
		return fmt.Errorf("mounting the kernel's modules: %w", err)
	}
	if err := writeIdentity(s); err != nil {
		return err
	}
	if err := keepTmp(); err != nil {
		return err
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
	return unix.Chroot(".")
}

// assembleRoot mounts the layers and the upper as one overlay on /sysroot. Nothing but the
// overlay holds them then, so that unmounting it is all that a clean end needs.
func assembleRoot(layers int) error {
	if layers < 1 {
		return errors.New("an image without layers can't be a root file system")
	}
	const upper = "/mnt/upper"
	// A sparse file is to stay one: what is deleted is given back, and inode tables are not filled in.
	if err := mountDisk(upperDisk, upper, 0, "discard,noinit_itable"); err != nil {
		return fmt.Errorf("mounting the upper: %w", err)
	}
	mounted := []string{upper}
	for _, dir := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(upper, dir), 0o755); err != nil {
			return fmt.Errorf("preparing the upper: %w", err)
		}
	}
	var lower []string
	for i := range layers {
		dir := fmt.Sprintf("/mnt/l%d", i)
		if err := mountDisk(firstLayer+i, dir, unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("mounting layer %d of %d: %w", i+1, layers, err)
		}
		mounted = append(mounted, dir)
		lower = append([]string{dir}, lower...) // overlayfs wants the top first
	}
	// With redirect_dir a directory of a lower layer can be renamed, as on any
	// other file system; without, rename(2) fails with EXDEV.
	options := "redirect_dir=on,lowerdir=" + strings.Join(lower, ":") +
		",upperdir=" + upper + "/upper,workdir=" + upper + "/work"
	if err := os.MkdirAll(sysroot, 0o755); err != nil {
		return err
	}
	if err := mountEarly("overlay", sysroot, "overlay", 0, options); err != nil {
		return fmt.Errorf("mounting the overlay of %d layers: %w", layers, err)
	}
	for _, dir := range mounted {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	return nil
}

// keepTmp keeps systemd from emptying /tmp and from mounting another file system there: when it
// comes to that, commands use it already. /run is the one that the new root gets.
func keepTmp() error {
	if err := os.MkdirAll("/run/tmpfiles.d", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/run/tmpfiles.d/tmp.conf", []byte("d /tmp 1777 root root\nd /var/tmp 1777 root root\n"), 0o644); err != nil {
		return err
	}
	// Not in /run/systemd/system: programs take that for the sign that systemd runs.
	const units = "/run/systemd/system.control"
	if err := os.MkdirAll(units, 0o755); err != nil {
		return err
	}
	return os.Symlink(os.DevNull, units+"/tmp.mount")
}

func mountModules() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	dir, err := inSysroot("/lib/modules/" + unix.ByteSliceToString(uts.Release[:]))
	if err != nil {
		return err
	}
	return mountDisk(modulesDisk, dir, unix.MS_RDONLY, "")
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

// writeIdentity gives the root file system its host name and where to ask for others'.
// What a user made of these files stays: only what is missing is written.
func writeIdentity(s agent.Setup) error {
	etc := sysroot + "/etc"
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	if err := replaceIfOther(etc+"/hostname", s.Hostname+"\n"); err != nil {
		return err
	}
	hosts, err := os.ReadFile(etc + "/hosts")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text := string(hosts)
	if !strings.Contains(text, "localhost") {
		text += "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	}
	if !hasHost(text, s.Hostname) {
		text += "127.0.1.1\t" + s.Hostname + "\n"
	}
	if err := replaceIfOther(etc+"/hosts", text); err != nil {
		return err
	}
	if s.Network.DNS == "" {
		return nil
	}
	if fi, err := os.Lstat(etc + "/resolv.conf"); err == nil && (fi.Size() > 0 || !fi.Mode().IsRegular()) {
		return nil
	}
	return replaceIfOther(etc+"/resolv.conf", "nameserver "+s.Network.DNS+"\n")
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

// replaceIfOther writes a file unless it has that content. It doesn't follow a
// link, which would lead out of the new root.
func replaceIfOther(path, content string) error {
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		if err := os.Remove(path); err != nil {
			return err
		}
	} else if old, err := os.ReadFile(path); err == nil && string(old) == content {
		return nil
	}
	return os.WriteFile(path, []byte(content), 0o644)
}
