package rootfs

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// layer returns a tar of entries; a regular file holds what its Linkname says.
func layer(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body, h.Linkname = h.Linkname, ""
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }
func file(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Linkname: content}
}
func link(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
}
func symlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}
func withXattr(h tar.Header, name, value string) tar.Header {
	if h.PAXRecords == nil {
		h.PAXRecords = make(map[string]string)
	}
	h.PAXRecords[xattrRecord+name] = value
	return h
}

func sum(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}

func openLayers(t testing.TB) *Layers {
	t.Helper()
	l, err := OpenLayers(filepath.Join(t.TempDir(), "layers"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func convert(t testing.TB, l *Layers, b []byte) string {
	t.Helper()
	id, path, err := l.Convert(t.Context(), bytes.NewReader(b), v1.Hash{})
	if err != nil {
		t.Fatal(err)
	}
	if want := sum(b); id != want {
		t.Fatalf("diff ID is %s, want %s", id, want)
	}
	return path
}

// e2fs runs a program of e2fsprogs, on which the package depends.
func e2fs(t testing.TB, name string, args ...string) string {
	t.Helper()
	bin, err := LookPath(name)
	if err != nil {
		t.Fatalf("%s is needed for this test: install e2fsprogs", name)
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "DEBUGFS_PAGER=cat", "TZ=UTC", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func fsck(t testing.TB, image string) {
	t.Helper()
	e2fs(t, "e2fsck", "-fn", image)
}

// debugfs answers a request about image and leaves out the program's banner.
func debugfs(t testing.TB, image, request string) string {
	t.Helper()
	out := e2fs(t, "debugfs", "-R", request, image)
	_, out, _ = strings.Cut(out, "\n")
	return out
}

func wantContains(t testing.TB, what, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%s has no %q:\n%s", what, w, got)
		}
	}
}
