package sshd

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestWrongKey(t *testing.T) {
	ts := newTestServer(t)
	wrong, _ := ts.newKey("wrong")
	for _, user := range []string{"box", "nope"} {
		got := ts.run(ts.ssh(wrong, user, "127.0.0.1", "echo in"))
		if got.stdout != "" || got.code != 255 || got.stderr != user+"@127.0.0.1: Permission denied (publickey).\r\n" {
			t.Errorf("%s: %+v", user, got)
		}
	}
}

func TestKeyRemoved(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.keyCheck = 10 * time.Millisecond })
	if got := ts.box("echo in"); got.stdout != "in\n" {
		t.Fatalf("%+v", got)
	}
	open := ts.mustDial("box")
	before, err := os.Stat(ts.keyFile)
	if err != nil {
		t.Fatal(err)
	}
	// Another key in its place: neither the file's size nor its time tells.
	other := memoryKey(t)
	if err := os.WriteFile(ts.keyFile, ssh.MarshalAuthorizedKey(other.PublicKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(ts.keyFile, before.ModTime(), before.ModTime()); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(ts.keyFile); err != nil || after.Size() != before.Size() {
		t.Fatalf("the sizes differ: %v", err)
	}
	if got := ts.box("echo in"); got.stdout != "" || got.code != 255 {
		t.Errorf("%+v", got)
	}
	if c, err := ts.dial("box", other); err != nil {
		t.Errorf("the new key: %v", err)
	} else {
		c.Close()
	}
	open.Wait() // the server ends what is open
	if err := os.Remove(ts.keyFile); err != nil {
		t.Fatal(err)
	}
	if c, err := ts.dial("box", other); err == nil {
		c.Close()
		t.Error("in without a file")
	}
}

func TestKeyWithoutTerminal(t *testing.T) {
	ts := newTestServer(t)
	key := string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey()))
	for options, terminal := range map[string]bool{"restrict": false, "no-pty": false, "restrict,pty": true, `from="10.0.0.0/8,127.0.0.1",No-X11-Forwarding`: true} {
		ts.authorize(options + " " + key)
		if got := ts.box("echo in"); got.stdout != "in\n" {
			t.Errorf("%s: %+v", options, got)
		}
		if got := ts.box("tty", "-tt"); (got.code == 0) != terminal {
			t.Errorf("%s with a terminal: %+v", options, got)
		}
	}
}

func TestTooManyKeys(t *testing.T) {
	ts := newTestServer(t)
	var keys []ssh.Signer
	for range maxAuthTries {
		keys = append(keys, memoryKey(t))
	}
	if c, err := ts.dial("box", append(keys[1:], ts.signer)...); err != nil {
		t.Errorf("after %d wrong keys: %v", len(keys)-1, err)
	} else {
		c.Close()
	}
	if c, err := ts.dial("box", append(keys, ts.signer)...); err == nil {
		c.Close()
		t.Errorf("in after %d wrong keys", len(keys))
	}
}

// Connections that don't log in have a limit, at which the oldest makes room. Those that did don't count.
func TestHandshakeLimit(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.max = 2 })
	for range 4 {
		// The server takes the connection from those that count before it answers the session.
		s, err := ts.mustDial("box").NewSession()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
	}
	var mute []net.Conn
	for range 3 {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		mute = append(mute, conn)
	}
	io.Copy(io.Discard, mute[0]) // to its end
	c, err := ts.dial("box", ts.signer)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.Copy(io.Discard, mute[1])
}

func TestServeEndsWithListener(t *testing.T) {
	ts := newTestServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- ts.Serve(t.Context(), l) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	io.Copy(io.Discard, conn) // to the connection's end
}

// keyringOf returns a keyring with one file that holds text, and its log.
func keyringOf(t *testing.T, text string) (k *keyring, path string, logged *lockedBuffer) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", dir)
	path = filepath.Join(dir, "keys")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	logged = &lockedBuffer{}
	return newKeyring(AuthorizedKeys{Files: []string{path}}, slog.New(slog.NewTextHandler(logged, nil))), path, logged
}

func TestKeyLines(t *testing.T) {
	key := memoryKey(t).PublicKey()
	other := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(memoryKey(t).PublicKey())))
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	for _, c := range []struct {
		text string
		ok   bool
		log  string // what the log has to say; "" for nothing
	}{
		{line, true, ""},
		{line + "\r\n", true, ""},
		{"\n# comment\n  \n\t" + line + " a comment with spaces\n", true, ""},
		{other + "\n" + line, true, ""},
		{other, false, ""},
		{"", false, ""},
		{"garbage\n" + line, true, "keys:1"},
		{line + "\nssh-ed25519 AAAA!!!! me\n", true, "keys:2"},
		{"ssh-rsa " + strings.Fields(line)[1], false, "keys:1"},
		{`command="/bin/true" ` + line, true, ""},
		{`command="" ` + line, false, "command"},
		{`command="a",command="b" ` + line, false, "twice"},
		{`environment="A=B" ` + line, true, ""},
		{`environment="A-B=c" ` + line, false, "environment"},
		{"cert-authority " + line, false, ""}, // its certificates may log in
		{`principals="a" ` + line, false, "cert-authority"},
		{`restrict,permitopen="a:1",permitlisten="8080" ` + line, true, ""},
		{`permitopen="8080" ` + line, false, "permitopen"},
		{`permitopen="a:65536" ` + line, false, "permitopen"},
		{`permitlisten="[:1" ` + line, false, "permitlisten"},
		{`expiry-time="20200101" ` + line, false, "expired"},
		{`expiry-time="99991231235959Z" ` + line, true, ""},
		{`expiry-time="2020" ` + line, false, "no time"},
		{`tunnel="0" ` + line, false, "tunnel"},
		{`pty="x" ` + line, false, "pty"},
		{"verify-required " + line, false, "verify-required"},
		{`restrict="x" ` + line, false, "restrict"},
		{`from="127.0.0.1" ` + line, true, ""},
		{`from="::ffff:127.0.0.1" ` + line, true, ""},
		{`FROM="127.0.0.0/8,::1" ` + line, true, ""},
		{`from="10.0.0.1" ` + line, false, "address"},
		{`from="10.0.0.1" ` + line + "\n" + line, true, "keys:1"},
		{`from="127.0.0.1",from="10.0.0.1" ` + line, false, "twice"},
		{`from="!10.0.0.1,127.0.0.1" ` + line, true, ""},
		{`from="!127.0.0.1,127.0.0.0/8" ` + line, false, "address"},
		{`from="!127.0.0.*,127.0.0.0/8" ` + line, false, "address"},
		{`from="127.0.?.*" ` + line, true, ""},
		{`from="*" ` + line, true, ""},
		{`from="*.example.org" ` + line, false, "example.org"},
		{`from="" ` + line, false, "from"},
		{`from=127.0.0.1 ` + line, false, "quoted"},
		{`from ` + line, false, "from"},
		{`from="127.0.0.1 ` + line, false, "keys:1"},
	} {
		k, _, logged := keyringOf(t, c.text)
		_, err := k.authorize("box", local, key)
		if (err == nil) != c.ok || !strings.Contains(logged.String(), c.log) || (c.log == "") != (logged.String() == "") {
			t.Errorf("%q: %v; logged %s", c.text, err, logged)
		}
	}
}

func TestConfiguredKeys(t *testing.T) {
	key := memoryKey(t).PublicKey()
	logged := &lockedBuffer{}
	k := newKeyring(AuthorizedKeys{Lines: []string{"garbage", string(ssh.MarshalAuthorizedKey(key))}},
		slog.New(slog.NewTextHandler(logged, nil)))
	if _, err := k.authorize("box", &net.TCPAddr{}, key); err != nil {
		t.Error(err)
	}
	if !strings.Contains(logged.String(), "configured key 1") {
		t.Errorf("logged %s", logged)
	}
}

func TestKeyFileOfOthers(t *testing.T) {
	key := memoryKey(t).PublicKey()
	k, path, logged := keyringOf(t, string(ssh.MarshalAuthorizedKey(key)))
	try := func(what, reason string) {
		t.Helper()
		before := len(logged.String())
		for range 2 { // said once
			if _, err := k.authorize("box", &net.TCPAddr{}, key); (err == nil) != (reason == "") {
				t.Errorf("%s: %v", what, err)
			}
		}
		said := logged.String()[before:]
		if reason != "" && (strings.Count(said, "\n") != 1 || !strings.Contains(said, reason) || !strings.Contains(said, path)) {
			t.Errorf("%s: logged %s", what, said)
		}
	}
	chmod := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	try("fine", "")
	for _, mode := range []os.FileMode{0o620, 0o602} {
		chmod(path, mode)
		try(mode.String(), fmt.Sprintf("mode %04o", mode))
		chmod(path, 0o644)
		try("fine again", "")
	}
	chmod(filepath.Dir(path), 0o770)
	try("directory", "write the directory")
	chmod(filepath.Dir(path), 0o700)
	try("fine again", "")
	if err := os.Truncate(path, maxKeyFile+1); err != nil {
		t.Fatal(err)
	}
	try("too long", "longer than")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	try("directory instead of a file", "not a regular file")
}

func TestUsableKeys(t *testing.T) {
	line := func() string { return string(ssh.MarshalAuthorizedKey(memoryKey(t).PublicKey())) }
	dir := t.TempDir()
	file := func(name, text string, perm os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), perm); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, perm); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", dir)
	good := file("good", line()+"# comment\n"+`verify-required `+line(), 0o600)
	open := file("open", line(), 0o666)
	expired := file("expired", `expiry-time="20200101" `+line(), 0o600)
	principals := file("principals", `principals="box" `+line()+`cert-authority,principals="box" `+line(), 0o600)
	for name, tt := range map[string]struct {
		keys     AuthorizedKeys
		n        int
		problems []string
	}{
		"nothing": {},
		"no file": {keys: AuthorizedKeys{Files: []string{filepath.Join(dir, "none")}}},
		"lines":   {keys: AuthorizedKeys{Lines: []string{line(), line()}}, n: 2},
		"a file":  {keys: AuthorizedKeys{Files: []string{good}}, n: 1, problems: []string{good + ":3: the option"}},
		"of all":  {keys: AuthorizedKeys{Files: []string{open}}, problems: []string{open + ": group or others can write the file"}},
		"expired": {keys: AuthorizedKeys{Files: []string{expired}}, problems: []string{expired + ":1: the key has expired"}},
		"no authority": {keys: AuthorizedKeys{Files: []string{principals}}, n: 1,
			problems: []string{principals + ":1: the option principals is for certificates"}},
		"not yet expired": {keys: AuthorizedKeys{Lines: []string{`expiry-time="99991231" ` + line()}}, n: 1},
		"together":        {keys: AuthorizedKeys{Files: []string{good, open}, Lines: []string{line()}}, n: 2, problems: []string{good, open}},
	} {
		n, problems := tt.keys.Usable()
		ok := n == tt.n && len(problems) == len(tt.problems)
		for i := 0; ok && i < len(problems); i++ {
			ok = strings.HasPrefix(problems[i], tt.problems[i])
		}
		if !ok {
			t.Errorf("%s: %d, %q; want %d, %q", name, n, problems, tt.n, tt.problems)
		}
	}
}
