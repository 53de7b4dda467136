package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/charliek/shed"
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

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // of aufs; nothing but opaqueMarker has a meaning in OCI
	opaqueMarker   = ".wh..wh..opq"
	lostFound      = "lost+found"

	xattrRecord = "SCHILY.xattr."
	opaqueXattr = "trusted.overlay.opaque"
)

// tarRewriter copies a layer's tar into a form that tar2ext4 converts faithfully.
//
// What goes out has clean relative names, each parent before its children, no file
// twice, and OCI whiteouts as the device nodes and attributes that overlayfs uses. Whiteouts
// come last: they are about lower layers, wherever in the tar they stand.
type tarRewriter struct {
	w *tar.Writer
	// seen has what was written, by name; the header for a directory, nil for anything else.
	seen      map[string]*tar.Header
	whiteouts map[string]struct{}
	opaque    map[string]struct{} // directories
	displaced int
}

// rewriteTar copies the layer tar src to dst. It reads src to its end.
func rewriteTar(dst io.Writer, src io.Reader) error {
	rw := &tarRewriter{
		w: tar.NewWriter(dst),
		seen: map[string]*tar.Header{
			".":       {Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
			lostFound: {Typeflag: tar.TypeDir, Name: lostFound, Mode: 0o700},
		},
		whiteouts: make(map[string]struct{}),
		opaque:    make(map[string]struct{}),
	}
	tr := tar.NewReader(src)
	for entries := 0; ; entries++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tarError(err)
		}
		if entries == maxEntries {
			return shed.Errorf(shed.CodeInvalid, "the tar has more than %d entries", maxEntries)
		}
		if err := rw.entry(hdr, tr); err != nil {
			return fmt.Errorf("entry %q: %w", hdr.Name, err)
		}
	}
	if err := rw.finish(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, src)
	return err
}

// tarError says that the tar is damaged, where it is that and not its reader.
func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return shed.Errorf(shed.CodeInvalid, "the tar is damaged: %w", err)
	}
	return err
}

func (rw *tarRewriter) entry(hdr *tar.Header, body io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	switch {
	case base == opaqueMarker:
		rw.opaque[dir] = struct{}{}
		return nil
	case strings.HasPrefix(base, whiteoutMeta):
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		target := strings.TrimPrefix(base, whiteoutPrefix)
		if target == "" || target == "." || target == ".." {
			return invalid("it removes nothing that can have a name")
		}
		rw.whiteouts[path.Join(dir, target)] = struct{}{}
		return nil
	}

	out, err := convertHeader(hdr, name)
	if err != nil {
		return err
	}
	if err := rw.parents(name); err != nil {
		return err
	}
	before, repeated := rw.seen[name]
	isDir := out.Typeflag == tar.TypeDir
	if repeated && isDir != (before != nil) {
		return invalid("the tar has it both as a directory and as something else")
	}
	if out.Typeflag == tar.TypeLink {
		target, ok := rw.seen[out.Linkname]
		switch {
		case !ok:
			return invalid("it is a hard link to %q, which does not precede it in the layer", hdr.Linkname)
		case target != nil:
			return invalid("it is a hard link to the directory %q", hdr.Linkname)
		case out.Linkname == name:
			return nil
		}
	}
	if repeated && !isDir {
		if err := rw.displace(name); err != nil {
			return err
		}
	}
	if err := rw.w.WriteHeader(out); err != nil {
		return err
	}
	rw.seen[name] = nil
	if isDir {
		rw.seen[name] = out
	}
	if out.Typeflag != tar.TypeReg {
		return nil
	}
	_, err = io.Copy(rw.w, body)
	return tarError(err)
}

// parents writes the directories above name that no entry has made yet.
func (rw *tarRewriter) parents(name string) error {
	for i := range len(name) {
		if name[i] != '/' {
			continue
		}
		parent := name[:i]
		hdr, ok := rw.seen[parent]
		if ok && hdr == nil {
			return invalid("%q, which it is in, is not a directory", parent)
		}
		if !ok {
			if err := rw.directory(&tar.Header{Name: parent, Mode: 0o755}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (rw *tarRewriter) directory(hdr *tar.Header) error {
	hdr.Typeflag = tar.TypeDir
	hdr.Format = tar.FormatPAX
	rw.seen[path.Clean(hdr.Name)] = hdr
	return rw.w.WriteHeader(hdr)
}

// displace gives what was written as name a second name, without which a file with content
// can't be replaced: its blocks would be nobody's.
func (rw *tarRewriter) displace(name string) error {
	rw.displaced++
	to := fmt.Sprintf("%s/repeated-%d", lostFound, rw.displaced)
	if _, taken := rw.seen[to]; taken {
		return invalid("the tar repeats it, and %q is taken", to)
	}
	rw.seen[to] = nil
	return rw.w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: to, Linkname: name, Format: tar.FormatPAX})
}

// finish writes whiteouts and opaque directories, and the end of the tar.
func (rw *tarRewriter) finish() error {
	opaque := slices.Sorted(maps.Keys(rw.opaque))
	for _, name := range opaque {
		if err := rw.parents(name + "/"); err != nil {
			return fmt.Errorf("opaque directory %q: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(rw.whiteouts)) {
		if hdr, ok := rw.seen[name]; ok {
			// The layer also has a file of that name, which hides the lower one anyway,
			// or a directory, which has to be kept from merging with it.
			if _, already := rw.opaque[name]; hdr != nil && !already {
				opaque = append(opaque, name)
			}
			continue
		}
		if rw.whiteoutAbove(name) {
			continue
		}
		if err := rw.parents(name); err != nil {
			return fmt.Errorf("whiteout of %q: %w", name, err)
		}
		rw.seen[name] = nil
		if err := rw.w.WriteHeader(&tar.Header{Typeflag: tar.TypeChar, Name: name, Format: tar.FormatPAX}); err != nil {
			return err
		}
	}
	for _, name := range opaque {
		hdr := *rw.seen[name]
		hdr.PAXRecords = maps.Clone(hdr.PAXRecords)
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = make(map[string]string)
		}
		hdr.PAXRecords[xattrRecord+opaqueXattr] = "y"
		if err := rw.directory(&hdr); err != nil {
			return err
		}
	}
	return rw.w.Close()
}

// whiteoutAbove says whether a directory that name would be in was removed, and name with it.
func (rw *tarRewriter) whiteoutAbove(name string) bool {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, removed := rw.whiteouts[dir]; removed && rw.seen[dir] == nil {
			return true
		}
	}
	return false
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
	case tar.TypeLink:
		target, err := cleanName(hdr.Linkname)
		if err != nil {
			return nil, fmt.Errorf("hard link: %w", err)
		}
		out.Linkname = target
		return out, nil
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
		return "", invalid("%q is no name", name)
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", invalid("%q is outside the layer", name)
	}
	if len(clean) > maxPath {
		return "", invalid("a path of %d bytes is too long", len(clean))
	}
	for part := range strings.SplitSeq(clean, "/") {
		if len(part) > maxName {
			return "", invalid("a name of %d bytes is too long", len(part))
		}
	}
	return clean, nil
}

func invalid(format string, args ...any) error {
	return shed.Errorf(shed.CodeInvalid, format, args...)
}
