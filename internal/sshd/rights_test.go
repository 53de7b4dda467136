package sshd

import (
	"bytes"
	"crypto/rand"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestPermits(t *testing.T) {
	for _, c := range []struct {
		options      string
		open, listen []hostPort
		not          []hostPort // neither
	}{
		{"", []hostPort{{"a", 1}}, []hostPort{{"", 0}}, nil},
		{"restrict", nil, nil, []hostPort{{"a", 1}, {"localhost", 80}}},
		{"restrict,port-forwarding", []hostPort{{"a", 1}}, []hostPort{{"a", 1}}, nil},
		{"port-forwarding,restrict", nil, nil, []hostPort{{"a", 1}}},
		{`permitopen="a:1",permitopen="*:2",permitopen="[::1]:*",permitlisten="9"`, []hostPort{{"a", 1}, {"A", 1}, {"b", 2}, {"::1", 7}}, []hostPort{{"x", 9}}, []hostPort{{"a", 3}, {"b", 1}, {"", 8}}},
		{`permitlisten="127.0.0.*:80",permitopen="no*:1"`, []hostPort{{"no*", 1}}, []hostPort{{"127.0.0.7", 80}}, []hostPort{{"127.0.1.7", 80}, {"none", 1}}},
	} {
		var e authorizedKey
		for option := range strings.FieldsFuncSeq(c.options, func(r rune) bool { return r == ',' }) { // no value has one
			if err := e.apply(option); err != nil {
				t.Fatalf("%s: %v", option, err)
			}
		}
		for _, h := range c.open {
			if !e.mayOpen(h.host, h.port) {
				t.Errorf("%s: %v can't be opened", c.options, h)
			}
		}
		for _, h := range c.listen {
			if !e.mayListen(h.host, h.port) {
				t.Errorf("%s: %v can't be listened on", c.options, h)
			}
		}
		for _, h := range c.not {
			if e.mayOpen(h.host, h.port) || e.mayListen(h.host, h.port) {
				t.Errorf("%s: %v is permitted", c.options, h)
			}
		}
	}
}

func TestForwardingRights(t *testing.T) {
	dir := socketDir(t)
	tcp, unix := echoServer(t, "tcp", "127.0.0.1:0"), echoServer(t, "unix", dir+"/echo")
	ts := newTestServer(t)
	key := string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey()))
	for _, c := range []struct {
		options                        string
		tcp, unix, listen, listenOnAny bool
	}{
		{"", true, true, true, true},
		{"no-port-forwarding ", false, false, false, false},
		{"restrict ", false, false, false, false},
		{`permitopen="` + tcp.String() + `",permitlisten="localhost:0" `, true, false, true, false},
		{`permitopen="127.0.0.1:1" `, false, false, true, true},
	} {
		ts.authorize(c.options + key)
		client := ts.mustDial("box")
		try := func(what string, want bool, f func() error) {
			t.Helper()
			err := f()
			var refused *ssh.OpenChannelError
			if (err == nil) != want || errors.As(err, &refused) && refused.Reason != ssh.Prohibited {
				t.Errorf("%s%s: %v", c.options, what, err)
			}
		}
		for _, addr := range []net.Addr{tcp, unix} {
			try(addr.Network(), map[string]bool{"tcp": c.tcp, "unix": c.unix}[addr.Network()], func() error {
				conn, err := client.Dial(addr.Network(), addr.String())
				if err == nil {
					conn.Close()
				}
				return err
			})
		}
		listen := func(name string, payload any) func() error {
			return func() error {
				ok, _, err := client.SendRequest(name, true, ssh.Marshal(payload))
				if err == nil && !ok {
					err = errors.New("refused")
				}
				return err
			}
		}
		try("listen", c.listen, listen("tcpip-forward", hostPortPayload{"localhost", 0}))
		try("listen on any", c.listenOnAny, listen("tcpip-forward", hostPortPayload{"", 0}))
		try("listen on a socket", c.listenOnAny, listen("streamlocal-forward@openssh.com", struct{ Path string }{filepath.Join(dir, rand.Text())}))
		client.Close()
	}
}

func TestSubsystem(t *testing.T) {
	ts := newTestServer(t)
	if got := ts.run(ts.ssh(ts.ident, "box", "-s", "127.0.0.1", "sftp")); got != (result{"subsystem sftp\n", "", 0}) {
		t.Errorf("%+v", got)
	}
	if got := ts.run(ts.ssh(ts.ident, "box", "-s", "127.0.0.1", "netconf")); got.code == 0 || !strings.Contains(got.stderr, "subsystem request failed") {
		t.Errorf("%+v", got)
	}
}

func TestForcedCommand(t *testing.T) {
	ts := newTestServer(t)
	key := string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey()))
	ts.authorize(`environment="FROM_KEY=k",command="echo \"forced: $SSH_ORIGINAL_COMMAND, $FROM_KEY $LC_X $BASH_ENV\"" ` + key)
	for _, args := range [][]string{
		{"127.0.0.1", "echo asked"}, {"127.0.0.1"}, {"-s", "127.0.0.1", "sftp"},
	} {
		cmd := ts.ssh(ts.ident, "box", append([]string{"-o", "SetEnv=LC_X=lc BASH_ENV=evil FROM_KEY=other"}, args...)...)
		want := "forced: " + strings.Join(args[max(len(args)-1, 1):], "") + ", k lc \n"
		if got := ts.run(cmd); got.stdout != want || got.code != 0 {
			t.Errorf("%q: %+v, want %q", args, got, want)
		}
	}
	ts.authorize(`command="internal-sftp" ` + key)
	if got := ts.box("echo asked"); got.stdout != "subsystem sftp\n" {
		t.Errorf("internal-sftp: %+v", got)
	}
}

// What a key may do follows its line while its connections are open.
func TestRightsChange(t *testing.T) {
	echo := echoServer(t, "tcp", "127.0.0.1:0")
	ts := newTestServer(t, func(s *Server) { s.keyCheck = 10 * time.Millisecond })
	key := string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey()))
	client := ts.mustDial("box")
	await := func(want bool) {
		t.Helper()
		for {
			conn, err := client.Dial("tcp", echo.String())
			if err == nil {
				conn.Close()
			}
			if (err == nil) == want {
				return
			}
		}
	}
	await(true)
	ts.authorize("restrict " + key)
	await(false)
	ts.authorize("restrict,port-forwarding " + key)
	await(true)
	ts.authorize(`expiry-time="` + time.Now().UTC().Add(2*time.Second).Format("20060102150405Z") + `" ` + key)
	client.Wait() // until the key has expired
}

func TestCertificates(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = time.Hour })
	_, ca := ts.newKey("ca")
	caKey := string(ssh.MarshalAuthorizedKey(ca.PublicKey()))
	user, _ := ts.newKey("user")
	sign := func(args ...string) {
		t.Helper()
		args = append([]string{"-q", "-s", filepath.Join(ts.dir, "ca"), "-I", "id"}, append(args, user+".pub")...)
		if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	for _, c := range []struct {
		line string
		args []string
		ok   bool
	}{
		{"cert-authority ", []string{"-n", "box"}, true},
		{"cert-authority ", []string{"-n", "a,box", "-V", "-1m:+1h"}, true},
		{"cert-authority ", []string{"-n", "nope"}, false},
		{"cert-authority ", nil, false}, // for anybody
		{"", []string{"-n", "box"}, false},
		{"cert-authority ", []string{"-n", "box", "-V", "-2h:-1h"}, false},
		{"cert-authority ", []string{"-n", "box", "-V", "+1h:+2h"}, false},
		{"cert-authority ", []string{"-h", "-n", "box"}, false}, // a host's
		{`cert-authority,principals="dev,ops" `, []string{"-n", "ops"}, true},
		{`cert-authority,principals="dev,ops" `, []string{"-n", "box"}, false},
		{"cert-authority ", []string{"-n", "box", "-O", "source-address=127.0.0.0/8"}, true},
		{"cert-authority ", []string{"-n", "box", "-O", "source-address=10.0.0.0/8"}, false},
		{"cert-authority ", []string{"-n", "box", "-O", "critical:unknown=x"}, false},
		{`cert-authority,from="10.0.0.1" `, []string{"-n", "box"}, false},
		{`cert-authority,command="a" `, []string{"-n", "box", "-O", "force-command=b"}, false},
	} {
		ts.authorize(c.line + caKey)
		sign(c.args...)
		got := ts.run(ts.ssh(user, "box", "127.0.0.1", "echo in"))
		if (got.stdout == "in\n") != c.ok || got.code != map[bool]int{true: 0, false: 255}[c.ok] {
			t.Errorf("%s%q: %+v", c.line, c.args, got)
		}
	}
	ts.authorize("cert-authority " + caKey)
	sign("-n", "box", "-O", "no-pty", "-O", "force-command=echo forced")
	if got := ts.run(ts.ssh(user, "box", "127.0.0.1", "echo in")); got.stdout != "forced\n" {
		t.Errorf("forced: %+v", got)
	}
	if got := ts.run(ts.ssh(user, "box", "-tt", "127.0.0.1", "tty")); got.code == 0 {
		t.Errorf("no-pty: %+v", got)
	}
	// The authority's own key is none to log in with.
	if c, err := ts.dial("box", ca); err == nil {
		c.Close()
		t.Error("the authority got in")
	}
	// Nor is a certificate of another authority good, or one that was tampered with.
	_, priv := ts.newKey("other")
	pub := priv.PublicKey()
	forged := &ssh.Certificate{Key: pub, CertType: ssh.UserCert, ValidPrincipals: []string{"box"}, ValidBefore: ssh.CertTimeInfinity}
	if err := forged.SignCert(rand.Reader, priv); err != nil {
		t.Fatal(err)
	}
	forged.SignatureKey = ca.PublicKey()
	if _, err := ts.keys.authorize("box", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, forged); err == nil || !strings.Contains(err.Error(), "signature") {
		t.Errorf("forged: %v", err)
	}
}

func FuzzKeyOptions(f *testing.F) {
	for _, s := range []string{
		`restrict`, `from="!10.0.0.0/8,*"`, `expiry-time="20300101Z"`, `command="a \"b\""`, `permitopen="[::1]:*"`,
		`permitlisten="*"`, `principals="a,b"`, `environment="A=b"`, `from="[","*`, `=`, `from=`, `command="`,
	} {
		f.Add(s, "::1")
	}
	f.Fuzz(func(t *testing.T, option, addr string) {
		var e authorizedKey
		if e.apply(option) != nil {
			return
		}
		remote := &net.TCPAddr{IP: net.ParseIP(addr), Port: 1}
		e.mayOpen(addr, 80)
		e.mayListen(addr, 80)
		if _, err := e.grant("box", remote, &ssh.Certificate{}); err == nil && e.ca {
			t.Errorf("%q: an empty certificate got in", option)
		}
		if bytes.ContainsRune([]byte(e.command), 0) {
			t.Errorf("%q: a command with a NUL", option)
		}
	})
}
