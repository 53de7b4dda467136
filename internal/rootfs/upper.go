package rootfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/charliek/shed"
)

// mkfsArgs are all that decides what an upper looks like. Nothing is left to the
// host's mke2fs.conf, so every host makes the same uppers, and ones that the
// guest's kernel knows.
//
// Without resize_inode, which reserves 4 MB, an upper of 20 GB starts with less than
// 0.5 MB on disk; Linux grows such file systems too. The journal is allocated as the guest writes it round.
var mkfsArgs = []string{
	"-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", "size=64",
	"-O", "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super," +
		"large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
	"-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
}

// CreateUpper makes path an empty ext4 file system of size bytes in a sparse file,
// replacing what is there. It copies a template from templatesDir, which it
// makes first if need be: one for each size. The file system is empty, and owned by root.
//
// All uppers of one size have the same file system UUID: no two of them belong into one machine.
//
// A size that no shed can have is CodeInvalid; a full disk CodeNoSpace; no mkfs.ext4 CodeUnsupported.
func CreateUpper(ctx context.Context, templatesDir, path string, size int64) error {
	if size < shed.MinUpperSize || size > shed.MaxUpperSize || size%blockSize != 0 {
		return shed.Errorf(shed.CodeInvalid, "an upper can't have %d bytes", size).
			WithHint("use 1G to 1T, in units of 4 KiB")
	}
	template, err := upperTemplate(ctx, templatesDir, size)
	if err != nil {
		return fmt.Errorf("making a template for an upper: %w", err)
	}
	defer template.Close()
	f, err := CreateTemp(path)
	if err != nil {
		return fmt.Errorf("creating an upper: %w", NoSpace(err, path))
	}
	if err := copySparse(ctx, f, template, size); err != nil {
		discard(f)
		return fmt.Errorf("creating an upper: %w", NoSpace(err, path))
	}
	if err := Commit(f, path, 0o600); err != nil {
		return fmt.Errorf("creating an upper: %w", err)
	}
	return nil
}

// upperTemplate opens the template for uppers of size bytes, and makes it if it isn't there.
func upperTemplate(ctx context.Context, dir string, size int64) (*os.File, error) {
	sum := sha256.Sum256([]byte(strings.Join(mkfsArgs, "\x00")))
	path := filepath.Join(dir, fmt.Sprintf("upper-%d-%x.img", size, sum[:6]))
	f, err := os.Open(path)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	mkfs, err := findMkfs()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, NoSpace(err, dir)
	}
	// Others may be at it too: all make the same, and the last one stays.
	tmp, err := os.CreateTemp(dir, tempPrefix+"upper-")
	if err != nil {
		return nil, NoSpace(err, dir)
	}
	if err := format(ctx, mkfs, tmp, size); err != nil {
		discard(tmp)
		return nil, NoSpace(err, path)
	}
	if err := Commit(tmp, path, 0o444); err != nil {
		return nil, err
	}
	return os.Open(path)
}

func format(ctx context.Context, mkfs string, f *os.File, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, mkfs, append(append([]string(nil), mkfsArgs...), f.Name())...)
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s: %w: %s", mkfs, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

func findMkfs() (string, error) {
	p, err := LookPath("mkfs.ext4")
	if err != nil {
		return "", shed.Errorf(shed.CodeUnsupported, "mkfs.ext4 is not installed").
			WithHint("install e2fsprogs: `apt-get install e2fsprogs`, or on macOS `brew install e2fsprogs`")
	}
	return p, nil
}

// LookPath finds a program also where the PATH of ordinary users does not lead, among those for
// the administrator. The error is that of exec.LookPath.
func LookPath(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{
		"/usr/sbin", "/sbin", "/usr/local/sbin",
		"/opt/homebrew/opt/e2fsprogs/sbin", "/usr/local/opt/e2fsprogs/sbin",
	} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", err
}

// copySparse makes dst, an empty file, a copy of the first size bytes of src: sharing its
// blocks where the file system can do that, else with holes where src has some.
func copySparse(ctx context.Context, dst, src *os.File, size int64) error {
	if reflink(dst, src) == nil {
		return nil
	}
	out := &sparseWriter{f: dst}
	for pos := int64(0); pos < size; {
		start, end, err := nextData(src, pos)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		end = min(end, size)
		if _, err := out.Seek(start, io.SeekStart); err != nil {
			return err
		}
		section := ctxReader{ctx, io.NewSectionReader(src, start, end-start)}
		if _, err := io.CopyBuffer(out, section, make([]byte, 256<<10)); err != nil {
			return err
		}
		pos = end
	}
	return dst.Truncate(size)
}
