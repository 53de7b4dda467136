//go:build linux

package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

func TestReplaceIfOther(t *testing.T) {
	dir := t.TempDir()
	target, file := dir+"/target", dir+"/file"
	if err := os.WriteFile(target, []byte("outside"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, file); err != nil {
		t.Fatal(err)
	}
	check := func(what string) {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil || string(b) != "new" {
			t.Errorf("%s: %q, %v", what, b, err)
		}
	}
	if err := replaceIfOther(file, "new"); err != nil {
		t.Fatal(err)
	}
	check("a link")
	if b, err := os.ReadFile(target); err != nil || string(b) != "outside" {
		t.Errorf("what the link led to: %q, %v", b, err)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := replaceIfOther(file, "new"); err != nil {
		t.Fatal(err)
	}
	check("the same content")
	if after, err := os.Stat(file); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Error("it was written though it had the content")
	}
	if err := os.WriteFile(file, []byte("older and longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceIfOther(file, "new"); err != nil {
		t.Fatal(err)
	}
	check("another content")
}

// On a full disk a file stays as it is.
func TestReplaceIfOtherOnFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: a full disk. Only root can mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	old := strings.Repeat("10.0.0.1 somewhere.example.com\n", 200)
	if err := os.WriteFile(dir+"/hosts", []byte(old), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/full", make([]byte, 64<<10), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	if err := replaceIfOther(dir+"/hosts", strings.Repeat(old, 2)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	if b, err := os.ReadFile(dir + "/hosts"); err != nil || string(b) != old {
		t.Errorf("%d bytes of %d are left (%v)", len(b), len(old), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestWriteIdentity(t *testing.T) {
	s := agent.Setup{Hostname: "web", Network: agent.Network{DNS: "192.0.2.1"}}
	const ours = "nameserver 192.0.2.1\n"
	for name, tt := range map[string]struct {
		link, content string // of /etc/resolv.conf
		at            string // the file that is looked at then
		want          string
	}{
		"none":                     {at: "root/etc/resolv.conf", want: ours},
		"the user's":               {content: "nameserver 9.9.9.9\n", at: "root/etc/resolv.conf", want: "nameserver 9.9.9.9\n"},
		"to resolved's":            {link: "../run/systemd/resolve/stub-resolv.conf", at: "run/systemd/resolve/stub-resolv.conf", want: ours},
		"to it from the top":       {link: "/run/systemd/resolve/stub-resolv.conf", at: "run/systemd/resolve/stub-resolv.conf", want: ours},
		"to it by way of /var/run": {link: "/var/run/resolv.conf", at: "run/resolv.conf", want: ours},
		"to elsewhere":             {link: "/mnt/resolv.conf", at: "root/mnt/resolv.conf"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := errors.Join(os.MkdirAll(dir+"/root/etc", 0o755), os.Mkdir(dir+"/run", 0o755)); err != nil {
				t.Fatal(err)
			}
			conf := dir + "/root/etc/resolv.conf"
			if tt.link != "" {
				if err := os.Symlink(tt.link, conf); err != nil {
					t.Fatal(err)
				}
			} else if tt.content != "" {
				if err := os.WriteFile(conf, []byte(tt.content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // boots
				if err := writeIdentity(dir+"/root", dir+"/run", s); err != nil {
					t.Fatal(err)
				}
			}
			if b, err := os.ReadFile(filepath.Join(dir, tt.at)); string(b) != tt.want || tt.want != "" && err != nil {
				t.Errorf("%s: %q, %v; want %q", tt.at, b, err, tt.want)
			}
			if got, err := os.Readlink(conf); tt.link != "" && (got != tt.link || err != nil) {
				t.Errorf("the link leads to %q now (%v)", got, err)
			}
			for file, want := range map[string]string{
				"hostname": "web\n", "hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tweb\n",
			} {
				if b, err := os.ReadFile(dir + "/root/etc/" + file); err != nil || string(b) != want {
					t.Errorf("%s: %q, %v", file, b, err)
				}
			}
		})
	}
}

// The clock follows the host's where it is far off, but not a time that was told long ago.
func TestClockIsOff(t *testing.T) {
	m := &machine{}
	for i, tt := range []struct {
		told time.Duration // after the machine's own time
		want bool
	}{
		{0, false}, {100 * time.Millisecond, false}, {-100 * time.Millisecond, false},
		{time.Hour, true},   // the host slept
		{-time.Hour, false}, // it came late
		{0, false},
		{-time.Hour, false},
		{-time.Hour, true}, // the host's clock was set back
		{24 * time.Hour, true},
		{-time.Hour, false},
	} {
		if got := m.clockIsOff(agent.Clock{UnixNano: time.Now().Add(tt.told).UnixNano()}); got != tt.want {
			t.Errorf("%d: told %v: %v", i, tt.told, got)
		}
	}
}

func TestLoginEnvironmentOfNoisyProfiles(t *testing.T) {
	home := t.TempDir()
	a := &account{name: "root", home: home, shell: "/bin/sh"}
	m := &machine{}
	ask := func(profile string) (environ, error) {
		t.Helper()
		if err := os.WriteFile(home+"/.profile", []byte(profile), 0o644); err != nil {
			t.Fatal(err)
		}
		return m.askLoginShell(a, a.baseEnv(nil, false))
	}
	// What it leaves running has the output still.
	env, err := ask("export MINE=1; sleep 1000 & echo $! >" + home + "/pid")
	if err != nil || env.get("MINE") != "1" {
		t.Errorf("%q, %v", env, err)
	}
	var pid int
	if b, err := os.ReadFile(home + "/pid"); err != nil {
		t.Error(err)
	} else if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Error(err)
	} else if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if env, err := ask("head -c 100000000 /dev/zero"); err == nil {
		t.Errorf("100 MB of noise were taken, and then %q", env)
	}
}
