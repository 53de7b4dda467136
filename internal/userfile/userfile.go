// Package userfile edits files that belong to the user: dotfiles, which are often links into a repository of
// them, which people and other programs change too, and of which all but what is edited is to stay as it is.
package userfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
)

// File is a file as it was read.
type File struct {
	Path string // where the name that was given leads: no symbolic link
	Text []byte // nil where there is no file
	// Links is how many other names the file has. They keep what it was when it is edited.
	Links int

	info fs.FileInfo
}

// Read reads the file that path leads to. CodeInvalid if that can't be done, or something else is there.
func Read(path string) (File, error) {
	f, err := read(path)
	return f, explain(err, path)
}

func read(path string) (File, error) {
	file, err := follow(path)
	if err != nil {
		return File{}, err
	}
	f := File{Path: file}
	f.info, err = os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if !f.info.Mode().IsRegular() {
		return f, shed.Errorf(shed.CodeInvalid, "%s is %s, not a file", path, kind(f.info.Mode())).WithHint("put a file there, or nothing")
	}
	f.Links = int(f.info.Sys().(*syscall.Stat_t).Nlink) - 1
	f.Text, err = os.ReadFile(file)
	return f, err
}

func kind(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a device"
}

// follow returns the file that path leads to. The last link may lead to nothing.
func follow(path string) (string, error) {
	given := path
	for range 40 {
		dir, base := filepath.Split(path)
		real, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, fs.ErrNotExist) && path == given {
			return path, nil // it can be made
		}
		if err != nil {
			return "", err
		}
		path = filepath.Join(real, base)
		link, err := os.Readlink(path)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.EINVAL): // nothing, or no link
			return path, nil
		case err != nil:
			return "", err
		case filepath.IsAbs(link):
			path = link
		default:
			path = real + "/" + link // Join would take ".." for the directory above by name
		}
	}
	return "", shed.Errorf(shed.CodeInvalid, "%s is a symbolic link that leads to itself", given)
}

// Edit has the file that path leads to become what edit makes of it: of File.Text, which is nil if there is no file, as what
// it returns is if there is to be none. Nothing is made or written where that changes nothing. edit may be called twice.
//
// Whoever reads the file meanwhile finds all of the old one or all of the new one. Several that call this take turns.
// A file whose owner and mode can't be kept, which nobody may write to, or which another program has changed at the same time
// (CodeConflict), stays as it is. The directory of a new file is made too.
func Edit(ctx context.Context, path string, edit func(File) ([]byte, error)) error {
	var failed error
	err := change(ctx, path, func(f File) (after []byte, err error) {
		after, failed = edit(f)
		return after, failed
	})
	if failed != nil {
		return failed
	}
	return explain(err, path)
}

func change(ctx context.Context, path string, edit func(File) ([]byte, error)) error {
	f, err := read(path)
	if err != nil {
		return err
	}
	after, err := edit(f)
	if err != nil || same(f.Text, after) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o700); err != nil {
		return err
	}
	file, err := follow(path)
	if err != nil {
		return err
	}
	unlock, err := Lock(ctx, filepath.Dir(file))
	if err != nil {
		return err
	}
	defer unlock()
	if f, err = read(path); err != nil {
		return err
	}
	if filepath.Dir(f.Path) != filepath.Dir(file) {
		return f.changedMeanwhile()
	}
	if after, err = edit(f); err != nil || same(f.Text, after) {
		return err
	}
	return f.replace(after)
}

func same(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }

const lockPoll = 10 * time.Millisecond

// Lock waits until nobody else has the lock on a directory, and takes it until unlock is called. A lock on a file in it
// would be no good: files are replaced.
func Lock(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { d.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			d.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			d.Close()
			return nil, fmt.Errorf("another shed is writing to %s: %w", dir, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// tempPrefix begins the names of files that are being written. It begins with a dot, which wildcards don't match.
const tempPrefix = ".shed-edit-"

// replace puts text to where the file is, durably. The directory is locked.
func (f File) replace(text []byte) error {
	if f.info != nil && f.info.Mode()&0o200 == 0 {
		return shed.Errorf(shed.CodeInvalid, "%s is read-only (mode %04o)", f.Path, f.info.Mode().Perm()).
			WithHint("let it be written to (chmod u+w %s) and try again, or change it by hand", f.Path)
	}
	dir := filepath.Dir(f.Path)
	left, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, file := range left {
		if strings.HasPrefix(file.Name(), tempPrefix) {
			os.Remove(filepath.Join(dir, file.Name())) // of a process that was killed
		}
	}
	tmp, err := os.CreateTemp(dir, tempPrefix) // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // unless it has another name by then
	err = f.fill(tmp, text)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	now, err := os.ReadFile(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !same(now, f.Text) {
		return f.changedMeanwhile()
	}
	if text == nil {
		err = os.Remove(f.Path)
	} else {
		err = os.Rename(tmp.Name(), f.Path)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// fill writes text to tmp, durably, and gives it the mode and the owner of the file that it is to replace.
func (f File) fill(tmp *os.File, text []byte) error {
	if _, err := tmp.Write(text); err != nil {
		return err
	}
	if f.info != nil {
		mine, err := tmp.Stat()
		if err != nil {
			return err
		}
		is, want := mine.Sys().(*syscall.Stat_t), f.info.Sys().(*syscall.Stat_t)
		if is.Uid != want.Uid || is.Gid != want.Gid {
			if err := tmp.Chown(int(want.Uid), int(want.Gid)); err != nil {
				return shed.Errorf(shed.CodeInvalid, "%s belongs to another user or group, and would not if it were replaced: %w", f.Path, err).
					WithHint("run this as its owner, or change it by hand")
			}
		}
		if err := tmp.Chmod(f.info.Mode().Perm()); err != nil { // after chown, which may take bits away
			return err
		}
	}
	return tmp.Sync()
}

func (f File) changedMeanwhile() error {
	return shed.Errorf(shed.CodeConflict, "%s was changed by somebody else at the same time", f.Path).WithHint("try again")
}

// explain says what to do about an error of the system about the file at path.
func explain(err error, path string) error {
	var known *shed.Error
	if err == nil || errors.As(err, &known) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return shed.Errorf(shed.CodeNoSpace, "no space left to write %s: %w", path, err).WithHint("free some space on its file system")
	}
	return shed.Errorf(shed.CodeInvalid, "%s can't be edited, and was left as it is: %w", path, err).
		WithHint("see that you may write to the file and its directory, or change it by hand")
}
