package client

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/userfile"
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
func PinKey(ctx context.Context, file, addr string, key ssh.PublicKey) error {
	addr = strings.ToLower(addr)
	return userfile.Edit(ctx, file, func(f userfile.File) ([]byte, error) {
		text := withoutPins(f.Text, addr)
		if len(text) > 0 && !bytes.HasSuffix(text, []byte("\n")) {
			text = append(text, '\n')
		}
		return append(text, knownhosts.Line([]string{addr}, key)+"\n"...), nil
	})
}

// UnpinKey has file know addr, a HOST:PORT, by no key.
func UnpinKey(ctx context.Context, file, addr string) error {
	return userfile.Edit(ctx, file, func(f userfile.File) ([]byte, error) {
		if f.Text == nil {
			return nil, nil
		}
		return withoutPins(f.Text, strings.ToLower(addr)), nil
	})
}

// withoutPins returns text without addr: a line that names others too loses only that name.
func withoutPins(text []byte, addr string) []byte {
	name := knownhosts.Normalize(addr)
	kept := []byte{} // a file that is empty stays one
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
