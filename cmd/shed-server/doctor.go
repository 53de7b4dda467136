//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/vm/qemu"
)

// minFree is what a first image, kernel and shed need, in bytes.
const minFree = 3 << 30

// doctor prints what is well, and what isn't with what to do. It fails if sheds can't run.
func doctor(ctx context.Context, cfg config, w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	failed := 0
	ok := func(what, detail string) { fmt.Fprintf(tw, "ok\t%s\t%s\n", what, detail) }
	bad := func(what, detail string) {
		failed++
		fmt.Fprintf(tw, "MISSING\t%s\t%s\n", what, detail)
	}
	ok("config", cmp.Or(cfg.file, "no file: the defaults"))
	binary, err := qemu.FindBinary()
	if err != nil {
		bad("qemu", err.Error())
	} else {
		ok("qemu", binary)
		tmp, err := os.MkdirTemp("", "shed-doctor-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(tmp)
		accel, reason, err := qemu.DetectAccel(ctx, binary, filepath.Join(tmp, "kvm.json"))
		switch {
		case err != nil:
			bad("kvm", err.Error())
		case accel == qemu.KVM:
			ok("kvm", "a test guest ran")
		default:
			fmt.Fprintf(tw, "slow\tkvm\tsheds run in software emulation: %s\n", firstLine(reason))
		}
	}
	for _, tool := range []struct{ name, pkg, why string }{
		{"mkfs.ext4", "e2fsprogs", "makes the disks of sheds"},
		{"mmdebstrap", "mmdebstrap", "builds the base image"},
		{"dpkg-deb", "dpkg", "unpacks the kernel's package"},
		{"apt-get", "apt", "downloads the kernel's package"},
		{"depmod", "kmod", "indexes the kernel's modules"},
	} {
		if path, err := rootfs.LookPath(tool.name); err != nil {
			bad(tool.name, fmt.Sprintf("%s: apt-get install %s", tool.why, tool.pkg))
		} else {
			ok(tool.name, path)
		}
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if agent, err := findAgent(program); err != nil {
		bad("agent", err.Error())
	} else {
		ok("agent", agent)
	}
	n, problems := authorizedKeys(cfg).Usable()
	if n > 0 {
		ok("ssh", fmt.Sprintf("authorized keys: %d", n))
	} else {
		fmt.Fprintf(tw, "none\tssh\tno key is authorized, so nobody can log in by SSH: %s\n", authorizeHint)
	}
	for _, p := range problems {
		fmt.Fprintf(tw, "unused\tssh\t%s\n", p)
	}
	// The first start of the server makes it.
	if key, err := os.ReadFile(filepath.Join(cfg.StateDir, hostKeyFile)); err == nil {
		if signer, err := ssh.ParsePrivateKey(key); err != nil {
			bad("ssh", fmt.Sprintf("the host key %s: %v", filepath.Join(cfg.StateDir, hostKeyFile), err))
		} else {
			ok("ssh", "host key "+ssh.FingerprintSHA256(signer.PublicKey()))
		}
	}
	dir := cfg.StateDir
	for !fileExists(dir) {
		dir = filepath.Dir(dir)
	}
	var fs unix.Statfs_t
	switch err := unix.Statfs(dir, &fs); {
	case err != nil:
		bad("disk", err.Error())
	case unix.Access(dir, unix.W_OK) != nil:
		bad("disk", fmt.Sprintf("%s can't be written: set state_dir to a directory of yours", dir))
	default:
		if free := int64(fs.Bavail) * fs.Bsize; free < minFree {
			bad("disk", fmt.Sprintf("%s has %d MB free; %d are needed", dir, free>>20, minFree>>20))
		} else {
			ok("disk", fmt.Sprintf("%s: %d GB free", cfg.StateDir, free>>30))
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if failed > 0 {
		return errors.New("sheds can't run here yet")
	}
	return nil
}

// firstLine is what fits a table of a program's last words.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
