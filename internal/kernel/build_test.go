package kernel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// fakeCommands puts shell scripts before all other commands.
func fakeCommands(t *testing.T, scripts map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

const showsPackage = `echo 'Package: linux-image-x'; echo 'Depends: linux-image-6.1.0-1-x (= 6.1.2-3)'`

func TestBuildErrors(t *testing.T) {
	for name, test := range map[string]struct {
		scripts map[string]string
		want    string // in the message
		hint    string
	}{
		"no lists": {
			map[string]string{"apt-get": "exit 1", "apt-cache": "echo 'E: No packages found' >&2; exit 100"},
			"No packages found", "apt-get update",
		},
		"no such package": {
			map[string]string{"apt-get": "exit 1", "apt-cache": "true"},
			"doesn't depend on", "apt-get update",
		},
		"download fails": {
			map[string]string{"apt-get": "echo 'E: 404  Not Found' >&2; exit 100", "apt-cache": showsPackage},
			"404  Not Found", "mirror",
		},
		"damaged package": {
			map[string]string{
				"apt-get": "echo junk > junk.deb", "apt-cache": showsPackage,
				"dpkg-deb": "echo 'dpkg-deb: error: not a Debian package' >&2; exit 2",
			},
			"not a Debian package", "",
		},
		"nothing in the package": {
			map[string]string{"apt-get": "echo junk > junk.deb", "apt-cache": showsPackage, "dpkg-deb": "true"},
			"boot/vmlinuz-*", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			fakeCommands(t, test.scripts)
			s := openStore(t)
			_, err := s.Build(t.Context(), nil)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q in it", err, test.want)
			}
			if hint := shed.ErrorHint(err); !strings.Contains(hint, test.hint) {
				t.Errorf("the hint is %q, want %q in it", hint, test.hint)
			}
			expectEmpty(t, s.dir)
		})
	}
}

func expectEmpty(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%s holds %v, %v, want nothing", dir, entries, err)
	}
}

func TestBuildStops(t *testing.T) {
	started := filepath.Join(t.TempDir(), "started")
	fakeCommands(t, map[string]string{
		"apt-cache": showsPackage,
		"apt-get":   "echo $$ > " + started + "; exec sleep 1000",
	})
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for ctx.Err() == nil {
			if _, err := os.Stat(started); err == nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if _, err := s.Build(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	cancel()
	expectEmpty(t, s.dir)
	if _, err := s.Build(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("when it is stopped beforehand: %v, want context.Canceled", err)
	}
}

// TestBuild makes a bundle of Debian's kernel, twice.
func TestBuild(t *testing.T) {
	if os.Getenv("SHED_TEST_BUILD") != "1" {
		t.Skip("SHED_TEST_BUILD=1 is not set: it downloads 70 MB from a Debian mirror")
	}
	s := openStore(t)
	phases := 0
	first, err := s.Default(t.Context(), func(e shed.Event) {
		if e.Message != "" {
			t.Log(e.Message)
		}
		if e.Done {
			phases++
		}
	})
	if err != nil {
		t.Fatal(err, shed.ErrorHint(err))
	}
	if phases != 3 {
		t.Errorf("%d phases have ended, want 3", phases)
	}
	second, err := s.Build(t.Context(), nil)
	if err != nil {
		t.Fatal(err, shed.ErrorHint(err))
	}
	if *first != *second {
		t.Errorf("the same package gave %+v and %+v", first, second)
	}
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 1 {
		t.Errorf("the store holds %v, %v, want one bundle", entries, err)
	}
	magics := map[string]string{"amd64": "\x7fELF", "arm64": "MZ"}
	f, err := os.Open(first.Kernel())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if magic, err := io.ReadAll(io.LimitReader(f, 4)); err != nil || !bytes.HasPrefix(magic, []byte(magics[runtime.GOARCH])) {
		t.Errorf("the kernel begins with %q, %v", magic, err)
	}
	if filepath.Base(first.Kernel()) != vmlinuxFile {
		t.Error("the kernel couldn't be unpacked")
	}
	if out, err := exec.Command("e2fsck", "-fn", first.Modules()).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	dep, err := os.ReadFile(filepath.Join(first.dir, bootDir, modulesDep))
	if err != nil || !strings.Contains(string(dep), "ext4: ") {
		t.Errorf("modules.dep: %q, %v", dep, err)
	}
}
