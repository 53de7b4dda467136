package kernel

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cavaliergopher/cpio"

	"github.com/charliek/shed/internal/rootfs"
)

// initramfsDirs are where the agent mounts, and where it finds the modules.
// /dev/console is in the initramfs that is built into every kernel.
var initramfsDirs = []string{"proc", "sys", "dev", "run", "mnt", "sysroot", "modules"}

// Initramfs returns the path of b's initramfs with that agent as its /init, and
// makes it if it isn't there. It may be called concurrently.
func (b *Bundle) Initramfs(ctx context.Context, agentBinary string) (string, error) {
	path, err := b.initramfs(ctx, agentBinary)
	if err != nil {
		return "", fmt.Errorf("making the initramfs of the kernel %s: %w", b.ID, err)
	}
	return path, nil
}

func (b *Bundle) initramfs(ctx context.Context, agentBinary string) (_ string, err error) {
	agent, err := os.ReadFile(agentBinary)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(agent)
	path := filepath.Join(b.dir, "initramfs-"+hex.EncodeToString(sum[:6])+".cpio")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	f, err := os.CreateTemp(b.dir, tempPrefix)
	if err != nil {
		return "", err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := writeInitramfs(ctx, w, agent, os.DirFS(filepath.Join(b.dir, bootDir))); err != nil {
		return "", err
	}
	if err := errors.Join(w.Flush(), f.Chmod(0o644), f.Sync()); err != nil {
		return "", err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return "", err
	}
	return path, rootfs.Sync(b.dir)
}

// writeInitramfs writes the initramfs of an agent and the files of boot, a
// directory that bootModules made. It isn't compressed: unpacking it would be work for
// every boot, and the pages are shared in the host's cache.
func writeInitramfs(ctx context.Context, w io.Writer, agent []byte, boot fs.FS) error {
	cw := cpio.NewWriter(w)
	inode := int64(0)
	add := func(name string, mode cpio.FileMode, data []byte) error {
		inode++ // files with the same number would be taken to be links
		hdr := &cpio.Header{Name: name, Mode: mode, Size: int64(len(data)), Inode: inode, Links: 1}
		if err := cw.WriteHeader(hdr); err != nil {
			return err
		}
		_, err := cw.Write(data)
		return err
	}
	for _, dir := range initramfsDirs {
		if err := add(dir, cpio.TypeDir|0o755, nil); err != nil {
			return err
		}
	}
	if err := add("init", cpio.TypeReg|0o755, agent); err != nil {
		return err
	}
	files, err := fs.ReadDir(boot, ".")
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := fs.ReadFile(boot, file.Name())
		if err != nil {
			return err
		}
		if err := add("modules/"+file.Name(), cpio.TypeReg|0o644, data); err != nil {
			return err
		}
	}
	return cw.Close()
}
