package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/charliek/shed"
)

const (
	maxKeyFile = 64 << 10 // bytes

	// agentTimeout is for the agent to say which keys it has. To sign may take as long as a person takes to allow it.
	agentTimeout = 3 * time.Second

	passphraseTries = 3
)

// keyring has the private keys of the user. Servers share it, so that nobody is asked twice.
type keyring struct {
	ask func(ctx context.Context, prompt string) ([]byte, error) // nil: nobody can be asked

	asking   atomic.Int32 // how many wait for an answer
	unlocked atomic.Int32 // how many keys have been

	mu   sync.Mutex
	open map[string]ssh.Signer // that had a passphrase, by their files
}

// signers returns the keys that s lets a login try, in order, and a function that lets go of the agent. Keys that have a passphrase, which is only
// asked for if the server accepts the key, come last. problems says what could not be used.
func (k *keyring) signers(ctx context.Context, s settings) (signers []ssh.Signer, closeAgent func(), problems []error) {
	closeAgent = func() {}
	var held []ssh.Signer
	if s.agent != "" {
		var err error
		if held, closeAgent, err = agentKeys(ctx, s.agent); err != nil {
			problems = append(problems, fmt.Errorf("the SSH agent: %w", err))
		}
	}
	var named, files, locked []ssh.Signer
	var inFiles []ssh.PublicKey
	certificates := s.certificates
	for _, path := range s.identities {
		certificates = append(certificates, path+"-cert.pub")
		key, err := k.load(ctx, path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("the key %s: %w", path, err))
			continue
		}
		inFiles = append(inFiles, key.public)
		i := slices.IndexFunc(held, func(h ssh.Signer) bool { return sameKey(plainKey(h.PublicKey()), key.public) })
		switch {
		case i >= 0:
			named = append(named, held[i])
		case key.signer == nil: // only the agent could use it
		case key.locked:
			locked = append(locked, key.signer)
		default:
			files = append(files, key.signer)
		}
	}
	signers = named
	for _, h := range held {
		if !s.identitiesOnly && !hasKey(inFiles, plainKey(h.PublicKey())) {
			signers = append(signers, h)
		}
	}
	signers = append(append(signers, files...), locked...)
	return append(certified(signers, certificates), signers...), closeAgent, problems
}

func sameKey(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

func hasKey(keys []ssh.PublicKey, key ssh.PublicKey) bool {
	return slices.ContainsFunc(keys, func(k ssh.PublicKey) bool { return sameKey(k, key) })
}

// plainKey returns the key that a certificate is for, and any other key as it is.
func plainKey(key ssh.PublicKey) ssh.PublicKey {
	if cert, ok := key.(*ssh.Certificate); ok {
		return cert.Key
	}
	return key
}

// agentKeys returns the keys of the agent at socket. They are usable until they are closed.
func agentKeys(ctx context.Context, socket string) (keys []ssh.Signer, closeAgent func(), err error) {
	closeAgent = func() {}
	conn, err := (&net.Dialer{Timeout: agentTimeout}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, closeAgent, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	closeAgent = func() {
		stop()
		conn.Close()
	}
	conn.SetDeadline(time.Now().Add(agentTimeout))
	keys, err = agent.NewClient(conn).Signers()
	conn.SetDeadline(time.Time{})
	return keys, closeAgent, err
}

// fileKey is a key in a file.
type fileKey struct {
	public ssh.PublicKey
	signer ssh.Signer // nil if only the public half is here
	locked bool       // there is a passphrase
}

// load reads the key in the file at path.
func (k *keyring) load(ctx context.Context, path string) (fileKey, error) {
	text, err := readSmall(path)
	if err != nil {
		return fileKey{}, err
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err == nil {
		return fileKey{public: signer.PublicKey(), signer: signer}, nil
	}
	var missing *ssh.PassphraseMissingError
	if !errors.As(err, &missing) {
		if public, _, _, _, perr := ssh.ParseAuthorizedKey(text); perr == nil {
			return fileKey{public: public}, nil
		}
		return fileKey{}, err
	}
	public := missing.PublicKey
	if public == nil { // an old format
		text, err := readSmall(path + ".pub")
		if err != nil {
			return fileKey{}, errors.New("it has a passphrase, and there is no file with its public key beside it")
		}
		if public, _, _, _, err = ssh.ParseAuthorizedKey(text); err != nil {
			return fileKey{}, fmt.Errorf("its public key: %w", err)
		}
	}
	return fileKey{public: public, signer: &lockedKey{k, ctx, path, text, public}, locked: true}, nil
}

// readSmall returns the contents of a regular file.
func readSmall(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxKeyFile {
		return nil, errors.New("it is not a file that can hold a key")
	}
	return os.ReadFile(path)
}

// certified returns signers with the certificates that the files have for keys.
func certified(keys []ssh.Signer, files []string) (signers []ssh.Signer) {
	for _, path := range files {
		text, err := readSmall(path)
		if err != nil {
			continue
		}
		public, _, _, _, err := ssh.ParseAuthorizedKey(text)
		cert, ok := public.(*ssh.Certificate)
		if err != nil || !ok {
			continue
		}
		for _, key := range keys {
			if signer, err := ssh.NewCertSigner(cert, key); err == nil { // it is the key's
				signers = append(signers, signer)
				break
			}
		}
	}
	return signers
}

// lockedKey is a key with a passphrase, which is asked for when it is needed.
type lockedKey struct {
	keyring *keyring
	ctx     context.Context // of the login
	path    string
	text    []byte
	public  ssh.PublicKey
}

func (k *lockedKey) PublicKey() ssh.PublicKey { return k.public }

func (k *lockedKey) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return k.SignWithAlgorithm(rand, data, "")
}

func (k *lockedKey) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	signer, err := k.unlock()
	if err != nil {
		return nil, err
	}
	return sign(signer, rand, data, algorithm)
}

// sign signs with algorithm where the signer has a choice.
func sign(signer ssh.Signer, rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	if a, ok := signer.(ssh.AlgorithmSigner); ok {
		return a.SignWithAlgorithm(rand, data, algorithm)
	}
	return signer.Sign(rand, data)
}

func (k *lockedKey) unlock() (ssh.Signer, error) {
	k.keyring.asking.Add(1)
	defer k.keyring.asking.Add(-1)
	k.keyring.mu.Lock()
	defer k.keyring.mu.Unlock()
	if signer, ok := k.keyring.open[k.path]; ok {
		return signer, nil
	}
	fail := func(why string) error {
		return shed.Errorf(shed.CodeUnreachable, "the key %s, which would be let in, has a passphrase, and %s", k.path, why).
			WithHint("give it to the agent: ssh-add %s", k.path)
	}
	if k.keyring.ask == nil {
		return nil, fail("nobody can be asked for it here")
	}
	for range passphraseTries {
		phrase, err := k.keyring.ask(k.ctx, fmt.Sprintf("Passphrase of %s: ", k.path))
		if err != nil {
			return nil, fail(fmt.Sprintf("it could not be asked for: %v", err))
		}
		signer, err := ssh.ParsePrivateKeyWithPassphrase(k.text, phrase)
		if err == nil {
			if k.keyring.open == nil {
				k.keyring.open = map[string]ssh.Signer{}
			}
			k.keyring.open[k.path] = signer
			k.keyring.unlocked.Add(1)
			return signer, nil
		}
	}
	return nil, fail("that was not it")
}

// describeKeys lists keys for an error message.
func describeKeys(keys []ssh.PublicKey) string {
	var list []string
	for _, key := range keys {
		list = append(list, strings.TrimPrefix(key.Type(), "ssh-")+" "+ssh.FingerprintSHA256(key))
	}
	return strings.Join(list, ", ")
}
