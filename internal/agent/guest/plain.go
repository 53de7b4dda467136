//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// plainDirs are where container engines keep layers, which they mount as overlays. On an overlay that can't be
// done; so these directories lie on the upper's own file system.
var plainDirs = []string{"/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"}

// bindPlainDirs mounts directories of the upper on plainDirs of the new root. An image that has something
// there keeps it in sight, on the overlay; one that has no /var/lib gets none.
func bindPlainDirs() error {
	root, err := os.OpenRoot(sysroot)
	if err != nil {
		return err
	}
	defer root.Close()
	if fi, err := root.Stat("var/lib"); err != nil || !fi.IsDir() {
		return nil
	}
	for _, dir := range plainDirs {
		if err := bindPlainDir(root, dir[1:]); err != nil {
			return fmt.Errorf("mounting a directory of the upper on %s: %w", dir, err)
		}
	}
	return nil
}

func bindPlainDir(root *os.Root, dir string) error {
	source := filepath.Join(upper, "plain", filepath.Base(dir))
	if err := root.Mkdir(dir, 0o710); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	target, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer target.Close()
	if _, err := os.Stat(source); errors.Is(err, fs.ErrNotExist) {
		if _, err := target.Readdirnames(1); !errors.Is(err, io.EOF) {
			return err // nil where there is something
		}
		if err := os.MkdirAll(source, 0o710); err != nil {
			return err
		}
	}
	return unix.Mount(source, fmt.Sprintf("/proc/self/fd/%d", target.Fd()), "", unix.MS_BIND, "")
}
