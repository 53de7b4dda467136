package kernel

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cavaliergopher/cpio"
)

func TestInitramfs(t *testing.T) {
	b := &Bundle{ID: "6.1-test", dir: t.TempDir()}
	writeFile(t, filepath.Join(b.dir, bootDir, "ext4.ko"), []byte("the module"))
	writeFile(t, filepath.Join(b.dir, bootDir, modulesDep), []byte("ext4:\n"))
	agent := filepath.Join(t.TempDir(), "agent")
	writeFile(t, agent, []byte("the agent"))

	paths := make([]string, 8)
	errs := make([]error, len(paths))
	var wg sync.WaitGroup
	for i := range paths {
		wg.Go(func() { paths[i], errs[i] = b.Initramfs(t.Context(), agent) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	// sha256 of "the agent" begins so.
	if got, want := filepath.Base(paths[0]), "initramfs-c770ef7d03b6.cpio"; got != want {
		t.Errorf("it is called %s, want %s", got, want)
	}
	for _, p := range paths {
		if p != paths[0] {
			t.Errorf("one caller got %s, another %s", p, paths[0])
		}
	}
	if entries, err := os.ReadDir(b.dir); err != nil || len(entries) != 2 {
		t.Errorf("the bundle holds %v, %v, want boot and the initramfs", entries, err)
	}

	type entry struct {
		mode cpio.FileMode
		data string
	}
	want := map[string]entry{
		"init":                {cpio.TypeReg | 0o755, "the agent"},
		"modules/ext4.ko":     {cpio.TypeReg | 0o644, "the module"},
		"modules/modules.dep": {cpio.TypeReg | 0o644, "ext4:\n"},
	}
	for _, dir := range initramfsDirs {
		want[dir] = entry{cpio.TypeDir | 0o755, ""}
	}
	f, err := os.Open(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r := cpio.NewReader(f)
	inodes := make(map[int64]string)
	for {
		hdr, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if got := (entry{hdr.Mode, string(data)}); got != want[hdr.Name] {
			t.Errorf("%s: %v, want %v", hdr.Name, got, want[hdr.Name])
		}
		if other, ok := inodes[hdr.Inode]; ok {
			t.Errorf("%s and %s have the same inode number", hdr.Name, other)
		}
		inodes[hdr.Inode] = hdr.Name
		delete(want, hdr.Name)
	}
	for name := range want {
		t.Errorf("%s is missing", name)
	}
}

func TestInitramfsOfOtherAgent(t *testing.T) {
	b := &Bundle{ID: "6.1-test", dir: t.TempDir()}
	writeFile(t, filepath.Join(b.dir, bootDir, modulesDep), nil)
	agent := filepath.Join(t.TempDir(), "agent")
	seen := make(map[string]bool)
	for _, content := range []string{"one", "other"} {
		writeFile(t, agent, []byte(content))
		path, err := b.Initramfs(t.Context(), agent)
		if err != nil {
			t.Fatal(err)
		}
		seen[path] = true
	}
	if len(seen) != 2 {
		t.Errorf("two agents got the same initramfs: %v", seen)
	}
	if _, err := b.Initramfs(t.Context(), agent+"-missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without an agent: %v", err)
	}
}
