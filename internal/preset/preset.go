// Package preset makes what preset images are made of: a bootstrapped Debian, by mmdebstrap, and layers upon it, each the
// difference that a script makes in a tree of the layers below. It needs no root.
package preset

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Preset is an image that is made here and not from a Dockerfile: a bootstrapped system, and layers upon it.
type Preset struct {
	Name   string
	Steps  []Step // that make the layers upon the system, bottom first
	Config v1.Config
	base   recipe
}

// recipe is what a bootstrapped system is made of.
type recipe struct {
	packages []string // besides Debian's essential ones
	optional []string // packages that not every suite has
	hook     string   // shell script that gets the tree as $1
}

// Step makes a layer upon others.
type Step struct {
	Comment string // for the image's history
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
var extensions = Step{
	Comment: "the place for credentials' sockets",
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

var agents = Step{Comment: "Python 3, Node 24, Claude Code, OpenCode and Codex", hook: fullHook, npm: true}

var (
	systemConfig = v1.Config{
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
		Cmd:        []string{"/bin/bash"},
		WorkingDir: "/home/shed",
	}
	builderConfig = v1.Config{Env: systemConfig.Env, Cmd: systemConfig.Cmd, User: "root", WorkingDir: "/"}
)

var presets = []Preset{
	{Name: "base", base: debian, Config: systemConfig},
	{Name: "extensions", base: debian, Steps: []Step{extensions}, Config: systemConfig},
	{Name: "full", base: debian, Steps: []Step{extensions, agents}, Config: systemConfig},
	{Name: "builder", base: builder, Config: builderConfig},
}

// Names returns the names of all presets.
func Names() []string {
	names := make([]string, len(presets))
	for i, p := range presets {
		names[i] = p.Name
	}
	return names
}

// Find returns the preset with that name. CodeInvalid if there is none.
func Find(name string) (Preset, error) {
	for _, p := range presets {
		if p.Name == name {
			return p, nil
		}
	}
	return Preset{}, shed.Errorf(shed.CodeInvalid, "there is no preset %q", name).WithHint("there are: %s", strings.Join(Names(), ", "))
}

// Version changes whenever the preset's system would be made in another way: not when the distribution changes. Presets
// whose system is the same have the same.
func (p Preset) Version(suite string) string { return p.base.version(suite) }

// Comment says what the preset's system is, for an image's history.
func (p Preset) Comment(suite string) string {
	return fmt.Sprintf("Debian %s, minbase, with %s", suite, strings.Join(append(slices.Clone(p.base.packages), p.base.optional...), " "))
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
func (st Step) args(suite string) []string {
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

// HostSuite returns the Debian suite of the host: its keys are there and its mirrors in reach. CodeUnsupported if it has none.
func HostSuite() (string, error) { return hostSuite("/etc/os-release") }

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
