package userfile

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

// TestMain makes this program one that edits until it is killed, where a test runs it as that.
func TestMain(m *testing.M) {
	if path := os.Getenv("USERFILE_TEST_FILE"); path != "" {
		n, err := strconv.Atoi(os.Getenv("USERFILE_TEST_LINES"))
		for ; err == nil; n++ {
			err = Edit(context.Background(), path, to(numbered(n)))
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// numbered returns n lines that all say so.
func numbered(n int) string { return strings.Repeat(strconv.Itoa(n)+"\n", n) }

// to makes text of a file, whatever is in it.
func to(text string) func(File) ([]byte, error) {
	return func(File) ([]byte, error) { return []byte(text), nil }
}

func gone(File) ([]byte, error) { return nil, nil }

func edit(t *testing.T, path string, f func(File) ([]byte, error)) {
	t.Helper()
	if err := Edit(t.Context(), path, f); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// names returns what is in a directory.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
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
	path := filepath.Join(link, "a", "b", "config")
	edit(t, path, gone)
	want := errors.New("no")
	if err := Edit(t.Context(), path, func(File) ([]byte, error) { return []byte("x"), want }); err != want {
		t.Error(err)
	}
	if got := names(t, home); got != "" {
		t.Errorf("what changes nothing made %s", got)
	}
	edit(t, path, func(f File) ([]byte, error) {
		if f.Text != nil || f.Links != 0 {
			t.Errorf("%+v", f)
		}
		return []byte{}, nil
	})
	for file, want := range map[string]fs.FileMode{"a": 0o700 | fs.ModeDir, "a/b": 0o700 | fs.ModeDir, "a/b/config": 0o600} {
		if info, err := os.Stat(filepath.Join(home, file)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", file, info.Mode(), err)
		}
	}
	edit(t, path, func(f File) ([]byte, error) {
		if f.Text == nil || f.Path != filepath.Join(home, "a/b/config") {
			t.Errorf("%+v", f)
		}
		return nil, nil
	})
	if got := names(t, filepath.Join(home, "a/b")); got != "" {
		t.Errorf("left: %s", got)
	}
}

func TestLinks(t *testing.T) {
	for name, c := range map[string]struct {
		dirs   []string
		links  [][2]string // of them the first is what is edited
		file   string
		exists bool
	}{
		"relative":             {[]string{".ssh", "dotfiles"}, [][2]string{{".ssh/config", "../dotfiles/ssh"}}, "dotfiles/ssh", true},
		"dangling":             {[]string{".ssh", "dotfiles"}, [][2]string{{".ssh/config", "../dotfiles/ssh"}}, "dotfiles/ssh", false},
		"of a directory":       {[]string{"dotfiles/ssh"}, [][2]string{{".ssh", "dotfiles/ssh"}}, "dotfiles/ssh/config", true},
		"chain":                {[]string{".ssh", "a/b"}, [][2]string{{".ssh/config", "../a/one"}, {"a/one", "b/two"}}, "a/b/two", true},
		"over another's above": {[]string{".ssh", "a/b/c"}, [][2]string{{".ssh/config", "../short/../f"}, {"short", "a/b/c"}}, "a/b/f", true},
		"above a linked one":   {[]string{"dotfiles/ssh"}, [][2]string{{".ssh", "dotfiles/ssh"}, {"dotfiles/ssh/config", "../f"}}, "dotfiles/f", false},
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
				write(t, file, "old")
			}
			edit(t, path, to("new"))
			if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() || contents(t, path) != "new" {
				t.Errorf("%s: %v", file, err)
			}
			edit(t, path, gone)
			if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", file, err)
			}
			for _, link := range c.links {
				if to, err := os.Readlink(filepath.Join(home, link[0])); err != nil || to != link[1] {
					t.Errorf("the link became %q, %v", to, err)
				}
			}
		})
	}
}

func TestKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, "old")
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
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(filepath.Dir(path), tempPrefix+"1"), "of one that was killed")
	edit(t, path, func(f File) ([]byte, error) {
		if f.Links != 1 {
			t.Errorf("%d other names", f.Links)
		}
		return []byte("new"), nil
	})
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Sys().(*syscall.Stat_t), after.Sys().(*syscall.Stat_t)
	if after.Mode() != 0o640 || is.Uid != was.Uid || int(is.Gid) != gid || os.SameFile(before, after) {
		t.Errorf("%v, %d:%d", after.Mode(), is.Uid, is.Gid)
	}
	if got := contents(t, path) + " " + contents(t, path+".other"); got != "new old" {
		t.Error(got)
	}
	if got := names(t, filepath.Dir(path)); got != "config config.other" {
		t.Errorf("left: %s", got)
	}
	edit(t, path, to("new"))
	if info, err := os.Stat(path); err != nil || !os.SameFile(info, after) || info.ModTime() != after.ModTime() {
		t.Errorf("it was written though nothing changes; %v", err)
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		want string
	}{
		"directory":        {func(p string) error { return os.Mkdir(p, 0o700) }, "is a directory, not a file"},
		"pipe":             {func(p string) error { return syscall.Mkfifo(p, 0o600) }, "is a named pipe, not a file"},
		"device":           {func(p string) error { return os.Symlink("/dev/null", p) }, "is a device, not a file"},
		"read-only":        {func(p string) error { return os.WriteFile(p, []byte("old"), 0o400) }, "is read-only (mode 0400)"},
		"a link to itself": {func(p string) error { return os.Symlink("config", p) }, "leads to itself"},
		"a lost link":      {func(p string) error { return os.Symlink("nowhere/config", p) }, "no such file or directory"},
		"a file above": {func(p string) error {
			dir := filepath.Dir(p)
			return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600))
		}, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			home, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(home, ".ssh")
			path := filepath.Join(dir, "config")
			if err := errors.Join(os.Mkdir(dir, 0o700), c.make(path)); err != nil {
				t.Fatal(err)
			}
			before, berr := os.Lstat(path)
			err = Edit(t.Context(), path, to("new"))
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v", err)
			}
			after, aerr := os.Lstat(path)
			if (berr == nil) != (aerr == nil) || berr == nil && (!os.SameFile(before, after) || before.ModTime() != after.ModTime()) {
				t.Errorf("it changed: %v, %v", berr, aerr)
			}
			if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

// An editor saves the file, or removes it, while it is being changed.
func TestSomebodyElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	for _, theirs := range []func() error{
		func() error { return os.WriteFile(path, []byte("theirs"), 0o600) },
		func() error { return os.Remove(path) },
	} {
		write(t, path, "old")
		calls := 0
		err := Edit(t.Context(), path, func(File) ([]byte, error) {
			if calls++; calls == 1 {
				return []byte("new"), nil
			}
			return []byte("new"), theirs()
		})
		if shed.ErrorCode(err) != shed.CodeConflict {
			t.Error(err)
		}
		if text, err := os.ReadFile(path); err == nil && string(text) != "theirs" {
			t.Errorf("%q", text)
		}
	}
	if got := names(t, filepath.Dir(path)); got != "" {
		t.Errorf("left: %s", got)
	}
}

func TestConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "config")
	var editing sync.WaitGroup
	for range 20 {
		editing.Go(func() {
			err := Edit(t.Context(), path, func(f File) ([]byte, error) { return fmt.Append(f.Text, "x"), nil })
			if err != nil {
				t.Error(err)
			}
		})
	}
	editing.Wait()
	if got := contents(t, path); got != strings.Repeat("x", 20) {
		t.Errorf("%q", got)
	}
}

// One that waits for another ends when it is told to.
func TestLockEnds(t *testing.T) {
	dir := t.TempDir()
	unlock, err := Lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(5*lockPoll, cancel)
	if err := Edit(ctx, path, to("new")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	unlock()
	edit(t, path, to("new"))
}

// TestKilled kills what changes the file, over and over.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, "")
	for i := range 40 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "USERFILE_TEST_FILE="+path, "USERFILE_TEST_LINES="+strconv.Itoa(100*i+1))
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
		first, _, _ := strings.Cut(got, "\n")
		if n, err := strconv.Atoi(first); err != nil || got != numbered(n) {
			t.Fatalf("after a kill: %d bytes, %v", len(got), err)
		}
	}
	// What the last one that was killed has left goes with the next change.
	edit(t, path, to("x"))
	if got := names(t, filepath.Dir(path)); got != "config" {
		t.Errorf("left: %s", got)
	}
}
