package sshd

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// Whoever can write a directory on the way to a file can exchange the file, and so can who owns either.
func TestKeyFilePath(t *testing.T) {
	for name, tt := range map[string]struct {
		script string // makes .ssh/keys in the home directory, which is in a directory that all can write
		reason string // why it is refused; "" where it isn't
	}{
		"plain":               {"mkdir .ssh; echo keys >.ssh/keys", ""},
		"link":                {"mkdir .ssh real; echo keys >real/k; ln -s ../real/k .ssh/keys", ""},
		"absolute link":       {"mkdir .ssh real; echo keys >real/k; ln -s $PWD/real/k .ssh/keys", ""},
		"directory by a link": {"mkdir -p a/real; echo keys >a/real/keys; ln -s . a/b; ln -s ./a/b/../a//b/real/ .ssh", ""},
		"file of all":         {"mkdir .ssh; echo keys >.ssh/keys; chmod 666 .ssh/keys", "others can write the file HOME/.ssh/keys (mode 0666); chmod go-w HOME/.ssh/keys"},
		"directory of all":    {"mkdir -m 777 .ssh; echo keys >.ssh/keys", "others can write the directory HOME/.ssh (mode 0777); chmod go-w HOME/.ssh"},
		"directory of a group": {"mkdir -p a/.ssh; chmod 775 a; ln -s a/.ssh .ssh; echo keys >.ssh/keys",
			"others can write the directory HOME/a (mode 0775)"},
		"sticky directory": {"mkdir -m 1777 .ssh; echo keys >.ssh/keys", "others can write the directory HOME/.ssh (mode 1777); keep the keys elsewhere"},
		"link in a directory of all": {"mkdir -m 777 .ssh; mkdir real; echo keys >real/k; ln -s ../real/k .ssh/keys",
			"others can write the directory HOME/.ssh (mode 0777)"},
		"link to a link in one": {"mkdir .ssh real; mkdir -m 777 open; echo keys >real/k; ln -s ../real/k open/l; ln -s ../open/l .ssh/keys",
			"others can write the directory HOME/open (mode 0777)"},
		"directory by a link in one": {"mkdir real; mkdir -m 777 open; echo keys >real/keys; ln -s ../real open/l; ln -s open/l .ssh",
			"others can write the directory HOME/open (mode 0777)"},
		"home of a group":  {"mkdir .ssh; echo keys >.ssh/keys; chmod 770 .", "others can write the directory HOME (mode 0770)"},
		"outside the home": {"mkdir .ssh; echo keys >../keys; ln -s ../../keys .ssh/keys", "others can write the directory DIR (mode 0777); chmod go-w DIR"},
		"file of another":  {"mkdir .ssh; echo keys >.ssh/keys; chown 65534 .ssh/keys", "the file HOME/.ssh/keys belongs to user 65534"},
		"directory of another": {"mkdir .ssh; echo keys >.ssh/keys; chown 65534 .ssh",
			"the directory HOME/.ssh belongs to user 65534"},
		"link in a directory of another": {"mkdir .ssh real; echo keys >real/k; ln -s ../real/k .ssh/keys; chown 65534 .ssh",
			"the directory HOME/.ssh belongs to user 65534"},
		"circle":                   {"mkdir .ssh; ln -s keys .ssh/keys", "HOME/.ssh/keys is one of more than 40 links"},
		"no directory":             {"echo keys >.ssh", "HOME/.ssh is not a directory"},
		"directory, and no file":   {"mkdir -p .ssh/keys", "HOME/.ssh/keys is not a regular file"},
		"FIFO":                     {"mkdir .ssh; mkfifo .ssh/keys", "HOME/.ssh/keys is not a regular file"},
		"link to what isn't there": {"mkdir .ssh; ln -s none .ssh/keys", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(tt.script, "chown") && os.Getuid() != 0 {
				t.Skip("NOT TESTED: only root can give files away")
			}
			dir, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			home := filepath.Join(dir, "home")
			t.Setenv("HOME", home)
			cmd := exec.Command("sh", "-ec", "umask 022; chmod 777 .; mkdir home; cd home; "+tt.script)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			text, err := readKeyFile(filepath.Join(home, ".ssh", "keys"))
			switch {
			case tt.reason == "":
				if string(text) != "keys\n" || err != nil {
					t.Errorf("%q, %v", text, err)
				}
			case text != nil || err == nil || !strings.Contains(err.Error(), strings.NewReplacer("HOME", home, "DIR", dir).Replace(tt.reason)):
				t.Errorf("%q, %v", text, err)
			}
		})
	}
	if _, err := readKeyFile("/etc/passwd"); err != nil { // root's, and so is all above it
		t.Error(err)
	}
}

// While a file can't be read, it lets nobody in, but what it has let in stays.
func TestNoFilesForKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newClockedServer(t)
		k, path, logged := keyringOf(t, string(ssh.MarshalAuthorizedKey(cs.user.PublicKey())))
		cs.keys = k
		_, _, requests := cs.start(t)
		go ssh.DiscardRequests(requests)
		rounds := func() {
			time.Sleep(10 * missing * cs.keyCheck)
			cs.lives(t)
		}
		rounds()
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		none := limit
		none.Cur = 0
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
			t.Fatal(err)
		}
		defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
		rounds()
		if _, err := k.authorize("box", &net.TCPAddr{}, cs.user.PublicKey()); err == nil {
			t.Error("let in although the file can't be read")
		}
		if !strings.Contains(logged.String(), "too many open files") {
			t.Errorf("logged %s", logged)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		rounds()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		<-cs.sheds.ended
	})
	for err, want := range map[error]bool{
		syscall.ENFILE: true, syscall.ENOMEM: true, syscall.EIO: true, syscall.ESTALE: true,
		syscall.ENOENT: false, syscall.EACCES: false, errors.New("refused"): false, nil: false,
	} {
		if err != nil {
			err = &fs.PathError{Op: "open", Path: "keys", Err: err}
		}
		if isPassing(err) != want {
			t.Errorf("%v", err)
		}
	}
}
