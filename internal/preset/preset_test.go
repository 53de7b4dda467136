package preset

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestFind(t *testing.T) {
	for _, name := range Names() {
		if p, err := Find(name); err != nil || p.Name != name {
			t.Errorf("%s is %+v, %v", name, p, err)
		}
	}
	if _, err := Find("nope"); shed.ErrorCode(err) != shed.CodeInvalid || shed.ErrorHint(err) != "there are: base, extensions, full, builder" {
		t.Errorf("got %v, %q", err, shed.ErrorHint(err))
	}
}

func TestVersion(t *testing.T) {
	r := debian
	versions := map[string]bool{r.version("bookworm"): true, r.version("trixie"): true, builder.version("bookworm"): true}
	r.packages = append(slices.Clone(r.packages), "x")
	versions[r.version("bookworm")] = true
	r.hook += "x"
	versions[r.version("bookworm")] = true
	if len(versions) != 5 {
		t.Errorf("some of these are the same: %v", versions)
	}
}

func TestHostSuite(t *testing.T) {
	for content, want := range map[string]string{
		"ID=debian\nVERSION_CODENAME=trixie\n": "trixie",
		"VERSION_CODENAME=\"bookworm\"":        "bookworm",
		"ID=arch\n":                            "",
		"VERSION_CODENAME=\n":                  "",
	} {
		path := filepath.Join(t.TempDir(), "os-release")
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := hostSuite(path)
		if got != want || (want == "") != (shed.ErrorCode(err) == shed.CodeUnsupported) {
			t.Errorf("%q gives %q, %v, want %q", content, got, err, want)
		}
	}
}

func TestWriteTree(t *testing.T) {
	var lower []Layer
	var layers []*layer
	var own bytes.Buffer
	if err := writeFiles(&own, extensions.files); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{
		tarFrom(t, "./", "./dev/", "./dev/null#", "./etc/", "./etc/hostname=h", "./etc/resolv.conf=r", "./etc/x=1", "./etc/y==./etc/x"), own.Bytes(),
	} {
		lower = append(lower, func(read func(io.Reader) error) error { return read(bytes.NewReader(b)) })
		layers = append(layers, mustRead(t, b))
	}
	var out bytes.Buffer
	if err := writeTree(&out, lower, layers, merge(layers), []file{{"run/secret", "s"}}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"dev/", "etc/x=1", "etc/y==etc/x", "./", "etc/", "etc/profile.d/", "etc/profile.d/shed-extensions.sh",
		"etc/tmpfiles.d/", "etc/tmpfiles.d/shed-extensions.conf", "run/secret",
	}
	var got []string
	for tr := tar.NewReader(&out); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := hdr.Name
		switch {
		case name == "etc/x":
			name += "=1"
		case hdr.Typeflag == tar.TypeLink:
			name += "==" + hdr.Linkname
		case name == "run/secret" && hdr.Mode != 0o600:
			t.Errorf("%s has the mode %o", name, hdr.Mode)
		}
		got = append(got, name)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the tree has %q, want %q", got, want)
	}
}

// fakeBootstrap puts a program in mmdebstrap's place.
func fakeBootstrap(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBootstrapLower(t *testing.T) {
	start := func(t *testing.T, lower func(io.Writer) error) ([]byte, error) {
		boot, err := startBootstrap(t.Context(), nil, os.Environ(), lower, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(boot)
		return out, errors.Join(err, boot.stop(err))
	}
	endless := func(w io.Writer) error {
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	}
	t.Run("reads it", func(t *testing.T) {
		fakeBootstrap(t, "cat <&3")
		if out, err := start(t, func(w io.Writer) error { _, err := io.WriteString(w, "below"); return err }); err != nil || string(out) != "below" {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("fails without reading it", func(t *testing.T) {
		fakeBootstrap(t, "echo E: why >&2; exit 7")
		if _, err := start(t, endless); err == nil || !strings.Contains(err.Error(), "E: why") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("can't be written", func(t *testing.T) {
		fakeBootstrap(t, "cat <&3; echo E: half of it >&2; exit 1")
		broken := errors.New("broken blob")
		if _, err := start(t, func(w io.Writer) error { return broken }); !errors.Is(err, broken) || strings.Contains(err.Error(), "half of it") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a child outlives it", func(t *testing.T) {
		fakeBootstrap(t, "sleep 1000 >/dev/null 2>&1 & exit 1")
		if _, err := start(t, endless); err == nil {
			t.Error("no error")
		}
	})
	t.Run("is cancelled", func(t *testing.T) {
		fakeBootstrap(t, "echo x; sleep 1000")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		boot, err := startBootstrap(ctx, nil, os.Environ(), endless, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := boot.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		cancel()
		_, err = io.ReadAll(boot)
		if err = errors.Join(err, boot.stop(err)); err == nil {
			t.Error("no error")
		}
	})
}

func TestMessages(t *testing.T) {
	var reported []string
	m := messages(func(s string) { reported = append(reported, s) })
	w := m.Writer()
	for _, part := range []string{
		"I: running apt-get upd", "ate...\nW: slow\nshed: installing X\nI: success in 44.1298 seconds\n", strings.Repeat("E: line\n", 20), "\nE: last",
	} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("Write returns %d, %v", n, err)
		}
	}
	if want := []string{"reading the package lists", "installing X"}; !slices.Equal(reported, want) {
		t.Errorf("reported were %q, want %q", reported, want)
	}
	if last := m.Last(); !strings.HasSuffix(last, "E: line\nE: last") || strings.Contains(last, "slow") {
		t.Errorf("the last lines are %q", last)
	}
}
