package image

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestBuildPresetUnknown(t *testing.T) {
	if _, err := open(t, t.TempDir()).BuildPreset(t.Context(), "nope", nil); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("got %v, want %s", err, shed.CodeInvalid)
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

func TestMessages(t *testing.T) {
	var reported []string
	m := &messages{report: func(s string) { reported = append(reported, s) }}
	for _, part := range []string{"I: inst", "alling\nW: slow\n", strings.Repeat("E: line\n", 20), "\nE: last"} {
		if n, err := m.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("Write returns %d, %v", n, err)
		}
	}
	if len(reported) != 1 || reported[0] != "installing" {
		t.Errorf("reported were %q", reported)
	}
	if last := m.last(); !strings.HasSuffix(last, "E: line\nE: last") || strings.Contains(last, "slow") {
		t.Errorf("the last lines are %q", last)
	}
}

// realBuild skips where the test was not asked to bootstrap a Debian.
func realBuild(t *testing.T) {
	if os.Getenv("SHED_TEST_BUILD") != "1" {
		t.Skip("NOT TESTED: building the base image takes Debian's mirrors and half a minute; set SHED_TEST_BUILD=1")
	}
}

func TestBuildBase(t *testing.T) {
	realBuild(t)
	dir := t.TempDir()
	s := open(t, dir)
	var begun, ended []string
	var tarBytes int64
	img, err := s.BuildPreset(t.Context(), "base", func(e shed.Event) {
		switch {
		case e.Done:
			ended = append(ended, e.Phase)
		case e.Unit == "bytes":
			tarBytes = e.Current
		case len(begun) == 0 || begun[len(begun)-1] != e.Phase:
			begun = append(begun, e.Phase)
		}
	})
	if err != nil {
		t.Fatal(err, shed.ErrorHint(err))
	}
	const phases = "bootstrap layer image"
	if strings.Join(begun, " ") != phases || strings.Join(ended, " ") != phases || tarBytes < 100<<20 {
		t.Errorf("phases %q began, %q ended, with %d bytes", begun, ended, tarBytes)
	}
	got, err := open(t, dir).Resolve("base")
	if err != nil || got.Digest != img.Digest || len(got.Layers) != 1 || got.Layers[0].BlockImage == 0 {
		t.Fatalf("base is %+v, %v, want %+v", got, err, img)
	}
	t.Logf("the tar has %d MB, the blob %d, the block image %d", tarBytes>>20, got.Layers[0].Size>>20, got.Layers[0].BlockImage>>20)
	if left, _ := filepath.Glob(s.path(tempPrefix + "*")); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
	paths, cfg, err := s.Rootfs(t.Context(), got, func(e shed.Event) { t.Errorf("something was left to do: %+v", e) })
	if err != nil {
		t.Fatal(err)
	}
	if c := cfg.Config; c.User != "shed" || c.WorkingDir != "/home/shed" || !strings.Contains(strings.Join(c.Env, " "), "LANG=C.UTF-8") || len(cfg.History) != 1 {
		t.Errorf("the configuration is %+v", cfg)
	}
	for request, want := range map[string]string{
		"cat /etc/sudoers.d/shed":                     "shed ALL=(ALL:ALL) NOPASSWD: ALL",
		"stat /etc/sudoers.d/shed":                    "Mode:  0440",
		"cat /etc/passwd":                             "shed:x:1000:1000::/home/shed:/bin/bash",
		"stat /home/shed":                             "User:  1000   Group:  1000",
		"stat /home/shed/.bashrc":                     "User:  1000",
		"stat /usr/bin/sudo":                          "Mode:  04755",
		"stat /etc/machine-id":                        "Size: 0",
		"stat /etc/resolv.conf":                       "Size: 0",
		"stat /etc/hostname":                          "File not found",
		"stat /etc/systemd/system/default.target":     "multi-user.target",
		"stat /etc/systemd/system/getty@tty1.service": `"/dev/null"`,
		"stat /etc/systemd/system/apt-daily.timer":    `"/dev/null"`,
		"stat /usr/share/doc/git/copyright":           "Type: regular",
		"stat /usr/share/man/man1/git.1.gz":           "File not found",
		"stat /var/cache/apt/pkgcache.bin":            "File not found",
		"stat /lib/systemd/systemd":                   "Type: regular",
	} {
		if strings.HasPrefix(request, "stat /lib/") {
			request = strings.Replace(request, "/lib/", "/usr/lib/", 1)
		}
		if out := debugfs(t, paths[0], request); !strings.Contains(out, want) {
			t.Errorf("%s has no %q:\n%s", request, want, out)
		}
	}
	for _, d := range []string{"/var/lib/apt/lists", "/var/cache/apt/archives"} {
		if out := debugfs(t, paths[0], "ls "+d); strings.Contains(out, ".deb") || strings.Contains(out, "Packages") {
			t.Errorf("%s isn't empty:\n%s", d, out)
		}
	}
	if out, err := exec.Command("skopeo", "inspect", "oci:"+s.dir+":base").CombinedOutput(); err != nil || !strings.Contains(string(out), got.Layers[0].Digest) {
		t.Errorf("skopeo: %v\n%s", err, out)
	}
}

func TestBuildBaseCancelled(t *testing.T) {
	realBuild(t)
	t.Setenv("TMPDIR", t.TempDir())
	if err := os.Chmod(os.Getenv("TMPDIR"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := s.BuildPreset(ctx, "base", func(e shed.Event) {
		// By then it has a tree and a chroot's processes.
		if strings.HasPrefix(e.Message, "installing essential") || strings.HasPrefix(e.Message, "extracting") {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	for _, dir := range []string{os.Getenv("TMPDIR"), s.path("blobs/sha256")} {
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("%s has %v, %v", dir, left, err)
		}
	}
	if left, _ := filepath.Glob(s.path(tempPrefix + "*")); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
	if _, err := s.Resolve("base"); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("base is there: %v", err)
	}
}
