package image

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// preset is an image that is built here and not from a Dockerfile: a bootstrapped system, and layers upon it.
type preset struct {
	name   string
	base   recipe
	upper  []step
	config v1.Config
}

// recipe is what a bootstrapped system is made of.
type recipe struct {
	packages []string // besides Debian's essential ones
	optional []string // packages that not every suite has
	hook     string   // shell script that gets the tree as $1
}

// step makes a layer upon others.
type step struct {
	comment string
	// files makes the layer of just these.
	files []file
	// hook is a shell script that changes the tree $1. The layer is what it changed.
	hook string
	// npm says that the hook needs the host's npm configuration.
	npm bool
}

// file is a regular file, or a directory where the name ends in a slash; root's.
type file struct {
	name    string
	content string
}

//go:embed base.sh
var baseHook string

//go:embed full.sh
var fullHook string

//go:embed builder.sh
var builderHook string

// cleanHook comes after every other hook.
//
//go:embed clean.sh
var cleanHook string

var debian = recipe{
	packages: []string{
		// What boots, and what makes a developer's commands work.
		"systemd", "systemd-sysv", "dbus", "kmod", "netbase", "iproute2", "procps",
		"sudo", "ca-certificates", "curl", "file", "git", "jq", "less", "openssh-client", "ripgrep", "rsync", "tmux", "unzip", "vim-tiny",
		"build-essential", "docker.io",
	},
	optional: []string{"docker-buildx", "docker-cli", "gh"},
	hook:     baseHook,
}

// builder is what builds from Dockerfiles run in, as root and without systemd.
var builder = recipe{packages: []string{"buildah", "ca-certificates", "containers-storage"}, hook: builderHook}

// extensions prepares the place of what answers programs in a shed with credentials that stay outside: its sockets are
// in /run/shed, which the user can enter. A socket is pointed to only while it is there, and never in
// place of an agent that ssh -A has brought along.
var extensions = step{
	comment: "the place for credentials' sockets",
	files: []file{
		{"./", ""},
		{"etc/", ""},
		{"etc/profile.d/", ""},
		{"etc/profile.d/shed-extensions.sh", `if [ -z "${SSH_AUTH_SOCK-}" ] && [ -S /run/shed/ssh-agent.sock ]; then
	export SSH_AUTH_SOCK=/run/shed/ssh-agent.sock
fi
`},
		{"etc/tmpfiles.d/", ""},
		{"etc/tmpfiles.d/shed-extensions.conf", "d /run/shed 0750 root shed -\n"},
	},
}

var agents = step{comment: "Python 3, Node 24, Claude Code, OpenCode and Codex", hook: fullHook, npm: true}

var (
	systemConfig = v1.Config{
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
		Cmd:        []string{"/bin/bash"},
		User:       "shed",
		WorkingDir: "/home/shed",
	}
	builderConfig = v1.Config{Env: systemConfig.Env, Cmd: systemConfig.Cmd, User: "root", WorkingDir: "/"}
)

var presets = []preset{
	{name: "base", base: debian, config: systemConfig},
	{name: "extensions", base: debian, upper: []step{extensions}, config: systemConfig},
	{name: "full", base: debian, upper: []step{extensions, agents}, config: systemConfig},
	{name: "builder", base: builder, config: builderConfig},
}

// Presets returns the names of the images that BuildPreset builds.
func Presets() []string {
	names := make([]string, len(presets))
	for i, p := range presets {
		names[i] = p.name
	}
	return names
}

func findPreset(name string) (preset, error) {
	for _, p := range presets {
		if p.name == name {
			return p, nil
		}
	}
	return preset{}, shed.Errorf(shed.CodeInvalid, "there is no preset %q", name).WithHint("there are: %s", strings.Join(Presets(), ", "))
}

// args are mmdebstrap's arguments to make the system.
func (r recipe) args(suite string) []string {
	args := []string{
		"--variant=minbase", "--components=main", "--format=tar",
		"--include=" + strings.Join(r.packages, ","),
	}
	for _, name := range r.optional {
		args = append(args, "--include=?exact-name("+name+")") // a pattern may match nothing
	}
	return append(args,
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-include=/usr/share/locale/locale.alias",
		`--aptopt=Acquire::Languages "none"`,
		"--customize-hook="+r.hook,
		"--customize-hook="+cleanHook,
		suite)
}

// version changes whenever the system would be made in another way: not when the distribution changes.
func (r recipe) version(suite string) string {
	sum := sha256.Sum256([]byte(strings.Join(append(r.args(suite), runtime.GOARCH), "\x00")))
	return hex.EncodeToString(sum[:16])
}

// args are mmdebstrap's arguments to run the step's hook in the tree that it gets as its descriptor 3.
func (st step) args(suite string) []string {
	return []string{
		"--variant=custom", "--components=main", "--format=tar",
		`--setup-hook=tar --directory="$1" --extract --xattrs --xattrs-include='*' --numeric-owner --same-permissions <&3`,
		"--customize-hook=" + st.hook,
		"--customize-hook=" + cleanHook,
		suite,
	}
}

// writeFiles writes the tar of a layer that has just files: the same bytes for the same files.
func writeFiles(w io.Writer, files []file) error {
	tw := tar.NewWriter(w)
	if err := addFiles(tw, files, 0o644); err != nil {
		return err
	}
	return tw.Close()
}

func addFiles(tw *tar.Writer, files []file, mode int64) error {
	for _, f := range files {
		hdr := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: mode, Size: int64(len(f.content)), Format: tar.FormatPAX}
		if strings.HasSuffix(f.name, "/") {
			hdr.Typeflag, hdr.Mode = tar.TypeDir, 0o755
		}
		if err := tw.WriteHeader(hdr); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, f.content); err != nil {
			return err
		}
	}
	return nil
}

// versionLabel is the label with the version of the recipe of an image's lowest layer.
const versionLabel = "io.github.charliek.shed.base"

// built returns the preset image whose lowest layer was last made by that version of a recipe, and keeps it from
// being removed until release is called. It returns nil if there is none.
func (s *Store) built(version string) (img *baseImage, release func()) {
	release = func() {}
	for _, p := range presets {
		found, r, err := s.Acquire(p.name)
		if err != nil {
			continue // it isn't there, or is of no use
		}
		next, err := s.baseImage(found.Digest)
		if err != nil || next.version != version || img != nil && !next.history.Created.After(img.history.Created.Time) {
			r()
			continue
		}
		release()
		next.name, img, release = p.name, next, r
	}
	return img, release
}

// baseImage is the lowest layer of an image.
type baseImage struct {
	name, version string
	madeLayer
}

func (s *Store) baseImage(digest string) (*baseImage, error) {
	h, err := v1.NewHash(digest)
	if err != nil {
		return nil, err
	}
	manifest, cfg, err := s.manifest(h, types.OCIManifestSchema1)
	if err != nil {
		return nil, err
	}
	if err := checkLayers(manifest); err != nil {
		return nil, err
	}
	if len(manifest.Layers) == 0 || len(cfg.History) == 0 {
		return nil, shed.Errorf(shed.CodeInvalid, "it has no layers")
	}
	if _, err := os.Stat(s.blob(manifest.Layers[0].Digest)); err != nil {
		return nil, err
	}
	return &baseImage{
		version:   cfg.Config.Labels[versionLabel],
		madeLayer: madeLayer{desc: manifest.Layers[0], diffID: cfg.RootFS.DiffIDs[0], history: cfg.History[0]},
	}, nil
}

// hostSuite returns the Debian suite of the host from its os-release file: its keys are there and its mirrors in reach.
func hostSuite(osRelease string) (string, error) {
	f, err := os.Open(osRelease)
	if err != nil {
		return "", shed.Errorf(shed.CodeUnsupported, "this host doesn't say which Debian it is: %w", err).
			WithHint("images are built on Debian")
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if suite, ok := strings.CutPrefix(lines.Text(), "VERSION_CODENAME="); ok {
			if suite = strings.Trim(suite, `"'`); suite != "" {
				return suite, nil
			}
		}
	}
	return "", shed.Errorf(shed.CodeUnsupported, "%s has no VERSION_CODENAME, so the Debian suite to build from isn't known", osRelease).
		WithHint("images are built on a release of Debian")
}
