//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// imageOf makes the tree of an image of files, by path. One that ends in a slash is a directory.
func imageOf(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(content, "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestUserSpec(t *testing.T) {
	root := imageOf(t, map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/ash\n" +
			"app:x:42:43::/srv/app:\nshed:x:1000:1000::/home/shed:/bin/bash\n# a comment\n" +
			"node:x:1000:1001::/home/node:/bin/sh\nodd:x:none:1::/:/bin/sh\n7:x:70:70::/seven:/bin/sh\n",
		"etc/group": "root:x:0:\napp:x:43:\nweb:x:44:app,node\nall:x:45:node,app,shed\nodd:x:?:\n",
	})
	u, err := readUsers(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		spec string
		want account
		err  string
	}{
		{spec: "root", want: account{name: "root", home: "/root", shell: "/bin/ash", groups: []uint32{0}}},
		{spec: "0", want: account{name: "root", home: "/root", shell: "/bin/ash", groups: []uint32{0}}},
		{spec: "app", want: account{name: "app", uid: 42, gid: 43, home: "/srv/app", shell: "/bin/sh", groups: []uint32{43, 44, 45}}},
		{spec: "42", want: account{name: "app", uid: 42, gid: 43, home: "/srv/app", shell: "/bin/sh", groups: []uint32{43, 44, 45}}},
		{spec: "app:web", want: account{name: "app", uid: 42, gid: 44, home: "/srv/app", shell: "/bin/sh"}},
		{spec: "app:0", want: account{name: "app", uid: 42, home: "/srv/app", shell: "/bin/sh"}},
		{spec: "app:777", want: account{name: "app", uid: 42, gid: 777, home: "/srv/app", shell: "/bin/sh"}},
		{spec: "1000", want: account{name: "shed", uid: 1000, gid: 1000, home: "/home/shed", shell: "/bin/bash", groups: []uint32{1000, 45}}},
		{spec: "node", want: account{name: "node", uid: 1000, gid: 1001, home: "/home/node", shell: "/bin/sh", groups: []uint32{1001, 44, 45}}},
		{spec: "65532:65532", want: account{name: "65532", uid: 65532, gid: 65532, home: "/", shell: "/bin/sh"}},
		{spec: "65532", want: account{name: "65532", uid: 65532, home: "/", shell: "/bin/sh", groups: []uint32{0}}},
		{spec: "7", want: account{name: "7", uid: 70, gid: 70, home: "/seven", shell: "/bin/sh", groups: []uint32{70}}}, // a name first
		{spec: ":web", want: account{name: "root", gid: 44, home: "/root", shell: "/bin/ash"}},
		{spec: "nobody", err: `no user "nobody"`},
		{spec: "-1", err: `no user "-1"`},
		{spec: "4294967295", err: "no user"}, // to the kernel: leave it as it is
		{spec: "app:nogroup", err: `no group "nogroup"`},
		{spec: "app:", err: `no group ""`},
		{spec: "app:odd", err: `no group "odd"`},
		{spec: "odd", err: `"none"`},
	} {
		a, err := u.lookup(tt.spec)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("lookup(%q) = %+v, %v, want the error %q", tt.spec, a, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("lookup(%q): %v", tt.spec, err)
			continue
		}
		if a.name != tt.want.name || a.uid != tt.want.uid || a.gid != tt.want.gid || a.home != tt.want.home ||
			a.shell != tt.want.shell || !slices.Equal(a.groups, tt.want.groups) {
			t.Errorf("lookup(%q) = %+v, want %+v", tt.spec, *a, tt.want)
		}
	}

	// To the image, 1000 is the user that it has itself.
	if a, err := u.ofImage().lookup("1000"); err != nil || a.name != "node" {
		t.Errorf("the image's 1000: %+v, %v", a, err)
	}
	if a, err := u.ofImage().lookup("shed"); err != nil || a.name != "shed" || a.home != "/home/shed" {
		t.Errorf("the image's shed: %+v, %v", a, err)
	}
	alone := users{passwd: u.passwd[:3]}
	if a, err := alone.ofImage().lookup("1000"); err != nil || a.name != "shed" {
		t.Errorf("where nobody shares 1000: %+v, %v", a, err)
	}

	none, err := readUsers(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range []string{"root", "0"} {
		if a, err := none.lookup(spec); err != nil || a.name != "root" || a.home != "/root" || a.uid != 0 {
			t.Errorf("%q without a passwd: %+v, %v", spec, a, err)
		}
	}
}

func TestLookupUser(t *testing.T) {
	if a, err := lookupUser("root"); err != nil || a.uid != 0 || a.home == "" {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := lookupUser("no-such-user"); err == nil || !strings.Contains(err.Error(), "no-such-user") {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := lookupImageUser("no-such-user"); err == nil || !strings.Contains(err.Error(), "-u USER") {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestMergePath(t *testing.T) {
	for _, tt := range []struct{ login, image, want string }{
		{"/usr/bin:/bin", "/usr/local/go/bin:/usr/bin:/go/bin", "/usr/local/go/bin:/usr/bin:/bin:/go/bin"},
		{"/home/u/bin:/bin:/opt/x", "/opt/x:/bin:/opt/y", "/home/u/bin:/bin:/opt/x:/opt/y"},
		{"/home/u/bin:/usr/bin", "/venv/bin:/opt/x:/usr/bin:/usr/games", "/home/u/bin:/venv/bin:/opt/x:/usr/bin:/usr/games"},
		{"/home/u/bin", "/venv/bin:/usr/bin", "/home/u/bin:/venv/bin"},
		{"/usr/bin:/bin", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "/usr/bin:/bin"},
		{"/bin", "", "/bin"},
		{"/bin", "::/opt:/opt", "/opt:/bin"},
		{"", "/opt", "/opt"},
		{"/bin:", "/opt", "/opt:/bin:"}, // a login's own empty entry stays
	} {
		if got := mergePath(tt.login, tt.image); got != tt.want {
			t.Errorf("mergePath(%q, %q) = %q, want %q", tt.login, tt.image, got, tt.want)
		}
	}
}

func TestBaseEnv(t *testing.T) {
	a := &account{name: "u", home: "/home/u", shell: "/bin/sh"}
	image := []string{"HOME=/app", "PATH=/opt/bin:/bin", "A=b=c", "LANG=de_DE.UTF-8", "nonsense"}
	for ofImage, home := range map[bool]string{false: "/home/u", true: "/app"} {
		env := a.baseEnv(image, ofImage)
		for key, want := range map[string]string{"HOME": home, "USER": "u", "LOGNAME": "u", "SHELL": "/bin/sh", "PATH": "/opt/bin:/bin", "A": "b=c", "LANG": "de_DE.UTF-8"} {
			if got := env.get(key); got != want {
				t.Errorf("the image's user: %v: %s=%q, want %q", ofImage, key, got, want)
			}
		}
		if len(env) != 7 {
			t.Errorf("%q", env)
		}
	}
	if env := a.baseEnv(nil, false); env.get("PATH") != defaultPath || env.get("LANG") == "" {
		t.Errorf("without an image's: %q", env)
	}
}
