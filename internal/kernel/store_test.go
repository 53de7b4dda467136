package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
)

func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "kernels"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func addBundle(t *testing.T, s *Store, release string, built time.Time, files ...string) *Bundle {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "bundle")
	m := manifest{Release: release, Files: map[string]string{}}
	for _, f := range files {
		writeFile(t, filepath.Join(dir, f), []byte(f))
		m.Files[f] = "a sum"
	}
	b, err := s.keep(dir, m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(b.dir, manifestFile), built, built); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStore(t *testing.T) {
	s := openStore(t)
	now := time.Now()
	older := addBundle(t, s, "6.12-z", now.Add(-2*time.Hour), vmlinuzFile)
	newer := addBundle(t, s, "6.1-a", now.Add(-time.Hour), vmlinuzFile, vmlinuxFile)

	got, err := s.Default(t.Context(), nil)
	if err != nil || got.ID != newer.ID {
		t.Errorf("the default is %+v, %v, want %s", got, err, newer.ID)
	}
	if got, err = s.Get(newer.ID); err != nil || *got != *newer || filepath.Base(got.Kernel()) != vmlinuxFile {
		t.Errorf("got %+v, %v, want %+v", got, err, newer)
	}
	if got, err = s.Get(older.ID); err != nil || filepath.Base(got.Kernel()) != vmlinuzFile || got.Release != "6.12-z" {
		t.Errorf("got %+v, %v, want one with only a vmlinuz", got, err)
	}
	if !strings.HasPrefix(older.ID, "6.12-z-") || len(older.ID) != len("6.12-z-")+12 {
		t.Errorf("the ID %q isn't made of the release and 12 digits", older.ID)
	}
	// The same again is the same bundle, but it counts as the last one.
	again := addBundle(t, s, "6.12-z", now, vmlinuzFile)
	if got, err = s.Default(t.Context(), nil); err != nil || again.ID != older.ID || got.ID != older.ID {
		t.Errorf("the default is %+v, %v, after building %s again as %s", got, err, older.ID, again.ID)
	}
}

func TestGetMissing(t *testing.T) {
	s := openStore(t)
	for _, id := range []string{"6.1-none", "", ".", "..", "../kernels", "/etc"} {
		_, err := s.Get(id)
		if !errors.Is(err, fs.ErrNotExist) || shed.ErrorCode(err) != shed.CodeUnsupported || shed.ErrorHint(err) == "" {
			t.Errorf("%q: %v, code %s, hint %q", id, err, shed.ErrorCode(err), shed.ErrorHint(err))
		}
	}
}

func TestGetDamaged(t *testing.T) {
	s := openStore(t)
	writeFile(t, filepath.Join(s.dir, "6.1-bad", manifestFile), []byte("{"))
	if _, err := s.Get("6.1-bad"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged manifest: %v", err)
	}
}

func TestOpenRemovesLeftovers(t *testing.T) {
	s := openStore(t)
	b := addBundle(t, s, "6.1", time.Now(), vmlinuzFile)
	writeFile(t, filepath.Join(s.dir, tempPrefix+"1", "bundle", manifestFile), nil)
	writeFile(t, filepath.Join(b.dir, tempPrefix+"2"), nil)
	writeFile(t, filepath.Join(b.dir, "initramfs-0123456789ab.cpio"), nil)
	s, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 1 {
		t.Errorf("the store holds %v, %v, want one bundle", entries, err)
	}
	if entries, err := os.ReadDir(b.dir); err != nil || len(entries) != 3 {
		t.Errorf("the bundle holds %v, %v, want a manifest, a kernel and an initramfs", entries, err)
	}
}

func TestUnpackTar(t *testing.T) {
	pack := func(names ...string) *bytes.Buffer {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, name := range names {
			if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: 1}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return &buf
	}
	tree := t.TempDir()
	release, err := unpackTar(pack("./boot/vmlinuz-6.1-x", "./boot/config-6.1-x", "./lib/modules/6.1-x/a.ko",
		"./usr/lib/modules/6.1-x/b.ko", "./etc/passwd", "../../lib/modules/../../../c.ko"), tree)
	if err != nil || release != "6.1-x" {
		t.Errorf("the release is %q, %v", release, err)
	}
	var got []string
	err = filepath.WalkDir(tree, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			got = append(got, strings.TrimPrefix(name, tree))
		}
		return err
	})
	if want := "/boot/vmlinuz-6.1-x /lib/modules/6.1-x/a.ko /lib/modules/6.1-x/b.ko"; err != nil || strings.Join(got, " ") != want {
		t.Errorf("got %q, %v, want %s", got, err, want)
	}
	if _, err := unpackTar(pack("./lib/modules/6.1-x/a.ko"), t.TempDir()); err == nil {
		t.Error("no error without a kernel")
	}
}

func TestWriteTarIsReproducible(t *testing.T) {
	var tars [2]bytes.Buffer
	for i := range tars {
		dir := t.TempDir()
		file := filepath.Join(dir, "kernel", "a.ko")
		writeFile(t, file, []byte("module"))
		at := time.Unix(int64(1000*i), 0)
		if err := errors.Join(os.Chmod(file, []os.FileMode{0o600, 0o644}[i]), os.Chtimes(file, at, at)); err != nil {
			t.Fatal(err)
		}
		if err := writeTar(&tars[i], dir); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(tars[0].Bytes(), tars[1].Bytes()) {
		t.Error("the same modules gave two different archives")
	}
}
