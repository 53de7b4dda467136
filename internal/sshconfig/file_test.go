package sshconfig

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// TestMain makes this program one that installs and uninstalls until it is killed, where a test runs it as that.
func TestMain(m *testing.M) {
	if path := os.Getenv("SSHCONFIG_TEST_FILE"); path != "" {
		hosts := many()
		i, err := strconv.Atoi(os.Getenv("SSHCONFIG_TEST_HOSTS"))
		for ; err == nil; i++ {
			_, err = Apply(context.Background(), path, set(hosts[:i%len(hosts)]...))
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func many() []Host {
	var hosts []Host
	for i := range 50 {
		h, err := NewHost("home", fmt.Sprintf("n%d", i), Address{Host: "127.0.0.1", Port: 2222, KnownHosts: "/k"})
		if err != nil {
			panic(err)
		}
		hosts = append(hosts, h)
	}
	return hosts
}

func TestNoFile(t *testing.T) {
	home, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "home") // as where /home is a link
	if err := os.Symlink(home, link); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(link, ".ssh", "config")
	if c := apply(t, path, set()); c.Changed() {
		t.Errorf("uninstalled from nothing: %s", c.Diff())
	}
	if c, err := Plan(path, set(host(t, "a", "web"))); err != nil || !strings.HasPrefix(c.Diff(), "--- /dev/null\n+++ "+path+"\n@@ -0,0 +1,") {
		t.Errorf("%v, %s", err, c.Diff())
	}
	if _, err := os.Stat(filepath.Join(home, ".ssh")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what changes nothing made something: %v", err)
	}
	c := apply(t, path, set(host(t, "a", "web")))
	for file, want := range map[string]fs.FileMode{"": 0o700 | fs.ModeDir, "config": 0o600} {
		if info, err := os.Stat(filepath.Join(home, ".ssh", file)); err != nil || info.Mode() != want {
			t.Errorf("%q: %v, %v", file, info.Mode(), err)
		}
	}
	if c.File != filepath.Join(home, ".ssh", "config") || c.Before != nil || contents(t, path) != string(c.After) {
		t.Errorf("%+v", c)
	}
	apply(t, path, plus(host(t, "a", "api")))
	if c := apply(t, path, set()); c.After != nil || !strings.Contains(c.Diff(), "\n+++ /dev/null\n") {
		t.Errorf("uninstalled: %q", c.Diff())
	}
	if left, err := os.ReadDir(filepath.Join(home, ".ssh")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// What the user has added meanwhile stays.
	apply(t, path, set(host(t, "a", "web")))
	write(t, path, contents(t, path)+"Port 1\n")
	apply(t, path, set())
	if got := contents(t, path); got != "Port 1\n" {
		t.Errorf("%q", got)
	}
}

func TestLinks(t *testing.T) {
	web := host(t, "a", "web")
	for name, c := range map[string]struct {
		dirs   []string
		links  [][2]string // of them the first is what ssh reads
		file   string
		exists bool
	}{
		"relative":             {[]string{".ssh", "dotfiles"}, [][2]string{{".ssh/config", "../dotfiles/ssh"}}, "dotfiles/ssh", true},
		"dangling":             {[]string{".ssh", "dotfiles"}, [][2]string{{".ssh/config", "../dotfiles/ssh"}}, "dotfiles/ssh", false},
		"of a directory":       {[]string{"dotfiles/ssh"}, [][2]string{{".ssh", "dotfiles/ssh"}}, "dotfiles/ssh/config", true},
		"chain":                {[]string{".ssh", "a/b"}, [][2]string{{".ssh/config", "../a/one"}, {"a/one", "b/two"}}, "a/b/two", true},
		"over another's above": {[]string{".ssh", "a/b/c"}, [][2]string{{".ssh/config", "../short/../f"}, {"short", "a/b/c"}}, "a/b/f", true},
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			for _, dir := range c.dirs {
				if err := os.MkdirAll(filepath.Join(home, dir), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for _, link := range c.links {
				if err := os.Symlink(link[1], filepath.Join(home, link[0])); err != nil {
					t.Fatal(err)
				}
			}
			file, path := filepath.Join(home, c.file), filepath.Join(home, ".ssh/config")
			if c.exists {
				write(t, file, "Port 1\n")
			}
			apply(t, path, set(web))
			hasLines(t, sshSays(t, path, "shed-web"), "user web")
			if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
				t.Errorf("%s: %v", file, err)
			}
			for _, link := range c.links {
				if to, err := os.Readlink(filepath.Join(home, link[0])); err != nil || to != link[1] {
					t.Errorf("the link became %q, %v", to, err)
				}
			}
			apply(t, path, set())
			if _, err := os.Stat(file); (err == nil) != c.exists {
				t.Errorf("after uninstall: %v", err)
			} else if c.exists && contents(t, file) != "Port 1\n" {
				t.Errorf("after uninstall: %q", contents(t, file))
			}
		})
	}
	loop := filepath.Join(t.TempDir(), "config")
	if err := os.Symlink("config", loop); err != nil {
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), loop, set(web)); err == nil || !strings.Contains(err.Error(), "leads to itself") {
		t.Errorf("loop: %v", err)
	}
	lost := filepath.Join(t.TempDir(), "config")
	if err := os.Symlink("nowhere/config", lost); err != nil {
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), lost, set(web)); shed.ErrorCode(err) != shed.CodeInvalid || shed.ErrorHint(err) == "" {
		t.Errorf("a link to a directory that isn't there: %v", err)
	}
}

func TestKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, "Port 1\n")
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	gid := os.Getegid()
	if os.Geteuid() == 0 { // who alone can give files away
		gid = 12345
		if err := os.Chown(path, 12345, gid); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(path, path+".other"); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(path)
	leftover := filepath.Join(filepath.Dir(path), tempPrefix+"1")
	write(t, leftover, "of one that was killed")
	c := apply(t, path, set(host(t, "a", "web")))
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Sys().(*syscall.Stat_t), after.Sys().(*syscall.Stat_t)
	if after.Mode() != 0o640 || is.Uid != was.Uid || int(is.Gid) != gid || os.SameFile(before, after) {
		t.Errorf("%v, %d:%d", after.Mode(), is.Uid, is.Gid)
	}
	if c.Links != 1 || contents(t, path+".other") != "Port 1\n" {
		t.Errorf("%d other links: %q", c.Links, contents(t, path+".other"))
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if again := apply(t, path, set(host(t, "a", "web"))); again.Changed() {
		t.Error("changed again")
	} else if info, _ := os.Stat(path); !os.SameFile(info, after) || info.ModTime() != after.ModTime() {
		t.Error("it was written though nothing changes")
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		want string
	}{
		"directory": {func(p string) error { return os.Mkdir(p, 0o700) }, "is a directory, not a file"},
		"pipe":      {func(p string) error { return syscall.Mkfifo(p, 0o600) }, "is a named pipe, not a file"},
		"device":    {func(p string) error { return os.Symlink("/dev/null", p) }, "is a device, not a file"},
		"BOM":       {func(p string) error { return os.WriteFile(p, []byte("\xef\xbb\xbfPort 1\n"), 0o600) }, "byte order mark"},
		"UTF-16":    {func(p string) error { return os.WriteFile(p, []byte("\xff\xfeP\x00"), 0o600) }, "byte order mark"},
		"read-only": {func(p string) error { return os.WriteFile(p, []byte("Port 1\n"), 0o400) }, "is read-only (mode 0400)"},
		"a file above": {func(p string) error {
			dir := filepath.Dir(p)
			return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600))
		}, "not a directory"},
		"no home": {func(p string) error { return os.RemoveAll(filepath.Dir(filepath.Dir(p))) }, "no such file or directory"},
	} {
		t.Run(name, func(t *testing.T) {
			home := filepath.Join(t.TempDir(), "home")
			path := filepath.Join(home, ".ssh", "config")
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), c.make(path)); err != nil {
				t.Fatal(err)
			}
			before, berr := os.Lstat(path)
			_, err := Apply(t.Context(), path, set(host(t, "a", "web")))
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), c.want) || shed.ErrorHint(err) == "" {
				t.Errorf("%v; hint: %s", err, shed.ErrorHint(err))
			}
			after, aerr := os.Lstat(path)
			if (berr == nil) != (aerr == nil) || berr == nil && (!os.SameFile(before, after) || before.ModTime() != after.ModTime()) {
				t.Errorf("it changed: %v, %v", berr, aerr)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), tempPrefix+"*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestEditFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".ssh", "config")
	want := errors.New("no")
	if _, err := Apply(t.Context(), path, func([]Host) ([]Host, error) { return nil, want }); !errors.Is(err, want) {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestSomebodyElse has an editor save the file while it is being changed.
func TestSomebodyElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, "Port 1\n")
	c, err := Plan(path, set(host(t, "a", "web")))
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, "Port 2\n")
	if err := c.commit(path); shed.ErrorCode(err) != shed.CodeConflict {
		t.Error(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := c.commit(path); shed.ErrorCode(err) != shed.CodeConflict {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".ssh", "config")
	var wg sync.WaitGroup
	for i := range 20 {
		h := host(t, "a", fmt.Sprintf("n%d", i))
		wg.Go(func() {
			if _, err := Apply(t.Context(), path, plus(h)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	c, err := Plan(path, func(installed []Host) ([]Host, error) { return installed, nil })
	if err != nil || len(c.Hosts) != 20 || c.Changed() {
		t.Errorf("%d hosts, %v:\n%s", len(c.Hosts), err, c.After)
	}
}

// TestLockEnds has one that waits for another end when it is told to.
func TestLockEnds(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(5*lockPoll, cancel)
	if _, err := Apply(ctx, filepath.Join(dir, "config"), set(host(t, "a", "web"))); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	unlock()
	apply(t, filepath.Join(dir, "config"), set(host(t, "a", "web")))
}

// TestKilled kills what changes the file, over and over.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	const rest = "Port 1\nHost other\n"
	write(t, path, rest)
	states := map[string]bool{}
	for i, hosts := 0, many(); i < len(hosts); i++ {
		states[string(document{text: []byte(rest)}.with(hosts[:i]))] = true
	}
	seen := map[string]bool{}
	for i := range 40 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SSHCONFIG_TEST_FILE="+path, "SSHCONFIG_TEST_HOSTS="+strconv.Itoa(i+1))
		var stderr strings.Builder
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			cmd.Wait()
			close(ended)
		}()
		for last := contents(t, path); contents(t, path) == last; { // until it is at it
			select {
			case <-ended:
				t.Fatal(stderr.String())
			case <-time.After(100 * time.Microsecond):
			}
		}
		time.Sleep(time.Duration(i) * 300 * time.Microsecond)
		cmd.Process.Kill()
		<-ended
		if stderr.Len() > 0 {
			t.Fatal(stderr.String())
		}
		got := contents(t, path)
		if !states[got] {
			t.Fatalf("after a kill:\n%s", got)
		}
		seen[got] = true
	}
	if len(seen) < 20 {
		t.Errorf("only %d states were seen", len(seen))
	}
	// What the last one that was killed has left goes with the next change.
	apply(t, path, set(host(t, "a", "web")))
	apply(t, path, set())
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 1 || contents(t, path) != rest {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct{ before, after, want string }{
		{"a\nb\nc\n", "a\nx\ny\nc\n", "--- f\n+++ f\n@@ -2,1 +2,2 @@\n-b\n+x\n+y\n"},
		{"c\n", "x\nc\n", "--- f\n+++ f\n@@ -0,0 +1,1 @@\n+x\n"},
		{"x\nx\nc", "x\nc", "--- f\n+++ f\n@@ -2,1 +1,0 @@\n-x\n"},
		{"a", "a\n", "--- f\n+++ f\n@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n"},
		{"a\n", "a\n", ""},
	} {
		if got := (Change{File: "f", Before: []byte(c.before), After: []byte(c.after)}).Diff(); got != c.want {
			t.Errorf("%q to %q: %q", c.before, c.after, got)
		}
	}
}
