package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/charliek/shed"
)

// CreateTemp creates the temporary file that is to be committed to path. Its name follows from
// path, so what a killed process left is used again and not left for good. One at a time may do
// this for a path.
func CreateTemp(path string) (*os.File, error) {
	name := filepath.Join(filepath.Dir(path), tempPrefix+filepath.Base(path))
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// Commit makes the open temporary file f the file at path, with the given
// mode: it syncs f, closes it, renames it over whatever is at path and syncs
// the directory. f must be on the same file system as path. Where it fails, f is
// closed and removed, and what was at path is still there, unless it is the directory's sync, the last step, that
// fails.
func Commit(f *os.File, path string, mode fs.FileMode) error {
	// What can't be opened is to fail before the rename.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return errors.Join(err, discard(f))
	}
	defer dir.Close()
	err = f.Chmod(mode)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(NoSpace(err, path), os.Remove(f.Name()))
	}
	return dir.Sync()
}

// discard closes and removes a temporary file that is not going to be committed.
func discard(f *os.File) error {
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// Sync makes the file or directory at path durable: of a directory, which names it holds.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// NoSpace gives err the code that tells a user that the disk is full, if that
// is what err says; path names the file that was being written.
func NoSpace(err error, path string) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) || shed.ErrorCode(err) == shed.CodeNoSpace {
		return err
	}
	return shed.Errorf(shed.CodeNoSpace, "no space left to write %s: %w", path, err).
		WithHint("free some space on the file system of %s; `shed system df` shows what shed uses", filepath.Dir(path))
}

// DiskUsage returns the bytes that the files at the given paths really occupy,
// holes not counted. A file that isn't there occupies nothing.
func DiskUsage(paths ...string) int64 {
	var n int64
	for _, p := range paths {
		fi, err := os.Lstat(p)
		if err != nil {
			continue
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			n += st.Blocks * 512
		}
	}
	return n
}

// removeTemps removes what a killed process left behind in dir.
func removeTemps(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, p := range left {
		if err := os.Remove(p); err != nil {
			return fmt.Errorf("removing the leftover of a killed process: %w", err)
		}
	}
	return nil
}

const tempPrefix = ".tmp-"
