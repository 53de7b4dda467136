// Package kernel makes and keeps kernel bundles: what of a distribution's kernel
// package machines boot from.
package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/charliek/shed"
)

const (
	tempPrefix = ".tmp-"

	// What a bundle's directory holds, besides initramfs-*.cpio.
	manifestFile = "manifest.json"
	vmlinuzFile  = "vmlinuz"
	vmlinuxFile  = "vmlinux"     // only if it could be unpacked
	modulesFile  = "modules.img" // ext4
	bootDir      = "boot"        // what of the modules goes into the initramfs
	modulesDep   = "modules.dep"
)

// Store keeps bundles, each in a directory that is complete and synced when it
// appears and is named by its content. Methods may be called concurrently; only one process
// may use the directory at a time.
type Store struct {
	dir      string
	building chan struct{} // holds a value during a build
}

// Open opens the store in dir, which it makes if need be, and removes what killed
// processes left there.
func Open(dir string) (*Store, error) {
	if err := open(dir); err != nil {
		return nil, fmt.Errorf("opening the kernels: %w", err)
	}
	return &Store{dir: dir, building: make(chan struct{}, 1)}, nil
}

func open(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, pattern := range []string{tempPrefix + "*", "*/" + tempPrefix + "*"} {
		left, err := fs.Glob(os.DirFS(dir), pattern)
		if err != nil {
			return err
		}
		for _, p := range left {
			if err := os.RemoveAll(filepath.Join(dir, p)); err != nil {
				return fmt.Errorf("removing the leftover of a killed process: %w", err)
			}
		}
	}
	return nil
}

// manifest describes a bundle. Its ID is made from it.
type manifest struct {
	Release string            `json:"release"`
	Package string            `json:"package"`
	Version string            `json:"version"` // of the package
	Files   map[string]string `json:"files"`   // SHA-256 in hex, by path in the bundle
}

// Bundle is a kernel and its modules. It doesn't change, but for the initramfs
// that are added to it.
type Bundle struct {
	ID      string // the release, "-" and 12 hex digits
	Release string // as `uname -r` prints it
	dir     string
	kernel  string
}

// Kernel returns the path of the uncompressed kernel: on x86 an ELF file with a PVH
// entry point, on arm64 an Image. If the package's kernel couldn't be unpacked it is that one: on
// x86 a bzImage.
func (b *Bundle) Kernel() string { return filepath.Join(b.dir, b.kernel) }

// Modules returns the path of a read-only ext4 image of /lib/modules/RELEASE.
func (b *Bundle) Modules() string { return filepath.Join(b.dir, modulesFile) }

// Get returns the bundle with that ID. If there is none the error wraps fs.ErrNotExist.
func (s *Store) Get(id string) (*Bundle, error) {
	b, err := s.load(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, shed.Errorf(shed.CodeUnsupported, "the kernel %q is not on this server: %w", id, fs.ErrNotExist).
			WithHint("put %s back from a backup, or reset the shed: it then takes the current kernel", filepath.Join(s.dir, id))
	}
	return b, err
}

func (s *Store) load(id string) (*Bundle, error) {
	if !filepath.IsLocal(id) || filepath.Base(id) != id {
		return nil, fs.ErrNotExist
	}
	b := &Bundle{ID: id, dir: filepath.Join(s.dir, id), kernel: vmlinuzFile}
	data, err := os.ReadFile(filepath.Join(b.dir, manifestFile))
	if err != nil {
		return nil, fmt.Errorf("reading the kernel %s: %w", id, err)
	}
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("reading the kernel %s: %s: %w", id, manifestFile, err)
	}
	b.Release = m.Release
	if _, ok := m.Files[vmlinuxFile]; ok {
		b.kernel = vmlinuxFile
	}
	return b, nil
}

// Default returns the bundle that was built last, and builds one if there is none.
func (s *Store) Default(ctx context.Context, p shed.Progress) (*Bundle, error) {
	if b, err := s.last(); err != nil || b != nil {
		return b, err
	}
	release, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if b, err := s.last(); err != nil || b != nil {
		return b, err
	}
	return s.build(ctx, p)
}

// Build makes a bundle of the kernel that the distribution has now. If that is
// there already, it becomes the one that Default returns.
func (s *Store) Build(ctx context.Context, p shed.Progress) (*Bundle, error) {
	release, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return s.build(ctx, p)
}

// lock waits until no build runs and keeps others from running until release is called.
func (s *Store) lock(ctx context.Context) (release func(), err error) {
	select {
	case s.building <- struct{}{}:
		return func() { <-s.building }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another build of the kernel: %w", ctx.Err())
	}
}

// last returns the bundle whose manifest is the youngest, or nil if there is none.
func (s *Store) last() (*Bundle, error) {
	// That of a build that goes on doesn't match: it lies one level deeper.
	manifests, err := fs.Glob(os.DirFS(s.dir), "*/"+manifestFile)
	if err != nil {
		return nil, err
	}
	var id string
	var newest time.Time
	for _, m := range manifests {
		fi, err := os.Stat(filepath.Join(s.dir, m))
		if err != nil {
			return nil, fmt.Errorf("looking for kernels: %w", err)
		}
		if t := fi.ModTime(); id == "" || t.After(newest) {
			id, newest = filepath.Dir(m), t
		}
	}
	if id == "" {
		return nil, nil
	}
	return s.load(id)
}
