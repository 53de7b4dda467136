//go:build linux

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// modulesDir holds the kernel modules that boot needs, flat, and "modules.dep": a
// line for each, its name, a colon and the names that it depends on.
const modulesDir = "/modules"

// loader loads kernel modules from the initramfs, each once, dependencies first. It finds
// them wherever the root directory is by then.
type loader struct {
	dir  *os.Root
	deps map[string][]string
	mu   sync.Mutex
	once map[string]func() error
}

func openModules() (*loader, error) {
	dir, err := os.OpenRoot(modulesDir)
	if err != nil {
		return nil, err
	}
	b, err := dir.ReadFile("modules.dep")
	if err != nil {
		return nil, err
	}
	l := &loader{dir: dir, deps: map[string][]string{}, once: map[string]func() error{}}
	for line := range strings.Lines(string(b)) {
		if name, deps, ok := strings.Cut(line, ":"); ok {
			l.deps[name] = strings.Fields(deps)
		}
	}
	return l, nil
}

// close deletes the modules: the memory of an initramfs's files is given back only so.
func (l *loader) close() error {
	d, err := l.dir.Open(".")
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	for _, name := range names {
		err = errors.Join(err, l.dir.Remove(name))
	}
	return errors.Join(err, d.Close(), l.dir.Close())
}

// load loads the named modules. One that isn't there is taken to be built into the kernel.
func (l *loader) load(names ...string) error {
	for _, name := range names {
		l.mu.Lock()
		f, ok := l.once[name]
		if !ok {
			f = sync.OnceValue(func() error { return l.insert(name) })
			l.once[name] = f
		}
		l.mu.Unlock()
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// loadDisks loads all that a machine needs to answer the host and mount its root file system.
func (l *loader) loadDisks() error {
	groups := [][]string{
		// Disks are told apart by the order in which they get their names. That is the order of
		// the devices only if the driver comes when all of them are there.
		{"virtio_mmio", "virtio_blk"},
		{"virtio_mmio", "virtio_console"},
		{"ext4", "overlay"},
	}
	errs := make(chan error, len(groups))
	for _, names := range groups {
		go func() { errs <- l.load(names...) }()
	}
	var err error
	for range groups {
		err = errors.Join(err, <-errs)
	}
	return err
}

// loadNetwork loads what the network card needs. Commands wait for it, but not the disks, nor
// the login shell that is asked for its environment.
func (l *loader) loadNetwork() error { return l.load("virtio_net") }

func (l *loader) insert(name string) error {
	deps, ok := l.deps[name]
	if !ok {
		return nil
	}
	if err := l.load(deps...); err != nil {
		return err
	}
	image, err := l.dir.ReadFile(name + ".ko")
	if err != nil {
		return err
	}
	// The kernel and its modules come from the same host, so that a signature proves nothing here.
	// To check them takes longer than all else that loading does.
	err = unix.InitModule(unsigned(image), "")
	if errors.Is(err, unix.EKEYREJECTED) || errors.Is(err, unix.EPERM) { // a kernel that insists on it
		err = unix.InitModule(image, "")
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("loading the module %s: %w", name, err)
	}
	return nil
}

// unsigned returns a module without the signature that the kernel's build has appended: the
// signature, struct module_signature (include/linux/module_signature.h), whose last
// field is the signature's length, and a mark.
func unsigned(image []byte) []byte {
	const mark, header = "~Module signature appended~\n", 12
	signed, ok := bytes.CutSuffix(image, []byte(mark))
	if !ok || len(signed) < header {
		return image
	}
	n := len(signed) - header - int(binary.BigEndian.Uint32(signed[len(signed)-4:]))
	if n < 0 {
		return image
	}
	return signed[:n]
}
