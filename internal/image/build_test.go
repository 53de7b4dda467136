package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
)

// realBuild skips where the test was not asked to bootstrap a Debian.
func realBuild(t *testing.T) {
	if os.Getenv("SHED_TEST_BUILD") != "1" {
		t.Skip("NOT TESTED: building the presets takes Debian's mirrors, npm's registry and minutes; set SHED_TEST_BUILD=1")
	}
}

// buildPreset builds a preset, and returns it with the phases that were reported.
func buildPreset(t *testing.T, s *Store, name string) (img *shed.Image, phases string) {
	t.Helper()
	var begun, ended []string
	start := time.Now()
	img, err := s.BuildPreset(t.Context(), name, func(e shed.Event) {
		switch {
		case e.Done:
			ended = append(ended, e.Phase)
		case e.Unit == "" && (len(begun) == len(ended)):
			begun = append(begun, e.Phase)
		}
		if strings.Contains(e.Message, "...") || strings.Contains(e.Message, "success") {
			t.Errorf("%s is reported as %q", name, e.Message)
		}
	})
	if err != nil {
		t.Fatal(err, shed.ErrorHint(err))
	}
	if !slices.Equal(begun, ended) {
		t.Errorf("%s: phases %q began, %q ended", name, begun, ended)
	}
	if left, _ := filepath.Glob(s.path(tempPrefix + "*")); len(left) != 0 {
		t.Errorf("%s leaves %v", name, left)
	}
	if len(s.held) != 0 {
		t.Errorf("%s still holds %v", name, s.held)
	}
	got, err := s.Resolve(name)
	if err != nil || got.Digest != img.Digest || got.Ref != name {
		t.Fatalf("%s is %+v, %v, want %+v", name, got, err, img)
	}
	var blobs, blocks int64
	for _, l := range got.Layers {
		blobs, blocks = blobs+l.Size, blocks+l.BlockImage
		if l.BlockImage == 0 {
			t.Errorf("%s: layer %s has no block image", name, l.DiffID)
		}
	}
	t.Logf("%s: %d s; blobs of %d MB, block images of %d MB", name, int(time.Since(start).Seconds()), blobs>>20, blocks>>20)
	return got, strings.Join(begun, " ")
}

func TestBuildPresets(t *testing.T) {
	realBuild(t)
	t.Setenv("TMPDIR", t.TempDir())
	if err := os.Chmod(os.Getenv("TMPDIR"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir())
	base, phases := buildPreset(t, s, "base")
	if phases != "bootstrap image" || len(base.Layers) != 1 {
		t.Errorf("base has the layers %+v, made in %s", base.Layers, phases)
	}
	extensions, phases := buildPreset(t, s, "extensions")
	if phases != "bootstrap layer image" || len(extensions.Layers) != 2 || extensions.Layers[0] != base.Layers[0] {
		t.Errorf("extensions has the layers %+v, made in %s, upon %+v", extensions.Layers, phases, base.Layers)
	}
	full, phases := buildPreset(t, s, "full")
	if phases != "bootstrap layer packages layer image" || len(full.Layers) != 3 || !slices.Equal(full.Layers[:2], extensions.Layers) {
		t.Errorf("full has the layers %+v, made in %s, upon %+v", full.Layers, phases, extensions.Layers)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) != 0 {
		t.Errorf("the temporary directory has %v, %v", left, err)
	}
	var disk int64
	for _, f := range files(t, filepath.Dir(s.dir)) {
		disk += rootfs.DiskUsage(f)
	}
	t.Logf("all three take %d MB, full alone %d MB", disk>>20, full.Size>>20)
	if disk > full.Size+(1<<20) {
		t.Errorf("the three take %d bytes, full alone %d: the layers aren't shared", disk, full.Size)
	}

	paths, cfg, err := s.Rootfs(t.Context(), full, func(e shed.Event) { t.Errorf("something was left to do: %+v", e) })
	if err != nil {
		t.Fatal(err)
	}
	if c := cfg.Config; c.User != "" || c.WorkingDir != "/home/shed" || !strings.Contains(strings.Join(c.Env, " "), "LANG=C.UTF-8") || len(cfg.History) != 3 {
		t.Errorf("the configuration is %+v", cfg)
	}
	checkBase(t, paths[0])
	checkFull(t, s, full, paths[2])
	if out := debugfs(t, paths[1], "cat /etc/tmpfiles.d/shed-extensions.conf"); !strings.Contains(out, "d /run/shed 0750 root shed") {
		t.Errorf("extensions has no place for sockets:\n%s", out)
	}
	if out, err := exec.Command("skopeo", "inspect", "oci:"+s.dir+":full").CombinedOutput(); err != nil || !strings.Contains(string(out), full.Layers[2].Digest) {
		t.Errorf("skopeo: %v\n%s", err, out)
	}
}

func checkBase(t *testing.T, path string) {
	t.Helper()
	for request, want := range map[string]string{
		"cat /etc/sudoers.d/shed":                                             "shed ALL=(ALL:ALL) NOPASSWD: ALL",
		"stat /etc/sudoers.d/shed":                                            "Mode:  0440",
		"cat /etc/passwd":                                                     "shed:x:1000:1000::/home/shed:/bin/bash",
		"cat /etc/group":                                                      ":shed\n", // of docker
		"stat /home/shed":                                                     "User:  1000   Group:  1000",
		"stat /home/shed/.bashrc":                                             "User:  1000",
		"stat /usr/bin/sudo":                                                  "Mode:  04755",
		"stat /etc/machine-id":                                                "Size: 0",
		"stat /etc/resolv.conf":                                               "Size: 0",
		"stat /etc/hostname":                                                  "File not found",
		"stat /etc/systemd/system/default.target":                             "multi-user.target",
		"stat /etc/systemd/system/getty@tty1.service":                         `"/dev/null"`,
		"stat /etc/systemd/system/apt-daily.timer":                            `"/dev/null"`,
		"stat /etc/systemd/system/sockets.target.wants/docker.socket":         "docker.socket",
		"stat /etc/systemd/system/multi-user.target.wants/docker.service":     "File not found",
		"stat /etc/systemd/system/multi-user.target.wants/containerd.service": "File not found",
		"stat /var/lib/docker":                                                "Type: directory",
		"stat /var/lib/containerd":                                            "Type: directory",
		"stat /var/lib/containers":                                            "Type: directory",
		"stat /usr/bin/docker":                                                "Type: regular",
		"stat /usr/bin/g++":                                                   "Type: symlink",
		"stat /usr/bin/gh":                                                    "Type: regular",
		"stat /usr/share/doc/git/copyright":                                   "Type: regular",
		"stat /usr/share/man/man1/git.1.gz":                                   "File not found",
		"stat /var/cache/apt/pkgcache.bin":                                    "File not found",
		"stat /usr/lib/systemd/systemd":                                       "Type: regular",
	} {
		if out := debugfs(t, path, request); !strings.Contains(out, want) {
			t.Errorf("base: %s has no %q:\n%s", request, want, out)
		}
	}
	for _, d := range []string{"/var/lib/apt/lists", "/var/cache/apt/archives"} {
		if out := debugfs(t, path, "ls "+d); strings.Contains(out, ".deb") || strings.Contains(out, "Packages") {
			t.Errorf("base: %s isn't empty:\n%s", d, out)
		}
	}
}

// checkFull looks at the topmost layer of full.
func checkFull(t *testing.T, s *Store, full *shed.Image, img string) {
	t.Helper()
	for request, want := range map[string]string{
		"stat /usr/bin/python3":                     "Type: symlink",
		"stat /usr/local/bin/node":                  "Type: symlink",
		"stat /usr/local/bin/npx":                   "Type: symlink",
		"cat /usr/local/lib/node_modules/npm/npmrc": "prefix=/usr/local",
		"stat /usr/bin/nodejs":                      "File not found",
		"stat /usr/bin/npm":                         "File not found",
		"stat /run/shed-npm":                        "File not found",
		"stat /root/.npm":                           "File not found",
		"stat /etc/npmrc":                           "File not found",
	} {
		if out := debugfs(t, img, request); !strings.Contains(out, want) {
			t.Errorf("full: %s has no %q:\n%s", request, want, out)
		}
	}
	h, err := s.Resolve(full.Digest)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := s.unlisted(h.Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, _, err := s.manifest(desc.Digest, desc.MediaType)
	if err != nil {
		t.Fatal(err)
	}
	headers, names := map[string]*tar.Header{}, map[string][]string{} // of all, and by what they are links to
	if err := s.withLayer(manifest.Layers[2], func(r io.Reader) error {
		for tr := tar.NewReader(r); ; {
			hdr, err := tr.Next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			name, first := path.Clean(hdr.Name), path.Clean(hdr.Name)
			if hdr.Typeflag == tar.TypeLink {
				first = path.Clean(hdr.Linkname)
			}
			headers[name] = hdr
			names[first] = append(names[first], name)
		}
	}); err != nil {
		t.Fatal(err)
	}
	var leaked, whiteouts []string
	for name, hdr := range headers {
		if strings.HasPrefix(path.Base(name), ".wh.") {
			whiteouts = append(whiteouts, name)
		}
		if hdr.Uid != 0 && !strings.HasPrefix(name, "var/cache/apt/") { // apt downloads as a user of its own
			t.Errorf("full: %s is of user %d", name, hdr.Uid)
		}
		if strings.HasPrefix(name, "dev/") || strings.HasPrefix(name, "run/") || strings.HasPrefix(name, "tmp/") ||
			strings.HasPrefix(name, "home/") || strings.HasPrefix(name, "usr/share/nodejs") || strings.HasSuffix(name, ".package-lock.json") {
			leaked = append(leaked, name)
		}
	}
	if len(leaked) > 0 || len(whiteouts) > 0 {
		t.Errorf("full has, besides what was installed, %q, and removes %q", leaked, whiteouts)
	}
	links := func(of string) []string {
		hdr := headers["usr/local/lib/node_modules/"+of]
		if hdr == nil {
			t.Errorf("full has no %s", of)
			return nil
		}
		if hdr.Typeflag == tar.TypeLink {
			return names[path.Clean(hdr.Linkname)]
		}
		return names[path.Clean(hdr.Name)]
	}
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	if names := links("@anthropic-ai/claude-code/node_modules/@anthropic-ai/claude-code-linux-" + arch + "/claude"); len(names) != 2 {
		t.Errorf("the binary of claude has the names %q: it is there twice, or was not installed", names)
	}
	if runtime.GOARCH == "amd64" {
		if names := links("opencode-ai/node_modules/opencode-linux-x64-baseline/bin/opencode"); len(names) != 2 {
			t.Errorf("the baseline build of opencode has the names %q: opencode isn't it", names)
		}
		if headers["usr/local/lib/node_modules/opencode-ai/node_modules/opencode-linux-x64"] != nil {
			t.Error("the build of opencode for newer processors is there too")
		}
	}
	for _, program := range []string{"claude", "codex", "opencode"} {
		if hdr := headers["usr/local/bin/"+program]; hdr == nil || hdr.Typeflag != tar.TypeSymlink {
			t.Errorf("%s isn't on the PATH", program)
		}
	}
}

func TestBuildBuilder(t *testing.T) {
	realBuild(t)
	s := open(t, t.TempDir())
	img, phases := buildPreset(t, s, "builder")
	if phases != "bootstrap image" || len(img.Layers) != 1 {
		t.Errorf("it has the layers %+v, made in %s", img.Layers, phases)
	}
	paths, cfg, err := s.Rootfs(t.Context(), img, nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Config.User != "root" {
		t.Errorf("its user is %q", cfg.Config.User)
	}
	for request, want := range map[string]string{
		"stat /usr/bin/buildah":         "Type: regular",
		"stat /etc/containers":          "Type: directory",
		"stat /var/lib/containers":      "Type: directory",
		"stat /usr/lib/systemd/systemd": "File not found",
	} {
		if out := debugfs(t, paths[0], request); !strings.Contains(out, want) {
			t.Errorf("%s has no %q:\n%s", request, want, out)
		}
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
		if strings.Contains(e.Message, "the essential packages") {
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
