package sshd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"unicode"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// noSheds has no shed, as every request finds out.
type noSheds struct{ shed.Sheds }

func (noSheds) Exec(context.Context, string, shed.Command) (net.Conn, error) {
	return nil, shed.Errorf(shed.CodeNotFound, "no shed")
}

func (noSheds) Dial(context.Context, string, shed.Endpoint) (net.Conn, error) {
	return nil, shed.Errorf(shed.CodeNotFound, "no shed")
}

func (noSheds) Listen(context.Context, string, shed.Endpoint) (net.Conn, error) {
	return nil, shed.Errorf(shed.CodeNotFound, "no shed")
}

// fuzzedServer is a server that has no shed, and one client of it.
type fuzzedServer struct {
	addr   string
	user   ssh.Signer // may log in
	client *ssh.Client
}

func newFuzzedServer(f *testing.F) *fuzzedServer {
	f.Helper()
	user, host := memoryKey(f), memoryKey(f)
	s := New(Config{
		Sheds: noSheds{}, HostKey: host,
		AuthorizedKeys: AuthorizedKeys{Lines: []string{string(ssh.MarshalAuthorizedKey(user.PublicKey()))}},
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	f.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			f.Error(err)
		}
	})
	addr := l.Addr().String()
	client, err := ssh.Dial("tcp", addr, &ssh.ClientConfig{
		User: "box", Auth: []ssh.AuthMethod{ssh.PublicKeys(user)}, HostKeyCallback: ssh.FixedHostKey(host.PublicKey()),
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { client.Close() })
	return &fuzzedServer{addr, user, client}
}

// FuzzConnection sends a client's requests, after which the connection has to work still.
func FuzzConnection(f *testing.F) {
	client := newFuzzedServer(f).client
	str := ssh.Marshal(struct{ S string }{"sftp"})
	for _, name := range []string{
		"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com",
		keepAliveRequest, "direct-tcpip", "direct-streamlocal@openssh.com", "session", "exec", "shell", "subsystem", "env", "pty-req",
		"window-change", "signal", "auth-agent-req@openssh.com",
	} {
		for kind := range byte(3) {
			f.Add(kind, name, []byte{})
			f.Add(kind, name, str)
			f.Add(kind, name, ssh.Marshal(directPayload{"localhost", 80, "", 0}))
			f.Add(kind, name, []byte{0xff, 0xff, 0xff, 0xff, 0})
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, name string, payload []byte) {
		switch kind % 3 {
		case 0:
			if _, _, err := client.SendRequest(name, true, payload); err != nil {
				t.Fatal(err)
			}
		case 1:
			if ch, requests, err := client.OpenChannel(name, payload); err == nil {
				go ssh.DiscardRequests(requests)
				ch.Close()
			}
		case 2:
			ch, requests, err := client.OpenChannel("session", payload)
			if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(requests)
			ch.SendRequest(name, true, payload)
			ch.Close()
		}
		if ok, _, err := client.SendRequest(keepAliveRequest, true, nil); !ok || err != nil {
			t.Fatalf("after that: %v, %v", ok, err)
		}
	})
}

// FuzzPackets sends packets as they are on a connection of their own, which is logged in. The input is packets, each after its
// length in two bytes.
func FuzzPackets(f *testing.F) {
	ts := newFuzzedServer(f)
	add := func(packets ...[]byte) {
		var b []byte
		for _, p := range packets {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(p))), p...)
		}
		f.Add(b)
	}
	open := message(msgChannelOpen, channelOpen{"session", 0, 1 << 20, 1 << 15})
	add(open, []byte{msgChannelData, 0, 0, 0, 0, 0, 0, 0, 1, 'x'}, []byte{msgChannelClose, 0, 0, 0, 0})
	add(open, []byte{msgWindowAdjust, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	add(kexInitPayload(), []byte{msgECDHInit, 0, 0, 0, 0})
	for n := range 256 {
		add([]byte{byte(n), 0, 0, 0, 0})
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		c, err := dialRawClient(ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.logIn("box", ts.user); err != nil {
			t.Fatal(err)
		}
		var reading sync.WaitGroup
		reading.Go(func() { io.Copy(io.Discard, c.in) })
		for len(input) >= 2 {
			n := min(int(binary.BigEndian.Uint16(input)), len(input)-2)
			if n > 0 && c.send(input[2:2+n]) != nil {
				break
			}
			input = input[2+n:]
		}
		c.Conn.(*net.TCPConn).CloseWrite()
		reading.Wait()
		if ok, _, err := ts.client.SendRequest(keepAliveRequest, true, nil); !ok || err != nil {
			t.Fatalf("another connection, after that: %v, %v", ok, err)
		}
	})
}

// FuzzAuthorizedKeys has a key log in by lines that neither is written for.
func FuzzAuthorizedKeys(f *testing.F) {
	key := memoryKey(f).PublicKey()
	line := string(ssh.MarshalAuthorizedKey(key))
	cert := &ssh.Certificate{Key: key, SignatureKey: key, CertType: ssh.UserCert, ValidPrincipals: []string{"box"}, Signature: &ssh.Signature{}}
	for _, options := range []string{"", "restrict ", "cert-authority ", `from="127.0.0.1",command="x y" `, `expiry-time="20300101" `, "\x1b "} {
		f.Add([]byte("# comment\n"+options+line), key.Marshal())
		f.Add([]byte(options+line), cert.Marshal())
	}
	f.Fuzz(func(t *testing.T, text, blob []byte) {
		var logged lockedBuffer
		k := newKeyring(AuthorizedKeys{}, slog.New(slog.NewTextHandler(&logged, nil)))
		lines := k.parse("keys", text)
		for _, l := range lines {
			if l.usable() == nil && l.refused != "" {
				t.Errorf("%+v can be used", l)
			}
		}
		pub, err := ssh.ParsePublicKey(blob)
		if err != nil {
			return
		}
		if _, _, err := authorize(lines, "box", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, pub); err == nil {
			if _, ok := pub.(*ssh.Certificate); !ok && !bytes.Contains(text, bytes.TrimSpace(ssh.MarshalAuthorizedKey(pub))[len(pub.Type())+1:]) {
				t.Errorf("a key that isn't there is in: %q", text)
			}
		}
		for line := range strings.Lines(logged.String()) {
			if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), unicode.IsControl) {
				t.Errorf("logged %q", line)
			}
		}
	})
}
