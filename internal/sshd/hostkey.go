package sshd

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// LoadOrCreateHostKey returns the private key in the file path. Where there is no file,
// it makes an Ed25519 key and writes it there, in OpenSSH's format with mode 0600. It never
// overwrites a file: one that it can't use is an error that names it.
func LoadOrCreateHostKey(path string) (ssh.Signer, error) {
	key, err := loadHostKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	err = createHostKey(path)
	if err != nil && !errors.Is(err, fs.ErrExist) { // another server may have been faster
		return nil, fmt.Errorf("create the SSH host key: %w", err)
	}
	return loadHostKey(path)
}

func loadHostKey(path string) (ssh.Signer, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("the SSH host key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, shed.Errorf(shed.CodeInvalid, "the SSH host key %s is not a regular file", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, shed.Errorf(shed.CodeInvalid, "the SSH host key %s is open to other users (mode %04o)", path, perm).
			WithHint("chmod 600 %s", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the SSH host key: %w", err)
	}
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the SSH host key %s is damaged: %w", path, err).
			WithHint("restore it from a backup; or remove it, and a new one is made that clients must be told to trust")
	}
	return key, nil
}

// createHostKey writes a new key to path, all of it or nothing, and fails with
// fs.ErrExist if a file is there.
func createHostKey(path string) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(private, "shed")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, filepath.Base(path)+".tmp*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = bytes.NewReader(pem.EncodeToMemory(block)).WriteTo(tmp)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// Unlike a rename, a link doesn't replace what is there.
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
