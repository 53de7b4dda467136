package client

import (
	"bytes"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/charliek/shed"
)

// PinnedKeys returns the keys that file, in OpenSSH's known_hosts format, has for addr, a HOST:PORT. A file that isn't there has none.
func PinnedKeys(file, addr string) ([]ssh.PublicKey, error) {
	check, err := knownhosts.New(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the pinned host keys can't be read: %w", err).
			WithHint("mend or remove %s; `shed server add` pins keys anew", file)
	}
	var unknown *knownhosts.KeyError
	if err := check(strings.ToLower(addr), &net.TCPAddr{}, noKey{}); !errors.As(err, &unknown) {
		return nil, err
	}
	var keys []ssh.PublicKey
	for _, k := range unknown.Want {
		keys = append(keys, k.Key)
	}
	return keys, nil
}

// noKey is a key that no server has: the answer to whether it is pinned names those that are.
type noKey struct{}

func (noKey) Type() string                            { return "none" }
func (noKey) Marshal() []byte                         { return nil }
func (noKey) Verify(_ []byte, _ *ssh.Signature) error { return errors.New("no key") }

// PinKey has file know addr, a HOST:PORT, by key alone. Lines for other addresses stay as they are.
func PinKey(file, addr string, key ssh.PublicKey) error {
	addr = strings.ToLower(addr)
	return editPins(file, func(text []byte) []byte {
		text = withoutPins(text, addr)
		if len(text) > 0 && !bytes.HasSuffix(text, []byte("\n")) {
			text = append(text, '\n')
		}
		return append(text, knownhosts.Line([]string{addr}, key)+"\n"...)
	})
}

// UnpinKey has file know addr, a HOST:PORT, by no key.
func UnpinKey(file, addr string) error {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return editPins(file, func(text []byte) []byte { return withoutPins(text, strings.ToLower(addr)) })
}

func editPins(file string, edit func([]byte) []byte) error {
	unlock, err := lock(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer unlock()
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	edited := edit(bytes.Clone(text))
	if bytes.Equal(edited, text) {
		return nil
	}
	return writeFile(file, edited)
}

// withoutPins returns text without addr: a line that names others too loses only that name.
func withoutPins(text []byte, addr string) []byte {
	name := knownhosts.Normalize(addr)
	var kept []byte
	for line := range bytes.Lines(text) {
		hosts, rest, ok := strings.Cut(strings.TrimLeft(string(line), " \t"), " ")
		list := strings.Split(hosts, ",")
		if !ok || strings.HasPrefix(hosts, "#") || strings.HasPrefix(hosts, "@") || !slices.Contains(list, name) {
			kept = append(kept, line...)
			continue
		}
		if list = slices.DeleteFunc(list, func(h string) bool { return h == name }); len(list) > 0 {
			kept = append(kept, strings.Join(list, ",")+" "+rest...)
		}
	}
	return kept
}
