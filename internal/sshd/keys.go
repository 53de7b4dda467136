package sshd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/crypto/ssh"
)

// AuthorizedKeys says whose keys may log in.
type AuthorizedKeys struct {
	// Files are paths of files in OpenSSH's authorized_keys format. They are read at every login, so
	// that a change counts at once. A file that isn't there holds no keys; one that others
	// than its owner can change, itself or through its directory, is refused.
	Files []string
	// Lines are further lines of that format.
	Lines []string
}

// Usable returns how many keys may log in now, and why files and keys that are there may not.
func (c AuthorizedKeys) Usable() (n int, problems []string) {
	k := newKeyring(c, slog.New(slog.DiscardHandler))
	for _, e := range k.current() {
		if e.refused == "" {
			n++
		} else {
			problems = append(problems, e.where+": "+e.refused)
		}
	}
	for _, f := range k.files {
		if f.problem != "" {
			problems = append(problems, f.path+": "+f.problem)
		}
	}
	return n, problems
}

// maxKeyFile is the longest file of authorized keys, in bytes.
const maxKeyFile = 1 << 20

// keyring decides which keys may log in. It is safe for concurrent use.
type keyring struct {
	log   *slog.Logger
	lines []authorizedKey

	mu    sync.Mutex
	files []*keyFile
}

type keyFile struct {
	path    string
	text    []byte // what keys was made of
	keys    []authorizedKey
	problem string // why the file isn't used, as logged
}

// authorizedKey is one line of a file of authorized keys.
type authorizedKey struct {
	where   string // FILE:LINE
	key     []byte // in wire format
	refused string // why the key can't be used, or ""
	from    []netip.Prefix
	noPTY   bool
}

func newKeyring(c AuthorizedKeys, log *slog.Logger) *keyring {
	k := &keyring{log: log}
	for i, line := range c.Lines {
		k.lines = append(k.lines, k.parse(fmt.Sprintf("configured key %d", i+1), []byte(line))...)
	}
	for _, path := range c.Files {
		k.files = append(k.files, &keyFile{path: path})
	}
	return k
}

// authorize returns the line that lets key log in from remote. The error says why none does.
func (k *keyring) authorize(remote net.Addr, key ssh.PublicKey) (authorizedKey, error) {
	wire := key.Marshal()
	err := fmt.Errorf("the key %s is not authorized", ssh.FingerprintSHA256(key))
	for _, e := range k.current() {
		if !bytes.Equal(e.key, wire) {
			continue
		}
		reason := e.refused
		if reason == "" && !e.allows(remote) {
			reason = "the key may not be used from this address"
		}
		if reason == "" {
			return e, nil
		}
		k.log.Warn("SSH key refused", "key", ssh.FingerprintSHA256(key), "line", e.where,
			"remote", remote.String(), "reason", reason)
		err = fmt.Errorf("%s: %s", e.where, reason)
	}
	return authorizedKey{}, err
}

// allows reports whether the key may be used from remote.
func (e authorizedKey) allows(remote net.Addr) bool {
	if e.from == nil {
		return true
	}
	ap, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return false
	}
	addr := ap.Addr().Unmap().WithZone("")
	for _, p := range e.from {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// current returns all lines as the files are now.
func (k *keyring) current() []authorizedKey {
	k.mu.Lock()
	defer k.mu.Unlock()
	keys := k.lines[:len(k.lines):len(k.lines)]
	for _, f := range k.files {
		text, err := readKeyFile(f.path)
		problem := ""
		switch {
		case errors.Is(err, fs.ErrNotExist): // nobody has to have one
		case err != nil:
			problem = err.Error()
		}
		if problem != f.problem {
			if problem != "" {
				k.log.Warn("authorized keys not used", "file", f.path, "reason", problem)
			}
			f.problem = problem
		}
		// The text itself tells whether it changed. Times and sizes don't: a key can
		// be exchanged for another of the same length within one tick of the clock.
		if !bytes.Equal(text, f.text) {
			f.text, f.keys = text, k.parse(f.path, text)
		}
		keys = append(keys, f.keys...)
	}
	return keys
}

// readKeyFile returns the contents of a file that nobody but its owner can change.
func readKeyFile(path string) ([]byte, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.Stat(filepath.Dir(real))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(real, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return nil, fmt.Errorf("its group or others can write it (mode %04o); chmod go-w %s", perm, real)
	}
	if perm := dir.Mode().Perm(); perm&0o022 != 0 {
		return nil, fmt.Errorf("the group or others can write its directory (mode %04o); chmod go-w %s", perm, filepath.Dir(real))
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("it is longer than %d bytes", maxKeyFile)
	}
	return text, nil
}

// parse returns the keys in text and logs the lines that hold none.
func (k *keyring) parse(name string, text []byte) []authorizedKey {
	var keys []authorizedKey
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		where := fmt.Sprintf("%s:%d", name, n)
		key, _, options, _, err := ssh.ParseAuthorizedKey(line)
		if err != nil {
			k.log.Warn("line of authorized keys skipped", "line", where, "err", err)
			continue
		}
		e := authorizedKey{where: where, key: key.Marshal()}
		if _, ok := key.(*ssh.Certificate); ok {
			e.refused = "certificates are not supported"
		}
		for _, o := range options {
			if err := e.apply(o); err != nil {
				e.refused = err.Error()
			}
		}
		keys = append(keys, e)
	}
	return keys
}

// apply makes e obey an option of its line. One that isn't understood might
// restrict the key in a way that goes unheeded, so it is an error.
func (e *authorizedKey) apply(option string) error {
	name, value, hasValue := strings.Cut(option, "=")
	switch name := strings.ToLower(name); {
	case name == "from" && hasValue:
		from, err := parseFrom(value)
		if err != nil {
			return err
		}
		if e.from != nil {
			return errors.New("the option from is there twice")
		}
		e.from = from
	case hasValue:
		return fmt.Errorf("the option %.40q is not supported", name)
	case name == "restrict", name == "no-pty":
		e.noPTY = true
	case name == "pty":
		e.noPTY = false
	case name == "agent-forwarding", name == "no-agent-forwarding",
		name == "port-forwarding", name == "no-port-forwarding",
		name == "x11-forwarding", name == "no-x11-forwarding",
		name == "user-rc", name == "no-user-rc":
		// No key can do any of these here.
	default:
		return fmt.Errorf("the option %.40q is not supported", name)
	}
	return nil
}

// parseFrom parses the quoted value of a from option, if it is a list of addresses and CIDR
// blocks. Names would need the DNS, which is no authority for who a client is.
func parseFrom(value string) ([]netip.Prefix, error) {
	if len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
		return nil, errors.New("the option from needs a quoted value")
	}
	var from []netip.Prefix
	for _, s := range strings.Split(value[1:len(value)-1], ",") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(s); err == nil {
				addr = addr.Unmap()
				p = netip.PrefixFrom(addr, addr.BitLen())
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%.40q in the option from is no address or CIDR block; nothing else is supported there", s)
		}
		from = append(from, p)
	}
	return from, nil
}
