package image

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
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestBuildPresetUnknown(t *testing.T) {
	_, err := open(t, t.TempDir()).BuildPreset(t.Context(), "nope", nil)
	if shed.ErrorCode(err) != shed.CodeInvalid || shed.ErrorHint(err) != "there are: base, extensions, full, builder" {
		t.Errorf("got %v, %q", err, shed.ErrorHint(err))
	}
}

func TestBuildPresetBusy(t *testing.T) {
	s := open(t, t.TempDir())
	s.building.Lock()
	defer s.building.Unlock()
	if _, err := s.BuildPreset(t.Context(), "base", nil); shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("got %v, want %s", err, shed.CodeConflict)
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

// fakeBuild starts the building of a preset whose lowest layer is the tar.
func fakeBuild(t *testing.T, s *Store, preset preset, base []byte) *presetBuild {
	t.Helper()
	added, err := s.newAddition()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { added.end(nil) })
	b := &presetBuild{addition: added, preset: preset, suite: "sid"}
	blob, l, err := b.layer(t.Context(), bytes.NewReader(base))
	if err == nil {
		err = b.commit(blob, l, "fake")
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustImage(t *testing.T, b *presetBuild, made time.Time) v1.Descriptor {
	t.Helper()
	b.layers[0].history.Created = v1.Time{Time: made}
	desc, err := b.image()
	if err != nil {
		t.Fatal(err)
	}
	b.end(nil)
	return desc
}

func TestBuilt(t *testing.T) {
	s := open(t, t.TempDir())
	version := debian.version("sid")
	if img, _ := s.built(version); img != nil {
		t.Fatalf("an empty store has %+v", img)
	}
	now := time.Now().UTC().Truncate(time.Second)
	base, extensions, full := presets[0], presets[1], presets[2]
	mustImage(t, fakeBuild(t, s, extensions, tarFrom(t, "a=1")), now)
	newest := fakeBuild(t, s, full, tarFrom(t, "a=2"))
	mustImage(t, newest, now.Add(time.Hour))
	mustImage(t, fakeBuild(t, s, base, tarFrom(t, "a=3")), now.Add(-time.Hour))
	mustImage(t, fakeBuild(t, s, preset{name: "builder", base: builder}, tarFrom(t, "a=4")), now.Add(2*time.Hour))

	img, release := s.built(version)
	if img == nil || img.name != "full" || img.diffID != newest.layers[0].diffID || img.desc.Digest != newest.layers[0].desc.Digest {
		t.Fatalf("got %+v, want the layer of full", img)
	}
	if s.held[img.desc.Digest] != 1 || s.held[img.diffID] != 1 {
		t.Errorf("held are %v", s.held)
	}
	release()
	if len(s.held) != 0 {
		t.Errorf("still held are %v", s.held)
	}
	if img, _ := s.built(debian.version("other")); img != nil {
		t.Errorf("of another suite it has %+v", img)
	}
	if err := os.Remove(s.blob(newest.layers[0].desc.Digest)); err != nil {
		t.Fatal(err)
	}
	if img, release := s.built(version); img == nil || img.name != "extensions" {
		t.Errorf("without that one's blob it takes %+v", img)
	} else {
		release()
	}
}

func TestWriteTree(t *testing.T) {
	s := open(t, t.TempDir())
	b := fakeBuild(t, s, presets[1], tarFrom(t, "./", "./dev/", "./dev/null#", "./etc/", "./etc/hostname=h", "./etc/resolv.conf=r", "./etc/x=1", "./etc/y==./etc/x"))
	if err := b.add(t.Context(), "more", func(w io.Writer) error { return writeFiles(w, extensions.files) }); err != nil {
		t.Fatal(err)
	}
	var layers []*layer
	for _, l := range b.layers {
		if err := s.withLayer(l.desc, func(r io.Reader) error {
			l, err := readLayer(r)
			layers = append(layers, l)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := b.writeTree(&out, layers, merge(layers), []file{{"run/secret", "s"}}); err != nil {
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

// TestBuildDiscards has a build that fails leave nothing, and what was there before alone.
func TestBuildDiscards(t *testing.T) {
	s := open(t, t.TempDir())
	kept := mustImage(t, fakeBuild(t, s, presets[0], tarFrom(t, "a=1")), time.Now())
	before := files(t, filepath.Dir(s.dir))
	b := fakeBuild(t, s, presets[0], tarFrom(t, "a=2"))
	if len(files(t, filepath.Dir(s.dir))) != len(before)+2 {
		t.Fatal("no blob and no block image was written")
	}
	if _, err := s.Prune(t.Context(), func() (map[string][]string, error) { return nil, nil }, false); err != nil {
		t.Fatal(err)
	}
	if len(files(t, filepath.Dir(s.dir))) != len(before)+2 {
		t.Error("a prune removes what a build is making")
	}
	if err := b.end(errors.New("failed")); err == nil || err.Error() != "failed" {
		t.Fatalf("got %v", err)
	}
	if after := files(t, filepath.Dir(s.dir)); !slices.Equal(after, before) {
		t.Errorf("left are %q, want %q", after, before)
	}
	if _, err := s.image(kept); err != nil {
		t.Error(err)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
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
