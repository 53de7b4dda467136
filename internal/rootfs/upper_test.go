package rootfs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestCreateUpper(t *testing.T) {
	for _, size := range []int64{shed.MinUpperSize, shed.DefaultUpperSize} {
		d := t.TempDir()
		templates, path := filepath.Join(d, "templates"), filepath.Join(d, "upper.img")
		if err := CreateUpper(t.Context(), templates, path, size); err != nil {
			t.Fatal(err)
		}
		fsck(t, path)
		fi, err := os.Stat(path)
		if err != nil || fi.Size() != size || fi.Mode().Perm() != 0o600 {
			t.Errorf("the upper has %d bytes and mode %v, %v, want %d and 0600", fi.Size(), fi.Mode(), err, size)
		}
		if used := DiskUsage(path); used == 0 || used > 1<<20 {
			t.Errorf("a new upper of %d bytes uses %d on disk, want at most 1 MB", size, used)
		}
		wantContains(t, "root", debugfs(t, path, "stat /"), "User:     0", "Group:     0")
		header := e2fs(t, "dumpe2fs", "-h", path)
		wantContains(t, "superblock", header, "Filesystem state:         clean", "Inode size:	          256", "Reserved block count:     0")

		// The next one comes from the template, also where what it replaces was in use.
		template := only(t, templates)
		before, err := os.Stat(template)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte("used"), 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := CreateUpper(t.Context(), templates, path, size); err != nil {
			t.Fatal(err)
		}
		fsck(t, path)
		if after, err := os.Stat(only(t, templates)); err != nil || !os.SameFile(before, after) {
			t.Errorf("the template was made again: %v", err)
		}
	}
}

func only(t *testing.T, dir string) string {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != 1 {
		t.Fatalf("%s has %v, %v, want one file", dir, all, err)
	}
	return filepath.Join(dir, all[0].Name())
}

func TestCreateUpperRemovesLeftover(t *testing.T) {
	d := t.TempDir()
	path := filepath.Join(d, "upper.img")
	if err := os.WriteFile(filepath.Join(d, tempPrefix+"upper.img"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateUpper(t.Context(), t.TempDir(), path, shed.MinUpperSize); err != nil {
		t.Fatal(err)
	}
	if got := only(t, d); got != path {
		t.Errorf("left is %s", got)
	}
}

func TestCreateUpperFails(t *testing.T) {
	d := t.TempDir()
	templates, path := filepath.Join(d, "templates"), filepath.Join(d, "sheds", "upper.img")
	for _, size := range []int64{0, -1, shed.MinUpperSize - 4096, shed.MinUpperSize + 1, shed.MaxUpperSize + 4096} {
		if err := CreateUpper(t.Context(), templates, path, size); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("a size of %d gives %v", size, err)
		}
	}
	if err := CreateUpper(t.Context(), templates, path, shed.MinUpperSize); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that isn't there gives %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := CreateUpper(ctx, filepath.Join(d, "others"), path, shed.MinUpperSize); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context gives %v", err)
	}
	wantEmpty(t, filepath.Join(d, "others"))
}

// Copies have the same bytes and the same holes, where the file system can't share blocks.
func TestCopySparse(t *testing.T) {
	d := t.TempDir()
	src, err := os.Create(filepath.Join(d, "src"))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(filepath.Join(d, "dst"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	const size = 64 << 20
	for off, text := range map[int64]string{0: "start", 10<<20 + 5: "middle", size - 3: "end"} {
		if _, err := src.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := copySparse(t.Context(), dst, src, size); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(src.Name())
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dst.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs: %v", err)
	}
	if used := DiskUsage(dst.Name()); used > 1<<20 {
		t.Errorf("the copy uses %d bytes on disk", used)
	}
}

func TestNoSpace(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full on this system: can't have a full disk")
	}
	defer full.Close()
	_, err = full.WriteString("x")
	err = NoSpace(err, "/state/upper.img")
	if shed.ErrorCode(err) != shed.CodeNoSpace || !strings.Contains(err.Error(), "/state/upper.img") || shed.ErrorHint(err) == "" {
		t.Errorf("a full disk gives %v", err)
	}
}

func wantEmpty(t testing.TB, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("%s should be empty: %v, %v", dir, left, err)
	}
}
