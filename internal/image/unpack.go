package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Bounds of what is unpacked. The files of an archive take as much of the disk as the client has sent, unless
// it is compressed.
const (
	maxEntries  = 1 << 16 // of an archive
	maxImages   = 256     // of one, and of an index in it
	maxLinks    = 8       // on the way to a file
	maxRatio    = 200     // of compression, after the first bombAllowed bytes
	bombAllowed = 1 << 30
)

const (
	gzipMagic = "\x1f\x8b"
	zstdMagic = "\x28\xb5\x2f\xfd"
)

// inArchive is an archive of images that was unpacked: its files under names of ours.
type inArchive struct {
	dir   string
	files map[string]inFile
	links map[string]string // to what is in the archive too

	layers map[v1.Hash]inLayer // those that were looked at, by digest
}

// inLayer is what kind of layer a file is.
type inLayer struct {
	mediaType types.MediaType
	diffID    v1.Hash
}

// inFile is a file of an archive.
type inFile struct {
	path   string // on disk
	size   int64
	digest v1.Hash
}

func badArchive(format string, args ...any) error {
	return shed.Errorf(shed.CodeInvalid, "the archive can't be loaded: "+format, args...).
		WithHint("make it with `shed image save`, `docker save` or `skopeo copy ... oci-archive:FILE`; of a tar of a system's files, " +
			"a Dockerfile makes an image: FROM scratch, and ADD FILE.tar /")
}

// unpack writes the files of the tar that r yields, plain or compressed, to dir. What is no archive, or reaches out of it, is
// CodeInvalid. Errors of r are wrapped.
func unpack(ctx context.Context, dir string, r io.Reader) (*inArchive, error) {
	src := &source{r: readerOf(ctx, r)}
	a := &inArchive{dir: dir, files: map[string]inFile{}, links: map[string]string{}, layers: map[v1.Hash]inLayer{}}
	plain, err := decompress(bufio.NewReaderSize(src, 1<<20))
	if err == nil {
		limited := limitRatio(plain, src.n.Load)
		if err = a.unpack(tar.NewReader(limited)); err == nil {
			_, err = io.Copy(io.Discard, limited) // what is after the tar's end can be damaged too
		}
		plain.Close()
	}
	broken := src.err.Load()
	switch {
	case err != nil && broken != nil:
		return nil, *broken
	case err != nil && shed.ErrorCode(err) == shed.CodeInternal && !errors.As(err, new(*os.PathError)):
		return nil, badArchive("%w", err)
	case err != nil:
		return nil, rootfs.NoSpace(err, dir)
	}
	return a, nil
}

// source is a reader that tells how much it has yielded, and what went wrong with it. Decompressors read ahead, in goroutines of
// their own.
type source struct {
	r   io.Reader
	n   atomic.Int64
	err atomic.Pointer[error]
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n.Add(int64(n))
	if err != nil && !errors.Is(err, io.EOF) {
		s.err.Store(&err)
	}
	return n, err
}

func decompress(r *bufio.Reader) (io.ReadCloser, error) {
	magic, err := r.Peek(6)
	if len(magic) == 0 {
		if errors.Is(err, io.EOF) {
			return nil, badArchive("it is empty")
		}
		return nil, err
	}
	for _, m := range []struct {
		magic  string
		open   func(io.Reader) (io.ReadCloser, error)
		refuse string
	}{
		{magic: gzipMagic, open: gunzip}, {magic: zstdMagic, open: unzstd},
		{magic: "BZh", refuse: "bzip2"}, {magic: "\xfd7zXZ\x00", refuse: "xz"},
	} {
		if !bytes.HasPrefix(magic, []byte(m.magic)) {
			continue
		}
		if m.open == nil {
			return nil, shed.Errorf(shed.CodeInvalid, "the archive is compressed with %s", m.refuse).
				WithHint("decompress it first, or compress it with gzip or zstd")
		}
		return m.open(r)
	}
	return io.NopCloser(r), nil
}

// limitRatio returns r until it has yielded so much more than the in() bytes that it was made of that it is meant to fill disks.
func limitRatio(r io.Reader, in func() int64) io.Reader {
	var out int64
	return readerFunc(func(p []byte) (int, error) {
		if out > bombAllowed && out/maxRatio > in() {
			return 0, badArchive("its %d bytes decompress to more than %d", in(), out)
		}
		n, err := r.Read(p)
		out += int64(n)
		return n, err
	})
}

func (a *inArchive) unpack(tr *tar.Reader) error {
	for range maxEntries {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := a.entry(hdr, tr); err != nil {
			return err
		}
	}
	return badArchive("it has more than %d files", maxEntries)
}

func (a *inArchive) entry(hdr *tar.Header, r io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, ok := inside(hdr.Name)
	if !ok {
		return badArchive("%q is no name of a file in it", hdr.Name)
	}
	_, file := a.files[name]
	_, link := a.links[name]
	if (file || link) && hdr.Typeflag != tar.TypeDir {
		return badArchive("it has %q twice", name)
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return badArchive("%q is a sparse file", name)
		}
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return nil
	case tar.TypeReg:
		f, err := a.write(r)
		if err != nil {
			return err
		}
		a.files[name] = f
		return nil
	case tar.TypeSymlink, tar.TypeLink:
		target := hdr.Linkname
		if hdr.Typeflag == tar.TypeSymlink && !path.IsAbs(target) {
			target = path.Join(path.Dir(name), target)
		}
		if target, ok = inside(target); !ok {
			return badArchive("%q is a link to %q, outside of it", name, hdr.Linkname)
		}
		a.links[name] = target
		return nil
	}
	return badArchive("%q is neither a file, nor a directory, nor a link", name)
}

// inside cleans a name of a file in an archive.
func inside(name string) (string, bool) {
	if name == "" || path.IsAbs(name) || strings.ContainsRune(name, 0) {
		return "", false
	}
	name = path.Clean(name)
	return name, name != ".." && !strings.HasPrefix(name, "../")
}

func (a *inArchive) write(r io.Reader) (inFile, error) {
	f, err := os.Create(filepath.Join(a.dir, strconv.Itoa(len(a.files))))
	if err != nil {
		return inFile{}, err
	}
	digest, size, err := v1.SHA256(io.TeeReader(r, f))
	if err = errors.Join(err, f.Close()); err != nil {
		return inFile{}, err
	}
	return inFile{path: f.Name(), size: size, digest: digest}, nil
}

// file returns a file of the archive by its name or by that of a link to it.
func (a *inArchive) file(name string) (inFile, bool) {
	name, found := inside(name)
	for n := 0; found && n < maxLinks; n++ {
		if f, ok := a.files[name]; ok {
			return f, true
		}
		name, found = a.links[name]
	}
	return inFile{}, false
}

// blob returns what desc points to, after making sure that it is that.
func (a *inArchive) blob(desc v1.Descriptor) (inFile, error) {
	f, ok := a.file(blobPath(desc.Digest))
	switch {
	case !ok:
		return f, badArchive("it has no blob %s", desc.Digest)
	case desc.Digest.Algorithm != "sha256":
		return f, badArchive("blob %s: only sha256 digests are supported", desc.Digest)
	case f.size != desc.Size:
		return f, badArchive("blob %s has %d bytes, and should have %d", desc.Digest, f.size, desc.Size)
	case f.digest != desc.Digest:
		return f, badArchive("blob %s has the content of another: its digest is %s", desc.Digest, f.digest)
	}
	return f, nil
}

// asLayer returns what kind of layer a file is, and its diff ID: archives by docker have plain tars, and such by
// crane(1) compressed ones.
func (a *inArchive) asLayer(ctx context.Context, f inFile) (inLayer, error) {
	if l, ok := a.layers[f.digest]; ok {
		return l, nil
	}
	l, err := f.asLayer(ctx)
	if err == nil {
		a.layers[f.digest] = l
	}
	return l, err
}

func (f inFile) asLayer(ctx context.Context) (inLayer, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return inLayer{}, err
	}
	defer file.Close()
	magic := make([]byte, 4)
	n, err := file.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return inLayer{}, err
	}
	l := inLayer{mediaType: types.OCIUncompressedLayer, diffID: f.digest}
	switch {
	case bytes.HasPrefix(magic[:n], []byte(gzipMagic)):
		l.mediaType = types.OCILayer
	case bytes.HasPrefix(magic[:n], []byte(zstdMagic)):
		l.mediaType = types.OCILayerZStd
	default:
		return l, nil
	}
	r, err := decompressors[l.mediaType](readerOf(ctx, file))
	if err != nil {
		return inLayer{}, err
	}
	defer r.Close()
	l.diffID, _, err = v1.SHA256(limitRatio(r, func() int64 { return f.size }))
	return l, err
}

// json reads a file of the archive into v.
func (f inFile) json(what string, v any) error {
	if f.size > maxJSON {
		return badArchive("%s has %d bytes, and may have %d", what, f.size, maxJSON)
	}
	b, err := os.ReadFile(f.path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return badArchive("%s: %w", what, err)
	}
	return nil
}
