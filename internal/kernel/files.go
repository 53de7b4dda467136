package kernel

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/charliek/shed/internal/rootfs"
)

// hashTree returns the SHA-256 in hex of every file in dir, by its path in there.
func hashTree(dir string) (map[string]string, error) {
	sums := make(map[string]string)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		sums[filepath.ToSlash(rel)] = hex.EncodeToString(h.Sum(nil))
		return err
	})
	return sums, err
}

// syncTree syncs every file and directory in dir, and dir.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return rootfs.Sync(name)
	})
}
