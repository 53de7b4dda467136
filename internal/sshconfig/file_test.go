package sshconfig

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".ssh", "config")
	if c := apply(t, path, set()); c.Changed() {
		t.Errorf("uninstalled from nothing: %s", c.Diff())
	}
	if c, err := Plan(path, set(host(t, "a", "web"))); err != nil || !strings.HasPrefix(c.Diff(), "--- /dev/null\n+++ "+path+"\n@@ -0,0 +1,") {
		t.Errorf("%v, %s", err, c.Diff())
	}
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what changes nothing made something: %v", err)
	}
	if c := apply(t, path, set(host(t, "a", "web"))); c.Before != nil || contents(t, path) != string(c.After) {
		t.Errorf("%+v", c)
	}
	apply(t, path, plus(host(t, "a", "api")))
	if c := apply(t, path, set()); c.After != nil || !strings.Contains(c.Diff(), "\n+++ /dev/null\n") {
		t.Errorf("uninstalled: %q", c.Diff())
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	// What the user has added meanwhile stays.
	apply(t, path, set(host(t, "a", "web")))
	write(t, path, contents(t, path)+"Port 1\n")
	apply(t, path, set())
	if got := contents(t, path); got != "Port 1\n" {
		t.Errorf("%q", got)
	}
}

func TestUnusualFile(t *testing.T) {
	dir := t.TempDir()
	path, real := filepath.Join(dir, "config"), filepath.Join(dir, "real")
	if err := os.Symlink("real", path); err != nil {
		t.Fatal(err)
	}
	write(t, real, "Port 1\n")
	if err := os.Link(real, filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	if c := apply(t, path, set(host(t, "a", "web"))); filepath.Base(c.File) != "real" || c.Links != 1 || !strings.HasSuffix(contents(t, real), "\nPort 1\n") {
		t.Errorf("%+v", c)
	}
	for _, text := range []string{"\xef\xbb\xbfPort 1\n", "\xff\xfeP\x00"} {
		write(t, real, text)
		_, err := Apply(t.Context(), path, set(host(t, "a", "web")))
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "byte order mark") || contents(t, real) != text {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct{ before, after, want string }{
		{"a\nb\nc\n", "a\nx\ny\nc\n", "--- f\n+++ f\n@@ -2,1 +2,2 @@\n-b\n+x\n+y\n"},
		{"c\n", "x\nc\n", "--- f\n+++ f\n@@ -0,0 +1,1 @@\n+x\n"},
		{"x\nx\nc", "x\nc", "--- f\n+++ f\n@@ -2,1 +1,0 @@\n-x\n"},
		{"a", "a\n", "--- f\n+++ f\n@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n"},
		{"a\n", "a\n", ""},
	} {
		if got := (Change{File: "f", Before: []byte(c.before), After: []byte(c.after)}).Diff(); got != c.want {
			t.Errorf("%q to %q: %q", c.before, c.after, got)
		}
	}
}
