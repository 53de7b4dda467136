package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/sshd"
)

func TestLoginRefused(t *testing.T) {
	dir, public := home(t)
	s := newServer(t, writeKey(t, filepath.Join(dir, "other"), ""))
	_, client := s.connect(Options{})
	_, err := client.List(t.Context())
	key, _, _, _, perr := ssh.ParseAuthorizedKey([]byte(public))
	if perr != nil {
		t.Fatal(perr)
	}
	wantError(t, err, "lets none of our keys in: ed25519 "+ssh.FingerprintSHA256(key), "authorized_keys")

	// That is not tried again at once: the server would bar this machine. Another process may.
	s.authorize(public)
	if _, err := client.List(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("after the refusal: %v", err)
	}
	_, client = s.connect(Options{})
	if _, err := client.List(t.Context()); err != nil {
		t.Error(err)
	}

	write(t, filepath.Join(dir, ".ssh", "id_ed25519"), "garbage")
	_, client = s.connect(Options{})
	_, err = client.List(t.Context())
	wantError(t, err, "there is no key to log in with", "id_ed25519", "ssh-keygen")

	// What a key's line restricts, the API would give back.
	writeLine := writeKey(t, filepath.Join(dir, ".ssh", "id_ed25519"), "")
	for _, options := range []string{`command="true"`, "restrict", "no-pty", "no-port-forwarding", "no-agent-forwarding", `permitopen="a:1"`, `permitlisten="1"`} {
		s.authorize(options + " " + writeLine)
		_, client := s.connect(Options{})
		_, err := client.List(t.Context())
		wantError(t, err, "refuses: the key may not use the HTTP API")
	}
	s.authorize(`from="127.0.0.1",expiry-time="99991231" ` + writeLine)
	_, client = s.connect(Options{})
	if _, err := client.List(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPassphrase(t *testing.T) {
	dir, _ := home(t)
	path := filepath.Join(dir, ".ssh", "id_ed25519")
	s := newServer(t, writeKey(t, path, "secret"))
	_, client := s.connect(Options{})
	_, err := client.List(t.Context())
	wantError(t, err, path, "has a passphrase", "ssh-add "+path)

	var prompts []string
	answers := []string{"wrong", "secret"}
	ask := func(_ context.Context, prompt string) ([]byte, error) {
		prompts = append(prompts, prompt)
		a := answers[0]
		answers = answers[1:]
		return []byte(a), nil
	}
	servers, client := s.connect(Options{Ask: ask})
	if _, err := client.List(t.Context()); err != nil || len(prompts) != 2 || !strings.Contains(prompts[0], path) {
		t.Errorf("%q, %v", prompts, err)
	}
	// Another server isn't a reason to ask again.
	if _, err := servers.Probe(t.Context(), s.server(), func(ssh.PublicKey) error { return nil }); err != nil || len(prompts) != 2 {
		t.Errorf("%q, %v", prompts, err)
	}
	// A key that the server doesn't want is none.
	s.authorize(writeKey(t, filepath.Join(dir, ".ssh", "id_rsa"), ""))
	_, client = s.connect(Options{Ask: ask})
	if _, err := client.List(t.Context()); err != nil || len(prompts) != 2 {
		t.Errorf("%q, %v", prompts, err)
	}
}

// A server doesn't wait for as long as it may take to type a passphrase. Nobody has to type it twice.
func TestPassphraseTakesLong(t *testing.T) {
	dir, _ := home(t)
	s := newServer(t, writeKey(t, filepath.Join(dir, ".ssh", "id_ed25519"), "secret"))
	asked := 0
	_, client := s.connect(Options{Ask: func(context.Context, string) ([]byte, error) {
		asked++
		s.stopSSH()
		s.listen(s.addr)
		return []byte("secret"), nil
	}})
	if _, err := client.List(t.Context()); err != nil || asked != 1 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}

// startAgent starts an agent with keys.
func startAgent(t *testing.T, keys ...agent.AddedKey) (socket string) {
	t.Helper()
	ring := agent.NewKeyring()
	for _, k := range keys {
		if err := ring.Add(k); err != nil {
			t.Fatal(err)
		}
	}
	socket = filepath.Join(socketDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var parts sync.WaitGroup
	parts.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			parts.Go(func() {
				defer conn.Close()
				agent.ServeAgent(ring, conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		parts.Wait()
	})
	return socket
}

func TestAgent(t *testing.T) {
	dir, _ := home(t)
	held := newKey(t)
	socket := startAgent(t, agent.AddedKey{PrivateKey: held})
	t.Setenv("SSH_AUTH_SOCK", socket)
	line := string(ssh.MarshalAuthorizedKey(signerOf(t, held).PublicKey()))
	s := newServer(t, line)
	servers, client := s.connect(Options{})
	if _, err := client.List(t.Context()); err != nil {
		t.Error(err)
	}
	servers.Close()

	// A file may hold only the public half of a key that the agent has.
	write(t, filepath.Join(dir, ".ssh", "only.pub"), line)
	s2 := settings{identities: []string{filepath.Join(dir, ".ssh", "only.pub")}, identitiesOnly: true, agent: socket}
	keys, done, problems := (&keyring{}).signers(t.Context(), s2)
	defer done()
	if len(keys) != 1 || len(problems) > 0 {
		t.Errorf("%d keys, %v", len(keys), problems)
	}
	s2.identities = []string{filepath.Join(dir, ".ssh", "id_ed25519")}
	keys, done, problems = (&keyring{}).signers(t.Context(), s2)
	defer done()
	if len(keys) != 1 || sameKey(keys[0].PublicKey(), signerOf(t, held).PublicKey()) || len(problems) > 0 {
		t.Errorf("%d keys, %v", len(keys), problems)
	}
	s2.agent = socket + "x"
	_, _, problems = (&keyring{}).signers(t.Context(), s2)
	if len(problems) != 1 || !strings.Contains(problems[0].Error(), "the SSH agent") {
		t.Error(problems)
	}
}

func TestCertificate(t *testing.T) {
	dir, public := home(t)
	ca := signerOf(t, newKey(t))
	s := newServer(t, "cert-authority "+string(ssh.MarshalAuthorizedKey(ca.PublicKey())))
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(public))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		principal string
		with      map[string]string
		ok        bool
	}{
		{sshd.APIUser, map[string]string{"permit-pty": "", "permit-port-forwarding": "", "permit-agent-forwarding": ""}, true},
		{sshd.APIUser, map[string]string{"permit-port-forwarding": ""}, false},
		{"web", map[string]string{"permit-pty": "", "permit-port-forwarding": "", "permit-agent-forwarding": ""}, false},
	} {
		cert := &ssh.Certificate{
			Key: key, CertType: ssh.UserCert, ValidPrincipals: []string{c.principal}, ValidBefore: ssh.CertTimeInfinity,
			Permissions: ssh.Permissions{Extensions: c.with},
		}
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, ".ssh", "id_ed25519-cert.pub"), string(ssh.MarshalAuthorizedKey(cert)))
		_, client := s.connect(Options{})
		if _, err := client.List(t.Context()); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// The user of the API has nothing else, and a key that is removed ends what it has.
func TestAPIUser(t *testing.T) {
	dir, public := home(t)
	s := newServer(t, public)
	s.Add(shed.Shed{Name: "web"})
	text, err := os.ReadFile(filepath.Join(dir, ".ssh", "id_ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	client, err := ssh.Dial("tcp", s.addr, &ssh.ClientConfig{
		User: sshd.APIUser, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(s.host.PublicKey()),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	session.Stderr = &stderr
	if err := session.Run("id"); err == nil || !strings.Contains(stderr.String(), "has the HTTP API, at /shed.sock, and nothing else") {
		t.Errorf("a command: %v, %q", err, stderr.String())
	}
	for network, addr := range map[string]string{"tcp": "localhost:22", "unix": "/run/other.sock"} {
		if conn, err := client.Dial(network, addr); err == nil {
			conn.Close()
			t.Errorf("%s %s is there", network, addr)
		} else if !strings.Contains(err.Error(), "/shed.sock") {
			t.Error(err)
		}
	}
	for _, network := range []string{"tcp", "unix"} {
		if l, err := client.Listen(network, map[string]string{"tcp": "127.0.0.1:0", "unix": "/tmp/x"}[network]); err == nil {
			l.Close()
			t.Errorf("it listens on %s", network)
		}
	}
	conn, err := client.Dial("unix", sshd.APISocket)
	if err != nil {
		t.Fatal(err)
	}
	s.authorize("restrict " + public)
	if b, err := io.ReadAll(conn); len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	client.Wait()
}
