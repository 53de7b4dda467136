//go:build linux

package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed/internal/agent"
)

func TestEnviron(t *testing.T) {
	base := environ{"A=1", "AB=2", "EMPTY="}
	got := base.with("A=3", "C=4", "no assignment", "C=5=6", "EMPTY=x")
	if want := (environ{"A=3", "AB=2", "EMPTY=x", "C=5=6"}); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if want := (environ{"A=1", "AB=2", "EMPTY="}); !slices.Equal(base, want) {
		t.Errorf("the receiver became %q", base)
	}
	for key, want := range map[string]string{"A": "3", "AB": "2", "C": "5=6", "B": ""} {
		if v := got.get(key); v != want {
			t.Errorf("get(%q) = %q, want %q", key, v, want)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"bin/tool": 0o755, "bin/data": 0o644, "late/data": 0o755, "work/own": 0o755, "work/rel/tool2": 0o755} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir+"/bin/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	work := dir + "/work"
	path := strings.Join([]string{dir + "/nowhere", dir + "/bin", dir + "/late", "rel"}, ":")
	for _, tt := range []struct {
		name, path, want, err string
	}{
		{name: "tool", path: path, want: dir + "/bin/tool"},
		{name: "data", path: path, want: dir + "/late/data"}, // the first one isn't executable
		{name: "tool2", path: path, want: work + "/rel/tool2"},
		{name: "own", path: path, err: "command not found"},
		{name: "own", path: path + ":", want: work + "/own"}, // an empty entry is the directory
		{name: "./own", path: path, want: work + "/own"},
		{name: "rel/tool2", path: "", want: work + "/rel/tool2"},
		{name: dir + "/bin/tool", path: "", want: dir + "/bin/tool"},
		{name: dir + "/bin/data", path: "", err: "permission denied"},
		{name: "../bin/dir", path: "", err: "permission denied"},
		{name: "dir", path: path, err: "command not found"},
		{name: "./none", path: path, err: "no such file"},
		{name: "tool", path: "", err: "command not found"},
	} {
		got, err := lookPath(tt.name, tt.path, work)
		if tt.err == "" && (err != nil || got != tt.want) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("lookPath(%q, %q) = %q, %v; want %q, %q", tt.name, tt.path, got, err, tt.want, tt.err)
		}
	}
}

func TestWorkDir(t *testing.T) {
	dir := t.TempDir()
	closed := dir + "/closed"
	for _, name := range []string{"home", "image", "ws", "closed/in"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What the test has made is open but for one directory, as in a shed.
	for name, mode := range map[string]os.FileMode{closed: 0o700, dir: 0o755, filepath.Dir(dir): 0o755} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	home, image, ws := dir+"/home", dir+"/image", dir+"/ws"
	other := uint32(os.Getuid()) + 1
	for _, tt := range []struct {
		dir   string
		home  string
		start []string
		want  string
	}{
		{"", home, nil, home},
		{"", home, []string{ws, image}, ws},
		{"", home, []string{dir + "/gone", image}, image},
		{"", home, []string{closed, image}, image},
		{"", home, []string{closed + "/in"}, home},
		{"", dir + "/gone", []string{dir + "/gone"}, "/"},
		{"/abs", home, []string{ws}, "/abs"},
		{"rel/x", home, []string{ws, image}, ws + "/rel/x"},
		{"..", home, []string{ws}, dir},
		{"~", "/home/u", []string{ws}, "/home/u"},
		{"~/x", "/home/u", []string{ws}, "/home/u/x"},
		{"~x", home, []string{ws}, ws + "/~x"},
	} {
		a := &account{home: tt.home, uid: other, gid: other}
		if got := a.workDir(tt.dir, tt.start...); got != tt.want {
			t.Errorf("workDir(%q, %q) with the home %s = %q, want %q", tt.dir, tt.start, tt.home, got, tt.want)
		}
	}
	if a := (&account{uid: 0}); !a.mayEnter(closed + "/in") {
		t.Error("root may not enter a closed directory")
	}
	if a := (&account{uid: uint32(os.Getuid())}); !a.mayEnter(closed) {
		t.Error("the owner may not enter a closed directory")
	}
}

func TestStartDirs(t *testing.T) {
	image := agent.Image{WorkingDir: "/srv"}
	for _, tt := range []struct {
		setup     agent.Setup
		isProgram bool
		want      []string
	}{
		{agent.Setup{}, true, nil},
		{agent.Setup{Image: image}, true, []string{"/srv"}},
		{agent.Setup{Image: image}, false, nil},
		{agent.Setup{Image: image, Workspace: "/ws"}, true, []string{"/ws", "/srv"}},
		{agent.Setup{Image: image, Workspace: "/ws"}, false, []string{"/ws"}},
		{agent.Setup{Image: agent.Image{WorkingDir: "/"}}, true, nil},
		{agent.Setup{Image: agent.Image{WorkingDir: "rel"}}, true, []string{"/rel"}},
	} {
		if got := startDirs(tt.setup, tt.isProgram); !slices.Equal(got, tt.want) {
			t.Errorf("startDirs(%+v, %v) = %q, want %q", tt.setup, tt.isProgram, got, tt.want)
		}
	}
}

func TestUnsigned(t *testing.T) {
	const mark = "~Module signature appended~\n"
	signed := func(n byte) string { return "module" + "SIGN" + "12345678" + "\x00\x00\x00" + string(n) + mark }
	for image, want := range map[string]string{
		signed(4):        "module",
		"module":         "module",
		"":               "",
		mark:             mark,
		"short" + mark:   "short" + mark,
		signed(200):      signed(200), // a length that can't be
		"a" + mark + "b": "a" + mark + "b",
	} {
		if got := unsigned([]byte(image)); string(got) != want {
			t.Errorf("unsigned(%q) = %q, want %q", image, got, want)
		}
	}
}

func TestHasHost(t *testing.T) {
	hosts := "127.0.0.1\tlocalhost\n10.0.0.1 other box.example # mybox\n# 1.2.3.4 hidden\nbox2 alone\n"
	for name, want := range map[string]bool{
		"localhost": true, "other": true, "box.example": true, "alone": true,
		"box": false, "mybox": false, "hidden": false, "10.0.0.1": false, "box2": false, "": false,
	} {
		if got := hasHost(hosts, name); got != want {
			t.Errorf("hasHost(%q) = %v", name, got)
		}
	}
}

func TestDiskName(t *testing.T) {
	for i, want := range map[int]string{0: "vda", 1: "vdb", 25: "vdz", 26: "vdaa", 27: "vdab", 51: "vdaz", 52: "vdba", 701: "vdzz", 702: "vdaaa"} {
		if got := diskName(i); got != "/dev/"+want {
			t.Errorf("diskName(%d) = %s, want %s", i, got, want)
		}
	}
}

// This system's own mounts, and what only others have.
func TestMounts(t *testing.T) {
	found := false
	for _, m := range mountsOf("/proc/self/mountinfo") {
		found = found || m.target == "/proc" && m.fstype == "proc"
	}
	if !found {
		t.Error("/proc isn't among the mounts")
	}
	if got := mountsOf(t.TempDir() + "/none"); got != nil {
		t.Errorf("%v", got)
	}
	got := parseMounts("" +
		`36 35 98:0 /mnt1 /a\040b\134x rw,noatime master:1 shared:2 - ext3 /dev/root rw` + "\n" +
		"nonsense\n" + "1 2 3:4 / - only\n" +
		"37 35 0:5 / /plain rw - tmpfs none rw\n")
	want := []mount{{source: "/dev/root", target: `/a b\x`, fstype: "ext3"}, {source: "none", target: "/plain", fstype: "tmpfs"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// FuzzMounts checks that any path that the kernel has escaped comes back.
func FuzzMounts(f *testing.F) {
	f.Add("/plain")
	f.Add("/a b\t\n\\040 - x")
	f.Add(`\\134040`)
	f.Add("/form\ffeed\u00a0and the like")
	f.Fuzz(func(t *testing.T, path string) {
		if !strings.HasPrefix(path, "/") || strings.IndexByte(path, 0) >= 0 {
			return // nothing is mounted there
		}
		var escaped strings.Builder
		for _, b := range []byte(path) {
			if strings.IndexByte(" \t\n\\", b) >= 0 {
				fmt.Fprintf(&escaped, `\%03o`, b)
			} else {
				escaped.WriteByte(b)
			}
		}
		got := parseMounts("1 2 3:4 / " + escaped.String() + " rw - ext4 /dev/vda rw\n")
		if len(got) != 1 || got[0].target != path {
			t.Errorf("%q, escaped as %q, is read as %+v", path, escaped.String(), got)
		}
		parseMounts(path) // anything at all
	})
}

func TestStdinQueue(t *testing.T) {
	q := newStdinQueue()
	window := make([]byte, agent.StdinWindow)
	if !q.put(window[:10]) || !q.put(window[10:]) {
		t.Fatal("the window isn't taken")
	}
	if q.put([]byte("x")) {
		t.Error("more than the window is taken")
	}
	b, ok := q.take()
	if !ok || len(b) != len(window) {
		t.Fatalf("%d bytes, %v", len(b), ok)
	}
	if q.put([]byte("x")) {
		t.Error("what is being written no longer counts")
	}
	q.taken()
	if !q.put([]byte("more")) {
		t.Error("nothing is taken after it was written")
	}
	q.close()
	if !q.put(window) {
		t.Error("what comes after the end isn't just dropped")
	}
	if b, ok := q.take(); !ok || !bytes.Equal(b, []byte("more")) {
		t.Errorf("%q, %v before the end", b, ok)
	}
	if b, ok := q.take(); ok {
		t.Errorf("%q after the end", b)
	}
}

func TestStdinQueueWakesItsReader(t *testing.T) {
	q := newStdinQueue()
	got := make(chan string)
	go func() {
		for {
			b, ok := q.take()
			if !ok {
				close(got)
				return
			}
			got <- string(b)
			q.taken()
		}
	}()
	for _, s := range []string{"a", "b"} {
		if !q.put([]byte(s)) {
			t.Fatal("not taken")
		}
		if g := <-got; g != s {
			t.Fatalf("%q, want %q", g, s)
		}
	}
	q.close()
	if g, ok := <-got; ok {
		t.Fatalf("%q after the end", g)
	}
}

func TestLoginEnvironment(t *testing.T) {
	home := t.TempDir()
	a := &account{name: "root", home: home, shell: "/bin/sh"}
	profile := func(s string) {
		t.Helper()
		if err := os.WriteFile(home+"/.profile", []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	count := home + "/count"
	profile("echo noise; echo noise >&2; echo x >> " + count + "; export MINE='a\nb=c'; PATH=$PATH:/mine; cd /")
	m := &machine{}
	base := a.baseEnv(nil, false).with("SHED_NAME=box")
	for range 3 {
		env := m.shellEnv(a, base)
		if env.get("MINE") != "a\nb=c" || !strings.HasSuffix(env.get("PATH"), ":/mine") || env.get("SHED_NAME") != "box" {
			t.Fatalf("%q", env)
		}
		for _, key := range []string{"_", "SHLVL", "PWD", "OLDPWD"} {
			if v := env.get(key); v != "" {
				t.Errorf("%s=%s is the shell's own", key, v)
			}
		}
	}
	if b, err := os.ReadFile(count); err != nil || string(b) != "x\n" {
		t.Errorf("the shell was asked %d times, not once (%v)", len(b)/2, err)
	}
	profile("export MINE=changed # and of another size")
	if v := m.shellEnv(a, base).get("MINE"); v != "changed" {
		t.Errorf("after a change of the profile: %q", v)
	}
	if v := m.shellEnv(a, base.with("SHED_NAME=other")).get("SHED_NAME"); v != "other" {
		t.Errorf("with another base: %q", v)
	}
	profile("exit 3 # a profile that keeps everybody out")
	if got := m.shellEnv(a, base); !slices.Equal(got, base) {
		t.Errorf("where the shell fails: %q, want the base", got)
	}
	gone := &account{name: "gone", home: home, shell: home + "/none"}
	if got := m.shellEnv(gone, base); !slices.Equal(got, base) {
		t.Errorf("where there is no shell: %q, want the base", got)
	}
}
