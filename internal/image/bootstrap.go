package image

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed"
)

// basePackages are what the base image has besides Debian's essential packages:
// what boots, and what makes a developer's commands work.
var basePackages = []string{
	"systemd", "systemd-sysv", "dbus", "kmod", "netbase", "iproute2", "procps",
	"sudo", "ca-certificates", "curl", "git", "jq", "less", "openssh-client", "ripgrep", "rsync", "tmux", "vim-tiny",
}

// baseHook is the shell script that turns the bootstrapped tree $1 into the base image.
//
//go:embed base.sh
var baseHook string

// stopGrace is how long mmdebstrap has to remove its tree when it is stopped.
const stopGrace = 20 * time.Second

// bootstrap is a running mmdebstrap. Reading it yields the tar of the
// image; the end of the tar comes only when the program has succeeded, and else its error.
type bootstrap struct {
	description string

	cmd    *exec.Cmd
	cancel context.CancelFunc
	stdout io.ReadCloser
	stderr *messages
	waited bool
	err    error // of the program, once waited
}

// startBootstrap starts building the base image's tree. Once ctx is done, the
// program and its children are stopped. The caller must call stop in the end.
func startBootstrap(ctx context.Context, report func(message string)) (*bootstrap, error) {
	suite, err := hostSuite("/etc/os-release")
	if err != nil {
		return nil, err
	}
	bin, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return nil, shed.Errorf(shed.CodeUnsupported, "mmdebstrap, which builds images, is not installed").
			WithHint("`apt-get install mmdebstrap`, on Debian")
	}
	ctx, cancel := context.WithCancel(ctx)
	b := &bootstrap{
		description: fmt.Sprintf("Debian %s, minbase, with %s", suite, strings.Join(basePackages, " ")),
		cancel:      cancel,
		stderr:      &messages{report: report},
	}
	b.cmd = exec.CommandContext(ctx, bin,
		"--variant=minbase", "--components=main", "--format=tar",
		"--include="+strings.Join(basePackages, ","),
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-include=/usr/share/locale/locale.alias",
		`--aptopt=Acquire::Languages "none"`,
		"--customize-hook="+baseHook,
		suite, "-")
	b.cmd.Env = os.Environ()
	if os.Getenv("TMPDIR") == "" {
		// The tree has several hundred MB, and /tmp may be in memory. The state directory won't
		// do: subordinate users must be able to get at the tree.
		b.cmd.Env = append(b.cmd.Env, "TMPDIR=/var/tmp")
	}
	b.cmd.Stderr = b.stderr
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	b.cmd.WaitDelay = stopGrace
	if b.stdout, err = b.cmd.StdoutPipe(); err != nil {
		cancel()
		return nil, err
	}
	b.cmd.Cancel = func() error {
		// A descendant that keeps the pipe open must not keep its reader waiting.
		if f, ok := b.stdout.(*os.File); ok {
			f.SetReadDeadline(time.Now().Add(stopGrace))
		}
		return b.signal(syscall.SIGTERM)
	}
	if err := b.cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	return b, nil
}

// signal sends sig to the program and all its children.
func (b *bootstrap) signal(sig syscall.Signal) error {
	err := syscall.Kill(-b.cmd.Process.Pid, sig)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

func (b *bootstrap) Read(p []byte) (int, error) {
	n, err := b.stdout.Read(p)
	if errors.Is(err, io.EOF) {
		if werr := b.wait(); werr != nil {
			err = werr
		}
	}
	return n, err
}

func (b *bootstrap) wait() error {
	if b.waited {
		return b.err
	}
	err := b.cmd.Wait()
	b.waited = true
	if err == nil {
		return nil
	}
	b.signal(syscall.SIGKILL) // whatever outlived the program
	b.err = shed.Errorf(shed.CodeInternal, "mmdebstrap failed: %w: %s", err, b.stderr.last()).
		WithHint("it needs Debian's mirrors, and without root the package uidmap and entries in /etc/subuid and /etc/subgid")
	return b.err
}

// stop ends the program if it still runs. failed is the error that reading it ended with, if any: then
// how the program ends says nothing new.
func (b *bootstrap) stop(failed error) error {
	defer b.cancel()
	if failed == nil {
		return b.wait()
	}
	b.cancel()
	b.stdout.Close()
	b.wait()
	return nil
}

// messages reports the program's informational messages and remembers the last lines of all.
// The exec package writes to it from one goroutine, which is done when Wait returns.
type messages struct {
	report  func(string)
	partial string
	lines   []string
}

func (m *messages) Write(p []byte) (int, error) {
	const most = 12
	text := m.partial + string(p)
	for {
		line, rest, ok := strings.Cut(text, "\n")
		if !ok {
			break
		}
		text = rest
		line = strings.TrimRight(line, "\r ")
		if line == "" {
			continue
		}
		if info, ok := strings.CutPrefix(line, "I: "); ok {
			m.report(info)
		}
		m.lines = append(m.lines, line)
		if len(m.lines) > most {
			m.lines = m.lines[len(m.lines)-most:]
		}
	}
	m.partial = text
	return len(p), nil
}

func (m *messages) last() string {
	return strings.Join(append(m.lines, strings.TrimSpace(m.partial)), "\n")
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
