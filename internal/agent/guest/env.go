//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// identity is who a is, for programs.
func (a *account) identity() environ {
	return environ{"HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name, "SHELL=" + a.shell}
}

// baseEnv is the environment before any shell has run: the image's, and what login(1) makes
// of it. Where the image's configuration has chosen the user, it may speak for them too.
func (a *account) baseEnv(image []string, ofImage bool) environ {
	env := a.identity().with("PATH="+defaultPath, "LANG=C.UTF-8").with(image...)
	if !ofImage {
		env = env.with(a.identity()...)
	}
	return env
}

// mergePath returns the PATH of a login shell with what the image's PATH has of its own, and it lacks: before the
// system's directories what the image has before them, and the others at the end.
func mergePath(login, image string) string {
	entries := filepath.SplitList(login)
	before, after := ownDirs(image)
	lacking := func(dirs []string) []string {
		return slices.DeleteFunc(dirs, func(dir string) bool { return slices.Contains(entries, dir) })
	}
	system := slices.IndexFunc(entries, isSystemDir)
	if system < 0 {
		system = len(entries)
	}
	return strings.Join(slices.Concat(entries[:system], lacking(before), entries[system:], lacking(after)), ":")
}

// ownDirs returns the directories of an image's PATH that not every system has, those before the first that
// every one has, and the others. Of those that every one has, it is for the login shell to choose.
func ownDirs(path string) (before, after []string) {
	dirs := &before
	for _, dir := range filepath.SplitList(path) {
		switch {
		case isSystemDir(dir):
			dirs = &after
		case dir != "" && !slices.Contains(before, dir) && !slices.Contains(after, dir):
			*dirs = append(*dirs, dir)
		}
	}
	return before, after
}

func isSystemDir(dir string) bool { return slices.Contains(filepath.SplitList(defaultPath), dir) }

// environ is an environment without repeated names.
type environ []string

// with returns e with the given K=V entries set.
func (e environ) with(entries ...string) environ {
	out := append(environ(nil), e...)
next:
	for _, entry := range entries {
		key, _, ok := strings.Cut(entry, "=")
		if !ok {
			continue
		}
		for i := range out {
			if strings.HasPrefix(out[i], key+"=") {
				out[i] = entry
				continue next
			}
		}
		out = append(out, entry)
	}
	return out
}

func (e environ) get(key string) string {
	for _, entry := range e {
		if v, ok := strings.CutPrefix(entry, key+"="); ok {
			return v
		}
	}
	return ""
}

// loginEnvs remembers what users' login shells make of their environment. Asking one costs
// as much as many commands do, so its answer is kept until a file that it reads changes.
type loginEnvs struct {
	mu    sync.Mutex
	known map[loginKey]*loginEnv
}

type loginKey struct {
	name     string
	uid, gid uint32
}

type loginEnv struct {
	mu    sync.Mutex
	stamp string
	env   environ
	until time.Time // when to ask again in any case; zero means never
}

// loginRetry is how long a login shell that failed isn't asked again: it may have hung, and
// whoever wants to run a command waits for it.
const loginRetry = time.Minute

// shellEnv returns the environment of a login shell of a that starts with base.
func (m *machine) shellEnv(a *account, base environ) environ {
	l := &m.envs
	l.mu.Lock()
	if l.known == nil {
		l.known = map[loginKey]*loginEnv{}
	}
	key := loginKey{a.name, a.uid, a.gid}
	e, ok := l.known[key]
	if !ok {
		e = &loginEnv{}
		l.known[key] = e
	}
	l.mu.Unlock()

	e.mu.Lock()
	defer e.mu.Unlock()
	stamp := profileStamp(a, base)
	if e.env != nil && e.stamp == stamp && (e.until.IsZero() || time.Now().Before(e.until)) {
		return e.env
	}
	env, err := m.askLoginShell(a, base)
	var until time.Time
	if err != nil {
		logf("the login shell of %s: %v", a.name, err)
		env, until = base, time.Now().Add(loginRetry)
	}
	e.stamp, e.env, e.until = stamp, env, until
	return env
}

// profileStamp changes when a file changes that login shells read.
func profileStamp(a *account, base environ) string {
	var b strings.Builder
	fmt.Fprintln(&b, a.shell, base)
	files := []string{"/etc/environment", "/etc/profile", "/etc/bash.bashrc", "/etc/zsh/zshenv", "/etc/zsh/zprofile"}
	for _, f := range []string{".profile", ".bash_profile", ".bash_login", ".bashrc", ".zshenv", ".zprofile", ".config/fish/config.fish"} {
		files = append(files, filepath.Join(a.home, f))
	}
	if more, err := filepath.Glob("/etc/profile.d/*"); err == nil {
		files = append(files, more...)
	}
	// A profile often adds directories to PATH only where they exist.
	for _, dir := range []string{"bin", ".local/bin", ".cargo/bin", "go/bin"} {
		if _, err := os.Stat(filepath.Join(a.home, dir)); err == nil {
			fmt.Fprintln(&b, dir)
		}
	}
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil {
			fmt.Fprintln(&b, f, fi.Size(), fi.ModTime().UnixNano())
		}
	}
	return b.String()
}

// askLoginShell runs the user's login shell to learn its environment.
func (m *machine) askLoginShell(a *account, base environ) (environ, error) {
	if executable(a.shell) != nil || slices.Contains([]string{"nologin", "false", "true"}, filepath.Base(a.shell)) {
		return base, nil // nobody logs in so
	}
	const mark = "\x00shed\x00"
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, a.shell, "-l", "-c", `printf '\0shed\0'; exec env -0`)
	cmd.Env = base
	cmd.Dir = a.home
	if _, err := os.Stat(cmd.Dir); err != nil {
		cmd.Dir = "/"
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.credential(), Setsid: true}
	cmd.WaitDelay = time.Second
	out := &limitedBuffer{}
	cmd.Stdout = out
	if err := m.startInCgroup(cmd, cmd.Start); err != nil {
		return nil, err
	}
	// What a profile has left running may hold the output; the shell itself has ended well then.
	if err := cmd.Wait(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, err
	}
	_, after, ok := bytes.Cut(out.b.Bytes(), []byte(mark))
	if !ok {
		return nil, errors.New("it ran no command")
	}
	env := base
	for entry := range bytes.SplitSeq(after, []byte{0}) {
		key, _, ok := strings.Cut(string(entry), "=")
		if !ok || key == "_" || key == "SHLVL" || key == "PWD" || key == "OLDPWD" {
			continue
		}
		env = env.with(string(entry))
	}
	return env, nil
}
