//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// account is a user of the guest.
type account struct {
	name, home, shell string
	uid, gid          uint32
	groups            []uint32
}

// defaultUser is who commands run as unless they say otherwise.
const defaultUser = "shed"

// lookupUser finds a user by name or UID. "" is the default user, or root in an
// image that doesn't have it. The image's files are read each time: they may change.
func lookupUser(name string) (*account, error) {
	wanted := name
	if wanted == "" {
		wanted = defaultUser
	}
	u, err := user.Lookup(wanted)
	if err != nil {
		if _, numErr := strconv.ParseUint(wanted, 10, 32); numErr == nil {
			u, err = user.LookupId(wanted)
		}
	}
	if err != nil {
		if name == "" || name == "root" || name == "0" {
			return &account{name: "root", home: "/root", shell: "/bin/sh"}, nil
		}
		return nil, fmt.Errorf("there is no user %q in the shed", name)
	}
	a := &account{name: u.Username, home: u.HomeDir, shell: shellOf(u.Username)}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	a.uid, a.gid = uint32(uid), uint32(gid)
	groups, err := u.GroupIds()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		if n, err := strconv.ParseUint(g, 10, 32); err == nil {
			a.groups = append(a.groups, uint32(n))
		}
	}
	return a, nil
}

// shellOf returns the user's login shell, from passwd(5).
func shellOf(name string) string {
	b, err := os.ReadFile("/etc/passwd")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			f := strings.Split(strings.TrimSpace(line), ":")
			if len(f) == 7 && f[0] == name && f[6] != "" {
				return f[6]
			}
		}
	}
	return "/bin/sh"
}

// credential returns what a process of the user is started with.
func (a *account) credential() *syscall.Credential {
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// baseEnv is the environment before any shell has run, as login(1) makes it.
func (a *account) baseEnv() environ {
	return environ{
		"HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name, "SHELL=" + a.shell,
		"PATH=" + defaultPath, "LANG=C.UTF-8",
	}
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
	known map[string]*loginEnv // by user name
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
		l.known = map[string]*loginEnv{}
	}
	e, ok := l.known[a.name]
	if !ok {
		e = &loginEnv{}
		l.known[a.name] = e
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
	if _, err := os.Stat(a.shell); errors.Is(err, fs.ErrNotExist) {
		return base, nil
	}
	const mark = "\x00shed\x00"
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, a.shell, "-l", "-c", `printf '\0shed\0'; env -0`)
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
