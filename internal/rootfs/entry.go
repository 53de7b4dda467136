package rootfs

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// What ext4, Linux and tar2ext4 can hold.
const (
	maxName    = 255
	maxPath    = 4095
	maxEntries = 2 << 20
	// maxFile is where the extent tree would need its 341st leaf entry,
	// which tar2ext4 gets wrong.
	maxFile  = 340 * (32 << 10) * blockSize
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
	maxID    = 1<<32 - 2
)

// A file system's writer walks from the root to each file, and to each directory that is only implied: a name of 4 KB can imply
// 2,000 of them, which takes 2 million steps. Layers may take as many steps as a few such names do, and
// besides as many for each entry as names that people have don't need by far.
const (
	freeSteps     = 4 << 20
	stepsPerEntry = 64
)

// maxTrailer bounds, in bytes, what follows the end of a tar. Programs that write tars pad
// them to the size of their records: 10 KB mostly, some MB at most.
const maxTrailer = 16 << 20

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // of aufs; nothing but opaqueMarker has a meaning in OCI
	opaqueMarker   = ".wh..wh..opq"
)

// entry is what one entry of a layer's tar says.
type entry struct {
	kind  entryKind
	index int         // among all entries of the tar
	name  string      // relative to the layer's root and clean; "." is the root itself
	hdr   *tar.Header // of entryFile: what ext4 keeps of it
}

type entryKind uint8

const (
	entryFile     entryKind = iota // a file of any type
	entryWhiteout                  // layers below have no name
	entryOpaque                    // layers below have nothing in the directory name
)

// readLayer calls each for the entries of the layer tar r, with the content of
// those that are regular files. It reads r to its end, and returns the hash
// of all that r yielded. More than limit bytes are CodeInvalid.
func readLayer(ctx context.Context, r io.Reader, limit int64, each func(entry, io.Reader) error) (v1.Hash, error) {
	hash := sha256.New()
	src := bufio.NewReaderSize(io.TeeReader(&limitedReader{ctxReader{ctx, r}, limit, limit}, hash), 1<<20)
	tr := tar.NewReader(src)
	// The content of a sparse file goes on for long without a read of r.
	body := ctxReader{ctx, tr}
	for i := 0; ; i++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return v1.Hash{}, tarError(err)
		}
		if i == maxEntries {
			return v1.Hash{}, invalid("the tar has more than %d entries", maxEntries)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := parseEntry(hdr, i)
		if err == nil && e != nil {
			err = each(*e, body)
		}
		if err != nil {
			return v1.Hash{}, fmt.Errorf("entry %.200q: %w", hdr.Name, tarError(err))
		}
	}
	n, err := io.Copy(io.Discard, io.LimitReader(src, maxTrailer+1))
	if err != nil {
		return v1.Hash{}, err
	}
	if n > maxTrailer {
		return v1.Hash{}, invalid("more than %d MB follow the end of the tar", maxTrailer>>20)
	}
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}, nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// limitedReader fails where r yields more than limit bytes.
type limitedReader struct {
	r           io.Reader
	left, limit int64
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.left -= int64(n)
	if l.left < 0 {
		return 0, invalid("the tar has more than %d bytes", l.limit)
	}
	return n, err
}

// tarError says that the tar is damaged, where it is that and not its reader.
func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("the tar is damaged: %w", err)
	}
	return err
}

// parseEntry returns nil for an entry without a meaning.
func parseEntry(hdr *tar.Header, index int) (*entry, error) {
	e := &entry{index: index}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return nil, err
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	switch {
	case base == opaqueMarker:
		e.kind, e.name = entryOpaque, dir
	case strings.HasPrefix(base, whiteoutMeta):
		return nil, nil
	case strings.HasPrefix(base, whiteoutPrefix):
		target := strings.TrimPrefix(base, whiteoutPrefix)
		if target == "" || target == "." || target == ".." {
			return nil, invalid("it removes nothing that can have a name")
		}
		e.kind, e.name = entryWhiteout, path.Join(dir, target)
	default:
		e.name = name
		if e.hdr, err = convertHeader(hdr, name); err != nil {
			return nil, err
		}
		if h := e.hdr; h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
			// This is what overlayfs has whiteouts as.
			e.kind, e.hdr = entryWhiteout, nil
		}
	}
	return e, checkLengths(e.name)
}

// convertHeader returns the header of an entry that is no whiteout with what
// ext4 keeps of it.
func convertHeader(hdr *tar.Header, name string) (*tar.Header, error) {
	out := &tar.Header{
		Typeflag: hdr.Typeflag,
		Name:     name,
		Mode:     hdr.Mode & 0o7777,
		Uid:      hdr.Uid,
		Gid:      hdr.Gid,
		ModTime:  hdr.ModTime,
		Format:   tar.FormatPAX,
	}
	if out.ModTime.Unix() < 0 {
		out.ModTime = time.Unix(0, 0) // tar2ext4 makes a year 2378 of it
	}
	if !inRange(int64(hdr.Uid), maxID) || !inRange(int64(hdr.Gid), maxID) {
		return nil, invalid("owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		if hdr.Size > maxFile {
			return nil, invalid("a file of %d bytes is larger than a layer can hold (%d)", hdr.Size, int64(maxFile))
		}
		out.Typeflag = tar.TypeReg
		out.Size = hdr.Size
	case tar.TypeDir:
		out.Name = name + "/"
	case tar.TypeSymlink:
		if hdr.Linkname == "" || len(hdr.Linkname) > maxPath || strings.ContainsRune(hdr.Linkname, 0) {
			return nil, invalid("a symbolic link can't have a target of %d bytes", len(hdr.Linkname))
		}
		out.Linkname = hdr.Linkname
		out.Mode = 0o777 // which tar2ext4 would only add
	case tar.TypeLink:
		target, err := cleanName(hdr.Linkname)
		if err != nil {
			return nil, fmt.Errorf("hard link: %w", err)
		}
		out.Linkname = target
		return out, checkLengths(target)
	case tar.TypeChar, tar.TypeBlock:
		if !inRange(hdr.Devmajor, maxMajor) || !inRange(hdr.Devminor, maxMinor) {
			return nil, invalid("device %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		out.Devmajor, out.Devminor = hdr.Devmajor, hdr.Devminor
	case tar.TypeFifo:
	default:
		return nil, invalid("entries of type %q are not supported", hdr.Typeflag)
	}
	if name == "." && out.Typeflag != tar.TypeDir {
		return nil, invalid("the root of a layer must be a directory")
	}
	xattrs, err := convertXattrs(hdr.PAXRecords, out.Typeflag == tar.TypeDir)
	if err != nil {
		return nil, err
	}
	out.PAXRecords = xattrs
	return out, nil
}

func inRange(n, limit int64) bool { return n >= 0 && n <= limit }

// cleanName returns name relative to the layer's root, "." for the root itself.
func cleanName(name string) (string, error) {
	if name == "" || strings.ContainsRune(name, 0) {
		return "", invalid("%.200q is no name", name)
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", invalid("%.200q is outside the layer", name)
	}
	return clean, nil
}

// checkLengths reports a clean name that Linux can't have.
func checkLengths(name string) error {
	if len(name) > maxPath {
		return invalid("a path of %d bytes is too long", len(name))
	}
	for part := range strings.SplitSeq(name, "/") {
		if len(part) > maxName {
			return invalid("a name of %d bytes is too long", len(part))
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return shed.Errorf(shed.CodeInvalid, format, args...)
}
