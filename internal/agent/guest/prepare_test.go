//go:build linux

package guest

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

var day20000 = time.Unix(20000*24*60*60+5, 0)

func prepare(t *testing.T, root string, img agent.Image) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: the agent runs as root, and so must this test")
	}
	if err := prepareImage(root, img, day20000); err != nil {
		t.Fatal(err)
	}
	filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || strings.HasSuffix(path, newSuffix) {
			t.Errorf("%s was left behind (%v)", path, err)
		}
		return nil
	})
}

// expectFile checks a file's content, mode and owner.
func expectFile(t *testing.T, root, path, content string, mode os.FileMode, uid uint32) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil || string(b) != content {
		t.Errorf("%s: %q, %v, want %q", path, b, err, content)
	}
	expectMode(t, root, path, mode, uid)
}

func expectMode(t *testing.T, root, path string, mode os.FileMode, uid uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, path), &st); err != nil {
		t.Errorf("%s: %v", path, err)
		return
	}
	if got := os.FileMode(st.Mode & 0o7777); got != mode || st.Uid != uid {
		t.Errorf("%s has mode %o and owner %d, want %o and %d", path, got, st.Uid, mode, uid)
	}
}

func expectNone(t *testing.T, root, path string) {
	t.Helper()
	if _, err := os.Lstat(filepath.Join(root, path)); err == nil {
		t.Errorf("there is a %s", path)
	}
}

// An image of one program gets all that programs expect.
func TestPrepareEmptyImage(t *testing.T) {
	root := imageOf(t, map[string]string{"app": "#!static"})
	prepare(t, root, agent.Image{WorkingDir: "/data/in"})
	expectFile(t, root, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nshed:x:1000:1000::/home/shed:/bin/sh\n", 0o644, 0)
	expectFile(t, root, "etc/group", "root:x:0:\nshed:x:1000:\n", 0o644, 0)
	for dir, mode := range map[string]os.FileMode{
		"etc": 0o755, "home": 0o755, "root": 0o700, "tmp": 0o1777, "var": 0o755, "var/tmp": 0o1777, "data/in": 0o755,
	} {
		expectMode(t, root, dir, mode, 0)
	}
	expectMode(t, root, "home/shed", 0o755, 1000)
	for _, none := range []string{"etc/shadow", "etc/gshadow", "etc/sudoers.d", "etc/doas.d", "etc/profile.d"} {
		expectNone(t, root, none)
	}
}

// Somebody who has the UID shares it, and sudo and doas know the user.
func TestPrepareSharedUID(t *testing.T) {
	root := imageOf(t, map[string]string{
		"etc/passwd":  "root:x:0:0:root:/root:/bin/bash\nnode:x:1000:1000:Node:/home/node:/bin/bash\nlast:x:1:1::/:/bin/sh", // without a newline
		"etc/group":   "root:x:0:\nsudo:x:27:\nnode:x:1000:\nwheel:x:10:root\ndocker:x:999:shed\nother:x:5:node\n",
		"etc/shadow":  "root:*:19000:0:99999:7:::\nnode:!:19000:0:99999:7:::\n",
		"etc/gshadow": "root:*::\nsudo:*::\nnode:!::\n",
		"bin/bash":    "#!", "bin/sh": "#!", "usr/bin/sudo": "#!", "etc/doas.d/": "", "home/node/": "",
		"etc/skel/.profile": "umask 022\n", "etc/skel/bin/tool": "#!/bin/sh\n",
	})
	if err := os.Symlink(".profile", root+"/etc/skel/.bash_profile"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root+"/etc/skel/bin", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root+"/etc/shadow", 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(root+"/etc/shadow", 0, 42); err != nil && os.Getuid() == 0 {
		t.Fatal(err)
	}
	prepare(t, root, agent.Image{})
	expectFile(t, root, "etc/passwd", "root:x:0:0:root:/root:/bin/bash\nshed:x:1000:1000::/home/shed:/bin/bash\n"+
		"node:x:1000:1000:Node:/home/node:/bin/bash\nlast:x:1:1::/:/bin/sh\n", 0o644, 0)
	expectFile(t, root, "etc/group", "root:x:0:\nsudo:x:27:shed\nshed:x:1000:\nnode:x:1000:\nwheel:x:10:root,shed\ndocker:x:999:shed\nother:x:5:node\n", 0o644, 0)
	expectFile(t, root, "etc/shadow", "root:*:19000:0:99999:7:::\nnode:!:19000:0:99999:7:::\nshed:!:20000:0:99999:7:::\n", 0o640, 0)
	expectFile(t, root, "etc/gshadow", "root:*::\nsudo:*::shed\nnode:!::\nshed:!::\n", 0o644, 0)
	var st unix.Stat_t
	if err := unix.Stat(root+"/etc/shadow", &st); err != nil || st.Gid != 42 {
		t.Errorf("the shadow's group became %d (%v)", st.Gid, err)
	}
	expectFile(t, root, "etc/sudoers.d/shed", "shed ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, 0)
	expectFile(t, root, "etc/doas.d/shed.conf", "permit nopass shed\n", 0o400, 0)
	expectFile(t, root, "home/shed/.profile", "umask 022\n", 0o644, 1000)
	expectFile(t, root, "home/shed/bin/tool", "#!/bin/sh\n", 0o755, 1000)
	expectMode(t, root, "home/shed/bin", 0o700, 1000)
	expectMode(t, root, "home/shed/.bash_profile", 0o777, 1000)
	if to, err := os.Readlink(root + "/home/shed/.bash_profile"); err != nil || to != ".profile" {
		t.Errorf("the link leads to %q, %v", to, err)
	}

	// It may be called again, after having been cut off anywhere.
	if err := os.Remove(root + "/etc/sudoers.d/shed"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/home/shed/.profile", []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/sudoers.d/shed"+newSuffix, []byte("half"), 0o400); err != nil {
		t.Fatal(err)
	}
	passwd, err := os.ReadFile(root + "/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	prepare(t, root, agent.Image{})
	expectFile(t, root, "etc/sudoers.d/shed", "shed ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, 0)
	expectFile(t, root, "etc/passwd", string(passwd), 0o644, 0)
	expectFile(t, root, "home/shed/.profile", "mine", 0o644, 1000)
}

// What an image has of its own stays as it is.
func TestPrepareKeepsTheImagesOwn(t *testing.T) {
	files := map[string]string{
		"etc/passwd":         "root:x:0:0::/root:/bin/sh\nshed:x:1234:1235:Its own:/work:/bin/zsh\n",
		"etc/group":          "root:x:0:\nsudo:x:27:\nits:x:1235:\n",
		"etc/shadow":         "root:*::::::\n",
		"etc/sudoers.d/shed": "shed ALL=(ALL) ALL\n", "usr/bin/sudo": "#!",
		"work/file": "kept",
	}
	root := imageOf(t, files)
	if err := os.Symlink("/var/tmp", root+"/tmp"); err != nil {
		t.Fatal(err)
	}
	prepare(t, root, agent.Image{})
	for path, content := range files {
		if path != "usr/bin/sudo" {
			expectFile(t, root, path, content, 0o644, 0)
		}
	}
	if to, err := os.Readlink(root + "/tmp"); err != nil || to != "/var/tmp" {
		t.Errorf("/tmp: %q, %v", to, err)
	}
	expectNone(t, root, "home/shed")

	root = imageOf(t, map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh\nshed:x:1234:1235::/work/u:/bin/sh\n"})
	prepare(t, root, agent.Image{})
	expectMode(t, root, "work/u", 0o755, 1234) // a home that the image forgot

	root = imageOf(t, map[string]string{"etc/group": "shed:x:77:\n"})
	prepare(t, root, agent.Image{})
	expectFile(t, root, "etc/group", "shed:x:77:\n", 0o644, 0)
	expectFile(t, root, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nshed:x:1000:77::/home/shed:/bin/sh\n", 0o644, 0)
}

// Login shells get the image's PATH, though /etc/profile sets another.
func TestPreparePath(t *testing.T) {
	root := imageOf(t, map[string]string{"etc/profile.d/": ""})
	prepare(t, root, agent.Image{Env: []string{"PATH=/usr/local/go/bin:/usr/bin:/opt/it's $HOME"}})
	script := root + "/etc/profile.d/zz-shed-path.sh"
	for before, want := range map[string]string{
		"/usr/bin:/bin":               "/usr/local/go/bin:/usr/bin:/bin:/opt/it's $HOME",
		"/usr/local/go/bin:/usr/bin":  "/usr/local/go/bin:/usr/bin:/opt/it's $HOME",
		"/x/usr/local/go/bin:/go/bin": "/usr/local/go/bin:/x/usr/local/go/bin:/go/bin:/opt/it's $HOME",
	} {
		cmd := exec.Command("/bin/sh", "-euc", `PATH=$1; . "$2"; printf %s "$PATH ${dir_shed-}"`, "sh", before, script)
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != want+" " {
			t.Errorf("%s became %q, %v, want %q", before, out, err, want)
		}
	}

	for name, files := range map[string]map[string]string{"a usual PATH": {"etc/profile.d/": ""}, "no profile.d": {"etc/profile": ""}} {
		root := imageOf(t, files)
		path := "PATH=/usr/bin:/bin"
		if name == "no profile.d" {
			path = "PATH=/opt/bin"
		}
		prepare(t, root, agent.Image{Env: []string{path}})
		if _, err := os.Stat(root + "/etc/profile.d/zz-shed-path.sh"); err == nil {
			t.Errorf("%s: there is a file", name)
		}
	}
}

func TestFindShell(t *testing.T) {
	for want, files := range map[string]map[string]string{
		"/bin/bash":           {"bin/bash": "#!", "bin/sh": "#!"},
		"/bin/sh":             {"bin/bash": "not executable", "bin/sh": "#!"},
		"/usr/local/bin/bash": {"usr/local/bin/bash": "#!", "bin/sh": "#!"},
		"":                    {"app": "#!"},
	} {
		if got, ok := findShell(imageOf(t, files)); got != want || ok != (want != "") {
			t.Errorf("%v: %q, %v, want %q", files, got, ok, want)
		}
	}
}
