//go:build linux

package guest

import (
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

// loader loads kernel modules from the initramfs, each once, dependencies first.
type loader struct {
	deps map[string][]string
	mu   sync.Mutex
	once map[string]func() error
}

func newLoader() (*loader, error) {
	b, err := os.ReadFile(modulesDir + "/modules.dep")
	if err != nil {
		return nil, err
	}
	l := &loader{deps: map[string][]string{}, once: map[string]func() error{}}
	for line := range strings.Lines(string(b)) {
		if name, deps, ok := strings.Cut(line, ":"); ok {
			l.deps[name] = strings.Fields(deps)
		}
	}
	return l, nil
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

// loadAll loads all that a machine needs to become a shed.
func (l *loader) loadAll() error {
	groups := [][]string{
		// Disks are told apart by the order in which they get their names. That is the order of
		// the devices only if the driver comes when all of them are there.
		{"virtio_mmio", "virtio_blk", "virtio_console", "virtio_net"},
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

func (l *loader) insert(name string) error {
	deps, ok := l.deps[name]
	if !ok {
		return nil
	}
	if err := l.load(deps...); err != nil {
		return err
	}
	f, err := os.Open(modulesDir + "/" + name + ".ko")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("loading the module %s: %w", name, err)
	}
	return nil
}
