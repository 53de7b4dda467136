package sshd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"sync"

	"golang.org/x/crypto/ssh"
)

// AuthorizedKeys says whose keys may log in.
type AuthorizedKeys struct {
	// Files are paths of files in OpenSSH's authorized_keys format. They are read at every login, so
	// that a change counts at once. A file that isn't there holds no keys; one that others than
	// root and this process's user can change, itself or through a directory on its path, is refused.
	Files []string
	// Lines are further lines of that format.
	Lines []string
}

// Usable returns how many keys may log in now, and why files and keys that are there may not.
func (c AuthorizedKeys) Usable() (n int, problems []string) {
	k := newKeyring(c, slog.New(slog.DiscardHandler))
	lines, _ := k.current()
	for _, e := range lines {
		if err := e.usable(); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", e.where, err))
		} else {
			n++
		}
	}
	for _, f := range k.files {
		if f.problem != "" {
			problems = append(problems, f.path+": "+f.problem)
		}
	}
	return n, problems
}

// keyring decides which keys may log in. It is safe for concurrent use.
type keyring struct {
	log       *slog.Logger
	strangers *slog.Logger // for what clients cause
	lines     []authorizedKey

	mu    sync.Mutex
	files []*keyFile
}

type keyFile struct {
	path    string
	text    []byte // what keys was made of
	keys    []authorizedKey
	problem string // why the file isn't used, as logged
}

func newKeyring(c AuthorizedKeys, log *slog.Logger) *keyring {
	k := &keyring{log: log, strangers: log}
	for i, line := range c.Lines {
		k.lines = append(k.lines, k.parse(fmt.Sprintf("configured key %d", i+1), []byte(line))...)
	}
	for _, path := range c.Files {
		k.files = append(k.files, &keyFile{path: path})
	}
	return k
}

// authorize returns what a key may do that logs in from remote to the shed called user. The error
// says why it may not.
func (k *keyring) authorize(user string, remote net.Addr, key ssh.PublicKey) (rights, error) {
	lines, _ := k.current()
	r, refused, err := authorize(lines, user, remote, key)
	for _, line := range refused {
		k.strangers.Warn("SSH key refused", "key", ssh.FingerprintSHA256(key), "line", line.where,
			"remote", remote.String(), "reason", line.refused)
	}
	return r, err
}

// authorize returns what the first of lines that is for key lets it do. Where others before it
// refuse the key, it says so too.
func authorize(lines []authorizedKey, user string, remote net.Addr, key ssh.PublicKey) (r rights, refused []authorizedKey, err error) {
	subject := key
	cert, isCert := key.(*ssh.Certificate)
	if isCert {
		subject = cert.SignatureKey
	}
	wire := subject.Marshal()
	err = fmt.Errorf("the key %s is not authorized", ssh.FingerprintSHA256(key))
	for _, line := range lines {
		if line.ca != isCert || !bytes.Equal(line.key, wire) {
			continue
		}
		r, reason := line.grant(user, remote, cert)
		if reason == nil {
			return r, refused, nil
		}
		line.refused = reason.Error()
		refused = append(refused, line)
		err = fmt.Errorf("%s: %w", line.where, reason)
	}
	return rights{}, refused, err
}

// current returns all lines as the files are now. Of a file that can't be read for the moment, known has the lines that
// it held last: they may not let in anybody else, but are no reason to end what they let in.
func (k *keyring) current() (lines, known []authorizedKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	lines = k.lines[:len(k.lines):len(k.lines)]
	known = lines
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
		if isPassing(err) {
			known = append(known, f.keys...)
			continue
		}
		// The text itself tells whether it changed. Times and sizes don't: a key can
		// be exchanged for another of the same length within one tick of the clock.
		if !bytes.Equal(text, f.text) {
			f.text, f.keys = text, k.parse(f.path, text)
		}
		lines = append(lines, f.keys...)
		known = append(known, f.keys...)
	}
	return lines, known
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
			e.refused = "it is a certificate; authorize its authority's key instead, with the option cert-authority"
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
