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

// mergePath returns the PATH of a login shell with what the image's PATH has of its own, and it lacks, at the end.
func mergePath(login, image string) string {
	entries := filepath.SplitList(login)
	for _, dir := range ownDirs(image) {
		if !slices.Contains(entries, dir) {
			entries = append(entries, dir)
		}
	}
	return strings.Join(entries, ":")
}

// ownDirs returns the directories of an image's PATH that not every system has. Of
// those that every one has, it is for the login shell to choose.
func ownDirs(path string) []string {
	system := filepath.SplitList(defaultPath)
	return slices.DeleteFunc(filepath.SplitList(path), func(dir string) bool { return dir == "" || slices.Contains(system, dir) })
}

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

// get returns the environment of a login shell of a that starts with base.
func (l *loginEnvs) get(a *account, base environ) environ {
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
	env, err := askLoginShell(a, base)
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
func askLoginShell(a *account, base environ) (environ, error) {
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
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := startCommand(cmd.Start); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return nil, err
	}
	_, after, ok := bytes.Cut(out.Bytes(), []byte(mark))
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
