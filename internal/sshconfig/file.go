package sshconfig

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

// Edit returns the hosts that the block is to have, given those that it has. It may be called twice.
type Edit func(installed []Host) ([]Host, error)

// Change is what an Edit makes of a configuration file.
type Change struct {
	File   string // where the name that was given leads: no symbolic link
	Before []byte // nil where there is no file
	After  []byte // nil where there is to be none
	Hosts  []Host // in the block then, as by Named
	// Links is how many other names the file has. They keep what it was before.
	Links int
	// Included is the line of After, if not 0, from which on the file includes others for all
	// hosts. In ssh's eyes the block changes nothing about that, but VS Code and Cursor
	// look at no files that are included below a Host line.
	Included int

	info os.FileInfo // of the file before
}

// Changed says whether there is anything to change.
func (c Change) Changed() bool {
	return (c.Before == nil) != (c.After == nil) || !bytes.Equal(c.Before, c.After)
}

// Plan returns what Apply would do.
func Plan(path string, edit Edit) (Change, error) {
	file, err := follow(path)
	if err != nil {
		return Change{}, err
	}
	c := Change{File: file}
	var d document
	if c.info, err = os.Stat(file); err == nil {
		if c.Before, err = read(path, c.info); err == nil {
			d, err = parse(path, c.Before)
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		d.made, err = true, nil
	}
	if err != nil {
		return c, fileError(err, path)
	}
	hosts, err := edit(Named(d.hosts))
	if err != nil {
		return c, err
	}
	c.Hosts = Named(hosts)
	c.After = d.with(hosts)
	if d.made && len(c.After) == 0 {
		c.After = nil
	}
	rest := d.text[d.end:]
	if n := include(rest); n > 0 && len(hosts) > 0 {
		c.Included = n + bytes.Count(c.After[:len(c.After)-len(rest)], []byte("\n"))
	}
	if st, ok := sysStat(c.info); ok {
		c.Links = int(st.Nlink) - 1
	}
	return c, nil
}

// Apply changes the block in the configuration file at path, which need not be there, nor its
// directory. Whoever reads the file meanwhile finds all of the old one or all of the new one.
// Several that do this take turns. Of a file that can't be read, kept as it is otherwise
// (its owner, its mode) or replaced, nothing is changed.
func Apply(ctx context.Context, path string, edit Edit) (Change, error) {
	c, err := Plan(path, edit)
	if err != nil || !c.Changed() {
		return c, err
	}
	if err := os.Mkdir(filepath.Dir(c.File), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return c, fileError(err, path)
	}
	file, err := follow(path)
	if err != nil {
		return c, err
	}
	dir := filepath.Dir(file)
	unlock, err := lock(ctx, dir)
	if err != nil {
		return c, fileError(err, path)
	}
	defer unlock()
	if c, err = Plan(path, edit); err != nil || !c.Changed() {
		return c, err
	}
	if filepath.Dir(c.File) != dir {
		return c, changedMeanwhile(path)
	}
	return c, fileError(c.commit(path), path)
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
			return "", fileError(err, given)
		}
		path = filepath.Join(real, base)
		link, err := os.Readlink(path)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.EINVAL): // nothing, or no link
			return path, nil
		case err != nil:
			return "", fileError(err, given)
		case filepath.IsAbs(link):
			path = link
		default:
			path = real + "/" + link // Join would take ".." for the directory above by name
		}
	}
	return "", shed.Errorf(shed.CodeInvalid, "%s is a symbolic link that leads to itself", given)
}

// read returns what is in the file of info, to which path leads. It is not nil.
func read(path string, info os.FileInfo) ([]byte, error) {
	if !info.Mode().IsRegular() {
		return nil, shed.Errorf(shed.CodeInvalid, "%s is %s, not a file", path, kind(info.Mode())).
			WithHint("put what `shed ssh-config` prints to where ssh reads it")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for _, mark := range []string{"\xef\xbb\xbf", "\xff\xfe", "\xfe\xff"} {
		if bytes.HasPrefix(text, []byte(mark)) {
			return nil, shed.Errorf(shed.CodeInvalid, "%s begins with a byte order mark, and ssh can't read such a file", path).
				WithHint("save it as UTF-8 without a byte order mark, and try again")
		}
	}
	return text, nil
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

const lockPoll = 10 * time.Millisecond

// lock waits until nobody else has the lock on a directory, and takes it. A lock on the file
// itself would be no good: it is replaced.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
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

// tempPrefix begins with a dot, which the wildcards of an Include don't match.
const tempPrefix = ".shed-ssh-config-"

// commit puts After to where Before is. The directory is locked.
func (c Change) commit(path string) error {
	mode := fs.FileMode(0o600)
	if c.info != nil {
		mode = c.info.Mode().Perm()
		if mode&0o200 == 0 {
			return shed.Errorf(shed.CodeInvalid, "%s is read-only (mode %04o)", c.File, mode).
				WithHint("let it be written to, with chmod u+w %s, and try again; or put what `shed ssh-config` prints into it", c.File)
		}
	}
	dir := filepath.Dir(c.File)
	left, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, file := range left {
		if strings.HasPrefix(file.Name(), tempPrefix) {
			os.Remove(filepath.Join(dir, file.Name())) // of a process that was killed
		}
	}
	tmp, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // unless it has another name by then
	err = c.fill(tmp, mode)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	now, err := os.ReadFile(c.File)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if (err == nil) != (c.Before != nil) || !bytes.Equal(now, c.Before) {
		return changedMeanwhile(path)
	}
	if c.After == nil {
		err = os.Remove(c.File)
	} else {
		err = os.Rename(tmp.Name(), c.File)
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

// fill writes After to tmp, durably, and gives it the mode and the owner of the file that it is to replace.
func (c Change) fill(tmp *os.File, mode fs.FileMode) error {
	if _, err := tmp.Write(c.After); err != nil {
		return err
	}
	if c.info != nil {
		mine, err := tmp.Stat()
		if err != nil {
			return err
		}
		is, ok := sysStat(mine)
		want, okWant := sysStat(c.info)
		if ok && okWant && (is.Uid != want.Uid || is.Gid != want.Gid) {
			if err := tmp.Chown(int(want.Uid), int(want.Gid)); err != nil {
				return shed.Errorf(shed.CodeInvalid, "%s belongs to another user or group, and would not if it were replaced: %w", c.File, err).
					WithHint("run this as its owner; or put what `shed ssh-config` prints into it")
			}
		}
	}
	if err := tmp.Chmod(mode); err != nil { // after chown, which may take bits away
		return err
	}
	return tmp.Sync()
}

func sysStat(info os.FileInfo) (*syscall.Stat_t, bool) {
	if info == nil {
		return nil, false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return st, ok
}

func changedMeanwhile(path string) error {
	return shed.Errorf(shed.CodeConflict, "%s was changed by somebody else at the same time", path).WithHint("try again")
}

// fileError says what to do about an error of the system about the file at path.
func fileError(err error, path string) error {
	var known *shed.Error
	if err == nil || errors.As(err, &known) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return shed.Errorf(shed.CodeNoSpace, "no space left to write %s: %w", path, err).WithHint("free some space on its file system")
	}
	return shed.Errorf(shed.CodeInvalid, "%s can't be edited, and was left as it is: %w", path, err).
		WithHint("see that you may write to the file and its directory; or put what `shed ssh-config` prints into it")
}
