package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// What Merge makes of layers is what overlayfs makes of them, below other layers too.
func TestMergeIsOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount")
	}
	// The mounts are in a namespace of this thread alone, which ends with the
	// test, since it never unlocks it: nothing is left however that goes.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Skipf("mounting is not allowed here: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(12) {
		s := randomStack(rand.New(rand.NewPCG(seed, 1)), true)
		l := openLayers(t)
		var images []string
		for _, entries := range s {
			images = append(images, convert(t, l, layer(t, entries...)))
		}
		want := mounted(t, images)
		for n := 1; n <= len(s); n++ {
			img := merge(t, l, mergeLayers(t, s[:n])...)
			got := mounted(t, append([]string{img}, images[n:]...))
			wantSame(t, fmt.Sprintf("seed %d, with %d of %d layers merged", seed, n, len(s)), got, want)
		}
		if t.Failed() {
			t.Fatal(s)
		}
	}
}

// mounted returns what is in the overlay of images, bottom first.
func mounted(t *testing.T, images []string) snapshot {
	t.Helper()
	tmp := t.TempDir()
	var lower []string
	mount := func(target string, args ...string) {
		t.Helper()
		if err := os.Mkdir(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mount", append(args, target)...).CombinedOutput(); err != nil {
			t.Fatalf("mount %q: %v\n%s", args, err, out)
		}
		lower = append(lower, target)
	}
	for i, img := range images {
		mount(filepath.Join(tmp, fmt.Sprint(i)), "-o", "loop,ro", img)
	}
	if len(images) > 1 {
		dirs := slices.Clone(lower)
		slices.Reverse(dirs)
		mount(filepath.Join(tmp, "merged"), "-t", "overlay", "-o", "ro,lowerdir="+strings.Join(dirs, ":"), "overlay")
	}
	defer func() {
		for _, dir := range slices.Backward(lower) {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}
	}()

	root := lower[len(lower)-1]
	states := map[string]fileState{}
	files := map[string][]string{} // by inode
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		if rel == lostFound {
			return fs.SkipDir
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(name, &st); err != nil {
			// A directory that is in one layer only shows the layer's whiteouts: as names without a file.
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		f, err := lstat(name, &st)
		if err != nil {
			return err
		}
		if !d.IsDir() {
			inode := fmt.Sprint(st.Dev, " ", st.Ino)
			files[inode] = append(files[inode], rel)
			f.names = inode
		}
		states[rel] = f
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := snapshot{}
	for name, f := range states {
		f.names = strings.Join(files[f.names], " ")
		s[name] = f.String()
	}
	return s
}

func lstat(name string, st *syscall.Stat_t) (fileState, error) {
	f := fileState{mode: int64(st.Mode & 0o7777), uid: int(st.Uid), gid: int(st.Gid), mtime: st.Mtim.Sec, xattrs: map[string]string{}}
	f.typ = fmt.Sprintf("%o", st.Mode&syscall.S_IFMT)
	var err error
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		var b []byte
		b, err = os.ReadFile(name)
		f.content = string(b)
	case syscall.S_IFLNK:
		f.content, err = os.Readlink(name)
	case syscall.S_IFCHR, syscall.S_IFBLK:
		f.content = fmt.Sprint(st.Rdev)
	}
	if err != nil {
		return f, err
	}
	list := make([]byte, 4096)
	n, err := unix.Llistxattr(name, list)
	if err != nil {
		return f, err
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if attr == "" {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(name, attr, value)
		if errors.Is(err, syscall.ENODATA) {
			continue // of user.* on a device or a pipe, which is only listed
		}
		if err != nil {
			return f, fmt.Errorf("%s of %s: %w", attr, name, err)
		}
		f.xattrs[attr] = string(value[:n])
	}
	return f, nil
}
