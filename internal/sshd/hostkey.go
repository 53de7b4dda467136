package sshd

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

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
	if err := createHostKey(path); err != nil {
		return nil, fmt.Errorf("create the SSH host key %s: %w", path, err)
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

// createHostKey writes a new key to path, all of it or nothing, unless there is a file.
func createHostKey(path string) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(private, "shed")
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close() // which unlocks it
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err // another server may have been faster
	}
	// Always by the same name, so that what a kill leaves is used again.
	tmp, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = tmp.Write(pem.EncodeToMemory(block))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return dir.Sync()
}
