//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

const (
	defaultID   = 1000 // UID and GID of the default user
	defaultHome = "/home/" + agent.DefaultUser

	// newSuffix marks what is still being written.
	newSuffix = ".shed-new"
)

// prepareImage gives the image's file system below root what every shed has: the directories that programs expect,
// the default user with a home and the right to become root, and the image's PATH in login
// shells. It is for the first boot: later ones would undo what users do. It may be
// cut off at any point, and then called again.
func prepareImage(root string, img agent.Image, now time.Time) error {
	if err := makeDirs(root, img.WorkingDir); err != nil {
		return err
	}
	c := &changes{root: root}
	if err := c.addUser(now); err != nil {
		return err
	}
	if err := c.addHome(); err != nil {
		return err
	}
	if err := c.addRights(); err != nil {
		return err
	}
	if err := c.addPath(environ(img.Env).get("PATH")); err != nil {
		return err
	}
	return c.commit()
}

// makeDirs makes the directories that aren't there: images of a single program have none.
func makeDirs(root, workingDir string) error {
	for _, d := range []struct {
		path string
		mode uint32
	}{
		{"etc", 0o755}, {"home", 0o755}, {"root", 0o700}, {"tmp", 0o1777}, {"var", 0o755}, {"var/tmp", 0o1777},
	} {
		path := filepath.Join(root, d.path)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			continue // whatever it is, it is the image's
		}
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		if err := unix.Chmod(path, d.mode); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	// A working directory need not be in the image.
	if err := os.MkdirAll(filepath.Join(root, workingDir), 0o755); err != nil {
		return fmt.Errorf("the image's working directory: %w", err)
	}
	return nil
}

// changes are files and directories that are written, and not in their places yet.
type changes struct {
	root  string
	paths []string
	user  *account // the default user, as it will be
}

// put writes a file that commit puts to path. One that it replaces passes on its owner and mode.
func (c *changes) put(path, content string, mode os.FileMode) error {
	file := filepath.Join(c.root, path)
	uid, gid := 0, 0
	if fi, err := os.Stat(file); err == nil {
		st := fi.Sys().(*syscall.Stat_t)
		mode, uid, gid = fi.Mode().Perm(), int(st.Uid), int(st.Gid)
	}
	if err := os.WriteFile(file+newSuffix, []byte(content), 0o600); err != nil {
		return err
	}
	if err := errors.Join(os.Chown(file+newSuffix, uid, gid), os.Chmod(file+newSuffix, mode)); err != nil {
		return err
	}
	c.paths = append(c.paths, path)
	return nil
}

// commit puts everything to its place, when all of it is on disk.
func (c *changes) commit() error {
	if len(c.paths) == 0 {
		return nil
	}
	root, err := os.Open(c.root)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Syncfs(int(root.Fd())); err != nil {
		return fmt.Errorf("syncing the root file system: %w", err)
	}
	for _, path := range c.paths {
		file := filepath.Join(c.root, path)
		if err := os.Rename(file+newSuffix, file); err != nil {
			return err
		}
	}
	return nil
}

// read returns a file's content, and whether there is one.
func (c *changes) read(path string) (string, bool, error) {
	b, err := os.ReadFile(filepath.Join(c.root, path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	return string(b), err == nil, err
}

// isDir says whether there is a directory.
func (c *changes) isDir(path string) bool {
	fi, err := os.Stat(filepath.Join(c.root, path))
	return err == nil && fi.IsDir()
}

// addUser adds the default user and a group of that name, unless the image has them.
func (c *changes) addUser(now time.Time) error {
	u, err := readUsers(c.root)
	if err != nil {
		return err
	}
	if find(u.passwd, agent.DefaultUser) != nil {
		c.user, err = u.lookup(agent.DefaultUser)
		return err
	}
	gid := uint32(defaultID)
	if f := find(u.group, agent.DefaultUser); f != nil {
		if gid, err = parseID(f[2]); err != nil {
			return fmt.Errorf("the image's group %s has %w", agent.DefaultUser, err)
		}
	}
	shell, ok := findShell(c.root)
	if !ok {
		shell = "/bin/sh" // for when one is installed
	}
	c.user = &account{name: agent.DefaultUser, uid: defaultID, gid: gid, home: defaultHome, shell: shell}
	for _, f := range []struct {
		path string
		mode os.FileMode
		edit func(string) string
		make bool // where the image has none
	}{
		{"etc/group", 0o644, func(s string) string { return joinGroups(withGroup(s), agent.DefaultUser) }, true},
		{"etc/gshadow", 0o640, func(s string) string {
			return joinGroups(withLine(s, agent.DefaultUser+":!::", ""), agent.DefaultUser)
		}, false},
		{"etc/shadow", 0o640, func(s string) string {
			days := now.Unix() / int64(24*time.Hour/time.Second)
			return withLine(s, fmt.Sprintf("%s:!:%d:0:99999:7:::", agent.DefaultUser, days), "")
		}, false},
		// Last, as it is what tells that there is such a user.
		{"etc/passwd", 0o644, func(s string) string { return withUser(s, c.user) }, true},
	} {
		text, ok, err := c.read(f.path)
		if err != nil {
			return err
		}
		if !ok && !f.make {
			continue
		}
		if edited := f.edit(text); edited != text {
			if err := c.put(f.path, edited, f.mode); err != nil {
				return err
			}
		}
	}
	return nil
}

// withUser returns a passwd(5) with a line for a. If others have its UID, it is the first of
// them: it is whose name belongs to the UID.
func withUser(passwd string, a *account) string {
	if strings.TrimSpace(passwd) == "" {
		passwd = "root:x:0:0:root:/root:/bin/sh\n"
	}
	return withLine(passwd, fmt.Sprintf("%s:x:%d:%d::%s:%s", a.name, a.uid, a.gid, a.home, a.shell), fmt.Sprint(a.uid))
}

// withGroup returns a group(5) with a line for the default user's group.
func withGroup(group string) string {
	if strings.TrimSpace(group) == "" {
		group = "root:x:0:\n"
	}
	return withLine(group, fmt.Sprintf("%s:x:%d:", agent.DefaultUser, defaultID), fmt.Sprint(defaultID))
}

// withLine returns text with the line for a name, unless it has one: before the first line whose
// third field is id, or else at the end.
func withLine(text, line, id string) string {
	name, _, _ := strings.Cut(line, ":")
	lines := strings.SplitAfter(text, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	} else {
		lines[len(lines)-1] += "\n"
	}
	at := len(lines)
	for i, l := range lines {
		fields := strings.Split(strings.TrimSpace(l), ":")
		if fields[0] == name {
			return text
		}
		if at == len(lines) && id != "" && len(fields) > 2 && fields[2] == id {
			at = i
		}
	}
	return strings.Join(slices.Insert(lines, at, line+"\n"), "")
}

// joinGroups returns a group(5) or gshadow(5) in which the user is in the groups that may become root.
func joinGroups(text, user string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(fields) == 4 && slices.Contains([]string{"sudo", "wheel", "docker"}, fields[0]) {
			members := strings.FieldsFunc(fields[3], func(r rune) bool { return r == ',' })
			if !slices.Contains(members, user) {
				fields[3] = strings.Join(append(members, user), ",")
				line = strings.Join(fields, ":") + "\n"
			}
		}
		b.WriteString(line)
	}
	return b.String()
}

// addHome makes the default user's home from the image's skeleton of one.
func (c *changes) addHome() error {
	home := filepath.Join(c.root, c.user.home)
	if _, err := os.Lstat(home); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil {
		return err
	}
	made := home + newSuffix
	if err := os.RemoveAll(made); err != nil {
		return err
	}
	skel, err := filepath.EvalSymlinks(filepath.Join(c.root, "etc/skel"))
	if err == nil {
		err = copyTree(skel, made, int(c.user.uid), int(c.user.gid))
	} else {
		err = errors.Join(os.Mkdir(made, 0o755), os.Chown(made, int(c.user.uid), int(c.user.gid)))
	}
	if err != nil {
		return fmt.Errorf("making the home of %s: %w", c.user.name, err)
	}
	c.paths = append(c.paths, c.user.home)
	return nil
}

// copyTree copies the directories, files and links of a directory, for another owner.
func copyTree(from, to string, uid, gid int) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		switch d.Type() {
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return errors.Join(os.Symlink(target, dst), os.Lchown(dst, uid, gid))
		case fs.ModeDir:
			err = os.Mkdir(dst, 0o700)
		case 0:
			var b []byte
			if b, err = os.ReadFile(path); err == nil {
				err = os.WriteFile(dst, b, 0o600)
			}
		default:
			return nil // nothing that belongs in a home
		}
		if err != nil {
			return err
		}
		return errors.Join(os.Chown(dst, uid, gid), os.Chmod(dst, fi.Mode().Perm()))
	})
}

// addRights lets the default user become root without a password, by what the image has for that.
func (c *changes) addRights() error {
	if _, err := os.Stat(filepath.Join(c.root, "usr/bin/sudo")); err == nil || c.isDir("etc/sudoers.d") {
		if err := os.MkdirAll(filepath.Join(c.root, "etc/sudoers.d"), 0o750); err != nil {
			return err
		}
		if err := c.putNew("etc/sudoers.d/"+agent.DefaultUser, agent.DefaultUser+" ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440); err != nil {
			return err
		}
	}
	if c.isDir("etc/doas.d") {
		return c.putNew("etc/doas.d/"+agent.DefaultUser+".conf", "permit nopass "+agent.DefaultUser+"\n", 0o400)
	}
	return nil
}

// addPath has login shells, those that programs start too, add to their PATH what the image's has of its own, where
// the image has it: /etc/profile usually sets PATH without looking at what it was, and reads this file then.
func (c *changes) addPath(path string) error {
	before, after := ownDirs(path)
	if len(before)+len(after) == 0 || !c.isDir("etc/profile.d") {
		return nil
	}
	slices.Reverse(before) // the last one that is put in front is the first
	script := "# What the PATH of the image's configuration has, and /etc/profile leaves out.\n" +
		addDirs(before, "$dir_shed:$PATH") + addDirs(after, "$PATH:$dir_shed") +
		"unset dir_shed\nexport PATH\n"
	return c.putNew("etc/profile.d/zz-shed-path.sh", script, 0o644)
}

// addDirs returns a shell script that sets PATH to value, in which $dir_shed is one of dirs, for each that it lacks.
func addDirs(dirs []string, value string) string {
	if len(dirs) == 0 {
		return ""
	}
	var quoted []string
	for _, dir := range dirs {
		quoted = append(quoted, "'"+strings.ReplaceAll(dir, "'", `'\''`)+"'")
	}
	return fmt.Sprintf(`for dir_shed in %s; do
	case ":$PATH:" in
	*":$dir_shed:"*) ;;
	*) PATH=%s ;;
	esac
done
`, strings.Join(quoted, " "), value)
}

// putNew is put unless there is such a file.
func (c *changes) putNew(path, content string, mode os.FileMode) error {
	if _, err := os.Lstat(filepath.Join(c.root, path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return c.put(path, content, mode)
}
