package sshd

import (
	"context"
	"net"
	"testing"

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

// FuzzConnection sends a client's requests, after which the connection has to work still.
func FuzzConnection(f *testing.F) {
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
	client, err := ssh.Dial("tcp", l.Addr().String(), &ssh.ClientConfig{
		User: "box", Auth: []ssh.AuthMethod{ssh.PublicKeys(user)}, HostKeyCallback: ssh.FixedHostKey(host.PublicKey()),
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { client.Close() })

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
