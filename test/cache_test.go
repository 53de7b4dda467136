//go:build linux

package test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// cached are the parts of a state directory that servers can share, since nobody changes
// their files in place.
var cached = []string{"images", "kernels", "layers", "templates", "kvm.json"}

var (
	cacheOnce sync.Once
	cacheErr  error
)

// fillState gives the state directory an image and a kernel from the cache, which is filled first if need be.
func fillState(t testing.TB, state string) error {
	root := os.Getenv("SHED_TEST_CACHE")
	if root == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			dir = os.TempDir()
		}
		root = filepath.Join(dir, "shed-e2e")
	}
	key, err := cacheKey()
	if err != nil {
		return err
	}
	dir := filepath.Join(root, key)
	cacheOnce.Do(func() { cacheErr = fillCache(t, root, dir) })
	if cacheErr != nil {
		return fmt.Errorf("filling the cache %s: %w", root, cacheErr)
	}
	release, err := lockCache(root, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer release()
	for _, part := range cached {
		from := filepath.Join(dir, part)
		if exec.Command("cp", "-al", from, state).Run() == nil {
			continue
		}
		// Another file system.
		os.RemoveAll(filepath.Join(state, part))
		if out, err := exec.Command("cp", "-a", "--reflink=auto", "--sparse=always", from, state).CombinedOutput(); err != nil {
			return fmt.Errorf("copying %s: %w: %s", from, err, out)
		}
	}
	return nil
}

// cacheKey changes with the code that makes what is cached.
func cacheKey() (string, error) {
	h := sha256.New()
	for _, pattern := range []string{"../internal/image/*", "../internal/kernel/*", "../internal/preset/*", "../internal/rootfs/*"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		for _, file := range files {
			if fi, err := os.Stat(file); err != nil || !fi.Mode().IsRegular() || strings.HasSuffix(file, "_test.go") {
				continue
			}
			b, err := os.ReadFile(file)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(h, "%s %d\n%s", file, len(b), b)
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

func lockCache(root string, how int) (release func() error, err error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", root, err)
	}
	return f.Close, nil
}

// fillCache makes dir, and removes what older code has left in root.
func fillCache(t testing.TB, root, dir string) (err error) {
	release, err := lockCache(root, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer release()
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	t.Log("building an image and a kernel, once")
	old, err := filepath.Glob(filepath.Join(root, "*"))
	if err != nil {
		return err
	}
	for _, o := range old {
		if filepath.Base(o) != "lock" {
			os.RemoveAll(o)
		}
	}
	s, err := newServer("")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start(); err != nil {
		return err
	}
	ctx := context.Background()
	for _, args := range [][]string{{"image", "build", "base"}, {"create", "first"}, {"delete", "--force", "first"}} {
		if _, err := s.shed(ctx, args...); err != nil {
			return fmt.Errorf("%w; the server's log:\n%s", err, s.log())
		}
	}
	if err := s.stop(); err != nil {
		return err
	}
	tmp := dir + ".tmp"
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	for _, part := range cached {
		from := filepath.Join(s.state, part)
		if out, err := exec.Command("cp", "-a", "--reflink=auto", "--sparse=always", from, tmp).CombinedOutput(); err != nil {
			return fmt.Errorf("copying %s: %w: %s", from, err, out)
		}
	}
	return os.Rename(tmp, dir)
}
