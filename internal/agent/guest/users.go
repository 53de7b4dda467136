//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/charliek/shed/internal/agent"
)

// account is a user of the guest.
type account struct {
	name, home, shell string
	uid, gid          uint32
	groups            []uint32
}

// credential returns what a process of the user is started with.
func (a *account) credential() *syscall.Credential {
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// users is what an image says about its users: the lines of passwd(5) and group(5), split.
type users struct{ passwd, group [][]string }

// readUsers reads the files below root, a directory. What isn't there is empty.
func readUsers(root string) (users, error) {
	var u users
	for _, f := range []struct {
		name   string
		lines  *[][]string
		fields int
	}{{"passwd", &u.passwd, 7}, {"group", &u.group, 4}} {
		b, err := os.ReadFile(filepath.Join(root, "etc", f.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return users{}, err
		}
		for line := range strings.Lines(string(b)) {
			if fields := strings.Split(strings.TrimSpace(line), ":"); len(fields) >= f.fields && fields[0] != "" {
				*f.lines = append(*f.lines, fields)
			}
		}
	}
	return u, nil
}

// lookupUser finds a user of the shed: spec is a name or UID, maybe followed by a colon and the name or
// GID of a group, as in the configuration of an image. "" is the default user, or root in
// an image that doesn't have it. The image's files are read each time: they may change.
func lookupUser(spec string) (*account, error) {
	u, err := readUsers("/")
	if err != nil {
		return nil, err
	}
	if spec == "" {
		if a, err := u.lookup(agent.DefaultUser); err == nil {
			return a, nil
		}
		spec = "root"
	}
	return u.lookup(spec)
}

// lookupImageUser finds the user that the image's configuration names. It knew nothing of
// the default user: who shares a UID with that is meant.
func lookupImageUser(spec string) (*account, error) {
	u, err := readUsers("/")
	if err != nil {
		return nil, err
	}
	a, err := u.ofImage().lookup(spec)
	if err != nil {
		return nil, fmt.Errorf("the image has its commands run as %q: %w (another one can be chosen: shed exec -u USER)", spec, err)
	}
	return a, nil
}

// ofImage returns u with the default user last, so that a UID is that of another user who has it too.
func (u users) ofImage() users {
	isDefault := func(f []string) bool { return f[0] == agent.DefaultUser }
	if i := slices.IndexFunc(u.passwd, isDefault); i >= 0 {
		u.passwd = append(slices.Concat(u.passwd[:i], u.passwd[i+1:]), u.passwd[i])
	}
	return u
}

// lookup finds a user. A UID or GID may be one that no user or group has.
func (u users) lookup(spec string) (*account, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	if name == "" {
		name = "root"
	}
	a := &account{home: "/", shell: "/bin/sh"}
	if fields := find(u.passwd, name); fields != nil {
		uid, err := parseID(fields[2])
		if err != nil {
			return nil, fmt.Errorf("the user %q has %w in the shed's /etc/passwd", name, err)
		}
		gid, err := parseID(fields[3])
		if err != nil {
			return nil, fmt.Errorf("the user %q has %w in the shed's /etc/passwd", name, err)
		}
		a.name, a.uid, a.gid = fields[0], uid, gid
		if fields[5] != "" {
			a.home = fields[5]
		}
		if fields[6] != "" {
			a.shell = fields[6]
		}
	} else if name == "root" || name == "0" {
		a.name, a.home = "root", "/root"
	} else if uid, err := parseID(name); err == nil {
		a.name, a.uid = name, uid
	} else {
		return nil, fmt.Errorf("there is no user %q in the shed", name)
	}
	if !hasGroup {
		a.groups = u.groupsOf(a)
		return a, nil
	}
	id := group
	if fields := find(u.group, group); fields != nil {
		id = fields[2]
	}
	gid, err := parseID(id)
	if err != nil {
		return nil, fmt.Errorf("there is no group %q in the shed", group)
	}
	a.gid = gid
	return a, nil
}

// find returns the line of a name or, where nobody has it, of an ID.
func find(lines [][]string, name string) []string {
	for _, field := range []int{0, 2} {
		for _, f := range lines {
			if f[field] == name {
				return f
			}
		}
	}
	return nil
}

// groupsOf returns all groups of a, its own first.
func (u users) groupsOf(a *account) []uint32 {
	gids := []uint32{a.gid}
	for _, f := range u.group {
		if gid, err := parseID(f[2]); err == nil && slices.Contains(strings.Split(f[3], ","), a.name) && !slices.Contains(gids, gid) {
			gids = append(gids, gid)
		}
	}
	return gids
}

// parseID parses a UID or GID. The largest one means to the kernel not to change it.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("no valid ID: %q", s)
	}
	return uint32(n), nil
}

// loginShell returns the program that a's logins run: its shell or, where that isn't there, any.
func (a *account) loginShell() (string, bool) {
	if executable(a.shell) == nil {
		return a.shell, true
	}
	return findShell("/")
}

// findShell returns the best shell of the image below root.
func findShell(root string) (string, bool) {
	for _, shell := range []string{"/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh"} {
		if executable(filepath.Join(root, shell)) == nil {
			return shell, true
		}
	}
	return "", false
}
