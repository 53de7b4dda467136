//go:build linux

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pkg/sftp"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// nobody is a user that no system gives rights to.
var nobody = &account{name: "nobody", home: "/", uid: 65534, gid: 65534, groups: []uint32{65534}}

// openDir returns a directory that nobody owns, in directories that all can enter.
func openDir(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: the agent runs as root, and so must this test")
	}
	dir, err := os.MkdirTemp("", "shed")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, int(nobody.uid), int(nobody.gid)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDoAsUser(t *testing.T) {
	dir := openDir(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 50 { // on whatever threads
		err := nobody.do(func() error {
			if _, err := os.Open(secret); !errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("opening a file of root: %v", err)
			}
			return os.WriteFile(dir+"/own", nil, 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadFile(secret); err != nil {
			t.Fatalf("the process lost its own rights: %v", err)
		}
	}
	fi, err := os.Stat(dir + "/own")
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); st.Uid != nobody.uid || st.Gid != nobody.gid {
		t.Errorf("the file is %d:%d's", st.Uid, st.Gid)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil || !strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
		t.Errorf("the process's user: %v\n%s", err, status)
	}
}

func TestListenUnix(t *testing.T) {
	dir := openDir(t)
	check := func(path, mode string) {
		t.Helper()
		fi, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); st.Uid != nobody.uid || fi.Mode().String() != mode {
			t.Errorf("%s: %v, of %d", path, fi.Mode(), st.Uid)
		}
	}
	for _, path := range []string{dir + "/s", ""} {
		l, err := nobody.listenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		if path == "" {
			path = l.Addr().String()
			check(filepath.Dir(path), "drwx------")
			defer func() {
				if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("its directory: %v", err)
				}
			}()
		}
		check(path, "Srw-------")
		if _, err := nobody.listenUnix(path); err == nil {
			t.Error("it listens twice")
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after its end: %v", err)
		}
	}
	// The umask of the process is as it was.
	if err := os.WriteFile(dir+"/plain", nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(dir + "/plain"); err != nil || fi.Mode().Perm() == 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}

	if err := nobody.do(func() error {
		stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/stale", Net: "unix"})
		if err != nil {
			return err
		}
		stale.SetUnlinkOnClose(false)
		return stale.Close()
	}); err != nil {
		t.Fatal(err)
	}
	l, err := nobody.listenUnix(dir + "/stale")
	if err != nil {
		t.Fatalf("in the place of a stale socket: %v", err)
	}
	l.Close()

	for _, path := range []string{dir + "/plain", "/root/s", dir + "/none/s", dir + "/" + strings.Repeat("x", 200)} {
		if l, err := nobody.listenUnix(path); err == nil {
			l.Close()
			t.Errorf("it listens on %s", path)
		}
	}
	if _, err := os.Stat(dir + "/plain"); err != nil {
		t.Error(err)
	}
}

func TestForwardRequests(t *testing.T) {
	c := newShed(t)
	request := func(req agent.Request) (*agent.Stream, error) {
		t.Helper()
		s, err := c.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s, agent.Call(t.Context(), s, req)
	}
	listener, err := request(agent.Request{Listen: &shed.Endpoint{Network: "tcp", Address: "127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	var on agent.Listening
	if err := agent.ReadMessage(listener, &on); err != nil {
		t.Fatal(err)
	}
	out, err := request(agent.Request{Dial: &shed.Endpoint{Network: "tcp", Address: on.Address}})
	if err != nil {
		t.Fatal(err)
	}
	var m agent.Accepted
	if err := agent.ReadMessage(listener, &m); err != nil {
		t.Fatal(err)
	}
	in, err := request(agent.Request{Dial: &shed.Endpoint{Network: "accepted", Address: m.ID}})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("data "), 500_000)
	go func() {
		out.Write(data)
		out.CloseWrite()
	}()
	if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	io.WriteString(in, "answer")
	in.CloseWrite()
	if got, err := io.ReadAll(out); string(got) != "answer" || err != nil {
		t.Errorf("%q, %v", got, err)
	}

	for _, req := range []agent.Request{
		{Dial: &shed.Endpoint{Network: "accepted", Address: m.ID}}, // no more
		{Dial: &shed.Endpoint{Network: "unix", Address: t.TempDir() + "/none"}},
		{Dial: &shed.Endpoint{Network: "udp", Address: "127.0.0.1:1"}},
		{Dial: &shed.Endpoint{}},
		{Listen: &shed.Endpoint{Network: "tcp", Address: on.Address}},
		{Listen: &shed.Endpoint{Network: "accepted"}},
	} {
		if _, err := request(req); err == nil {
			t.Errorf("%+v was granted", req)
		}
	}
	listener.Close()
	for {
		s, err := request(agent.Request{Dial: &shed.Endpoint{Network: "tcp", Address: on.Address}})
		if err != nil {
			break
		}
		s.Close()
	}
}

// Files are served by a process with the user's rights, which starts in the home.
func TestSFTP(t *testing.T) {
	dir := openDir(t)
	if err := os.WriteFile(dir+"/mine", []byte("contents"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, newShed(t), shed.Command{Subsystem: shed.SubsystemSFTP, User: "nobody"})
	c, err := sftp.NewClientPipe(p.Stdout(), p.Stdin())
	if err != nil {
		t.Fatal(err)
	}
	u, err := lookupUser("nobody")
	if err != nil {
		t.Fatal(err)
	}
	if wd, err := c.Getwd(); err != nil || wd != u.workDir("") {
		t.Errorf("it starts in %s, %v", wd, err)
	}
	f, err := c.Open(dir + "/mine")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(f); string(b) != "contents" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if f, err := c.Create(dir + "/mine"); err == nil {
		f.Close()
		t.Error("a file of root was overwritten")
	}
	if err := c.Mkdir(dir + "/new"); err != nil {
		t.Error(err)
	}
	p.Stdin().Close()
	go io.Copy(io.Discard, p.Stderr())
	if status, err := p.Wait(); status.Code != 0 || err != nil {
		t.Errorf("%+v, %v", status, err)
	}
	c.Close()
}
