package sshd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	maxKeyFile  = 1 << 20 // bytes
	maxKeyLinks = 40      // that lead to one file
)

// readKeyFile returns the contents of a file that nobody but root and this process's user can change, or exchange for
// another.
func readKeyFile(path string) ([]byte, error) {
	path, err := followTrusted(path)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if err := checkTrusted("file", path, info); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("it is longer than %d bytes", maxKeyFile)
	}
	return text, nil
}

// isPassing reports whether an error of readKeyFile says nothing about the file: something was lacking to read it, such as
// descriptors, or its disk or server failed.
func isPassing(err error) bool {
	return errors.As(err, new(syscall.Errno)) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission)
}

// followTrusted follows path through its links, and returns the path without any of what it leads to. All directories in
// which it looks up a name have to be trusted, those of links too. As with OpenSSH, a
// path to what is in the home directory counts from there.
func followTrusted(path string) (string, error) {
	rest, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	home, err := os.UserHomeDir()
	if err == nil {
		home, err = filepath.EvalSymlinks(home)
	}
	if err != nil {
		home = "" // nothing is in it
	}
	at := "/"
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		next := filepath.Join(at, name)
		if name == "" || name == "." || name == ".." {
			at = next
			continue
		}
		if !strings.HasPrefix(home+"/", next+"/") {
			dir, err := os.Lstat(at)
			if err != nil {
				return "", err
			}
			if !dir.IsDir() {
				return "", fmt.Errorf("%s is not a directory", at)
			}
			if err := checkTrusted("directory", at, dir); err != nil {
				return "", err
			}
		}
		info, err := os.Lstat(next)
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		if links++; links > maxKeyLinks {
			return "", fmt.Errorf("%s is one of more than %d links in a row", next, maxKeyLinks)
		}
		target, err := os.Readlink(next)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		rest = target + "/" + rest
	}
	return at, nil
}

// checkTrusted returns an error where others than root and this process's user can write what is at path.
func checkTrusted(kind, path string, info fs.FileInfo) error {
	st := info.Sys().(*syscall.Stat_t)
	mode := st.Mode & 0o7777
	switch uid := os.Getuid(); {
	case st.Uid != 0 && int(st.Uid) != uid:
		return fmt.Errorf("the %s %s belongs to user %d, neither to root nor to the server's user, %d; chown it, or keep the keys elsewhere, such as in ~/.ssh",
			kind, path, st.Uid, uid)
	case mode&0o022 == 0:
		return nil
	case mode&syscall.S_ISVTX != 0: // which /tmp has to have
		return fmt.Errorf("group or others can write the %s %s (mode %04o); keep the keys elsewhere, such as in ~/.ssh", kind, path, mode)
	default:
		return fmt.Errorf("group or others can write the %s %s (mode %04o); chmod go-w %s", kind, path, mode, path)
	}
}
