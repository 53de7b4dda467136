package sshd

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

type hostPortPayload struct {
	Host string
	Port uint32
}

type directPayload struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// echoServer answers each connection with what it gets, once that has ended.
func echoServer(t *testing.T, network, address string) net.Addr {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				if b, err := io.ReadAll(conn); err == nil {
					conn.Write(b)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr()
}

// roundTrip sends data on conn, ends that direction, and expects it all back.
func roundTrip(t *testing.T, conn net.Conn, data []byte) {
	t.Helper()
	defer conn.Close()
	go func() {
		conn.Write(data)
		conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
	}
}

func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "shed") // the path of a socket can't be long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestDirect(t *testing.T) {
	dir := socketDir(t)
	tcp, unix := echoServer(t, "tcp", "127.0.0.1:0"), echoServer(t, "unix", dir+"/echo")
	ts := newTestServer(t)
	client := ts.mustDial("box")
	data := make([]byte, 6<<20)
	rand.Read(data)
	var wg sync.WaitGroup
	for _, addr := range []net.Addr{tcp, unix, tcp, unix} {
		wg.Go(func() {
			conn, err := client.Dial(addr.Network(), addr.String())
			if err != nil {
				t.Error(err)
				return
			}
			roundTrip(t, conn, data)
		})
	}
	wg.Wait()

	busy, err := net.Dial("tcp", tcp.String()) // so that nobody can listen where it is
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, addr := range []net.Addr{busy.LocalAddr(), &net.UnixAddr{Name: dir + "/none", Net: "unix"}} {
		_, err = client.Dial(addr.Network(), addr.String())
		var refused *ssh.OpenChannelError
		if !errors.As(err, &refused) || refused.Reason != ssh.ConnectionFailed || !strings.Contains(refused.Message, "connect: ") {
			t.Errorf("%v: %v", addr, err)
		}
	}
	if _, err := ts.mustDial("nope").Dial("tcp", tcp.String()); err == nil || !strings.Contains(err.Error(), "no shed named") {
		t.Errorf("no such shed: %v", err)
	}
	if _, err := ts.mustDial("a b").Dial("tcp", tcp.String()); err == nil || !strings.Contains(err.Error(), "no shed named") {
		t.Errorf("no name of a shed: %v", err)
	}
}

// Whoever is connected notices that the other side has gone.
func TestDirectEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ts := newTestServer(t)
	client := ts.mustDial("box")
	open := func() (near net.Conn, far net.Conn) {
		t.Helper()
		near, err := client.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if far, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		return near, far
	}
	near, far := open()
	near.Write([]byte("last words"))
	near.Close()
	if b, err := io.ReadAll(far); string(b) != "last words" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	far.Close()

	near, far = open()
	far.Write([]byte("last words"))
	far.Close()
	if b, err := io.ReadAll(near); string(b) != "last words" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	near.Close()

	near, far = open()
	defer near.Close()
	client.Close()
	if _, err := io.ReadAll(far); err != nil {
		t.Errorf("after the connection's end: %v", err)
	}
	far.Close()
}

func TestManyDirect(t *testing.T) {
	addr := echoServer(t, "tcp", "127.0.0.1:0").String()
	ts := newTestServer(t)
	client := ts.mustDial("box")
	conns := make([]net.Conn, 2000)
	for i := range conns {
		var err error
		if conns[i], err = client.Dial("tcp", addr); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	for i, conn := range conns {
		roundTrip(t, conn, fmt.Appendf(nil, "%d", i))
	}
}

func TestListen(t *testing.T) {
	dir := socketDir(t)
	ts := newTestServer(t)
	client := ts.mustDial("box")
	tcp, err := client.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unix, err := client.ListenUnix(dir + "/s")
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 3<<20)
	rand.Read(data)
	for _, l := range []net.Listener{tcp, unix} {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				far, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				b, err := io.ReadAll(far)
				if err == nil {
					_, err = far.Write(b)
				}
				if err != nil {
					t.Error(err)
				}
				far.Close()
			})
			wg.Go(func() {
				near, err := net.Dial(l.Addr().Network(), l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				roundTrip(t, near, data[:len(data)/20])
			})
		}
		wg.Wait()
	}

	if _, err := client.Listen("tcp", tcp.Addr().String()); err == nil {
		t.Error("it listens twice on the same address")
	}
	// The end of a listener is not that of its connections.
	near, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := tcp.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{tcp, unix} {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		for { // the server's side ends a moment later
			conn, err := net.Dial(l.Addr().Network(), l.Addr().String())
			if err != nil {
				break
			}
			conn.Close()
		}
	}
	go func() {
		io.Copy(far, far)
		far.Close()
	}()
	roundTrip(t, near, data)

	limited := newTestServer(t, func(s *Server) { s.maxListeners = 1 }).mustDial("box")
	if _, err := limited.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Error(err)
	}
	if _, err := limited.Listen("tcp", "127.0.0.1:0"); err == nil {
		t.Error("one more than allowed listens")
	}
}

// What a client doesn't want is closed, and so is everything when it goes.
func TestListenRefused(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	ok, reply, err := client.SendRequest("tcpip-forward", true, ssh.Marshal(hostPortPayload{"localhost", 0}))
	var m struct{ Port uint32 }
	if !ok || err != nil || ssh.Unmarshal(reply, &m) != nil {
		t.Fatal(ok, reply, err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", m.Port)
	conn, err := net.Dial("tcp", addr) // Go's client knows of no such listener
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); len(b) > 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	conn.Close()
	client.Close()
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		conn.Close()
	}
}

func TestAgentForwarding(t *testing.T) {
	ts := newTestServer(t)
	keys := agent.NewKeyring()
	if err := keys.Add(agent.AddedKey{PrivateKey: newPrivateKey(t), Comment: "mine"}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socketDir(t)+"/agent")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(keys, conn)
		}
	}()
	with := func(script string, options ...string) result {
		cmd := ts.ssh(ts.ident, "box", append(options, "127.0.0.1", script)...)
		cmd.Args = strings.Split(strings.Replace(strings.Join(cmd.Args, "\n"), "IdentityAgent=none", "IdentityAgent="+l.Addr().String(), 1), "\n")
		return ts.run(cmd)
	}
	got := with("ssh-add -L; ssh-add -L; echo $SSH_AUTH_SOCK", "-A")
	lines := strings.Split(got.stdout, "\n")
	if got.code != 0 || len(lines) != 4 || !strings.HasSuffix(lines[0], " mine") || lines[0] != lines[1] {
		t.Fatalf("%+v", got)
	}
	for {
		if _, err := os.Stat(lines[2]); errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	if got := with("echo -n $SSH_AUTH_SOCK", "-a"); got.stdout != os.Getenv("SSH_AUTH_SOCK") {
		t.Errorf("without: %+v", got)
	}
	ts.authorize("no-agent-forwarding " + string(ssh.MarshalAuthorizedKey(ts.signer.PublicKey())))
	if got := with("echo -n $SSH_AUTH_SOCK", "-A"); got.stdout != os.Getenv("SSH_AUTH_SOCK") {
		t.Errorf("forbidden: %+v", got)
	}
}

// OpenSSH's own client forwards both ways, as a SOCKS server, and through this server to another.
func TestOpenSSHForwards(t *testing.T) {
	dir := socketDir(t)
	echo := echoServer(t, "tcp", "127.0.0.1:0").String()
	ts := newTestServer(t)
	cmd := ts.ssh(ts.ident, "box", "-o", "ExitOnForwardFailure=yes",
		"-L", dir+"/l:"+echo, "-R", dir+"/r:"+echo, "-D", dir+"/d", "-R", "0:"+echo, "127.0.0.1", "echo ready; cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stderr).ReadString('\n') // "Allocated port N for remote forward to ..."
	var port int
	if _, serr := fmt.Sscanf(line, "Allocated port %d ", &port); err != nil || serr != nil {
		t.Fatalf("%q, %v, %v", line, err, serr)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	data := make([]byte, 1<<20)
	rand.Read(data)
	for _, addr := range []net.Addr{
		&net.UnixAddr{Name: dir + "/l", Net: "unix"}, &net.UnixAddr{Name: dir + "/r", Net: "unix"},
		&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port},
	} {
		conn, err := net.Dial(addr.Network(), addr.String())
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, conn, data)
	}
	stdin.Close()
	io.Copy(io.Discard, stderr)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}

	_, port2, _ := net.SplitHostPort(ts.addr)
	config := filepath.Join(dir, "config")
	if err := os.WriteFile(config, fmt.Appendf(nil, "Host *\n HostName 127.0.0.1\n Port %s\n User box\n IdentityFile %s\n UserKnownHostsFile %s\n IdentitiesOnly yes\n IdentityAgent none\n BatchMode yes\n",
		port2, ts.ident, filepath.Join(ts.dir, "known_hosts")), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ts.run(exec.Command("ssh", "-F", config, "-J", "jump", "end", "echo through")); got.stdout != "through\n" {
		t.Errorf("-J: %+v", got)
	}
}
