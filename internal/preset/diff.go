package preset

import (
	"archive/tar"
	"crypto/sha256"
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

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	opaqueMarker   = ".wh..wh..opq"
	xattrRecord    = "SCHILY.xattr."
)

// inode is a file of a layer: what all of its names have in common.
type inode struct {
	hdr   tar.Header        // without a name
	sum   [sha256.Size]byte // of a regular file's content
	names []string          // clean and relative, in the order of the tar
}

func (ino *inode) isDir() bool { return ino.hdr.Typeflag == tar.TypeDir }

// equal says whether two inodes are the same but for their names and times.
func (ino *inode) equal(o *inode) bool {
	a, b := &ino.hdr, &o.hdr
	return a.Typeflag == b.Typeflag && a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Size == b.Size &&
		a.Linkname == b.Linkname && a.Devmajor == b.Devmajor && a.Devminor == b.Devminor &&
		maps.Equal(a.PAXRecords, b.PAXRecords) && ino.sum == o.sum
}

// layer is what a layer's tar has, without the contents.
type layer struct {
	names map[string]*inode
	// entries has the inode of each entry of the tar, in order; nil for what isn't one.
	entries   []*inode
	whiteouts map[string]struct{} // what they remove
	opaque    map[string]struct{} // directories
}

// readLayer reads a layer's tar to its end. Directories that it has no entry for are
// root's, mode 0755, as in the block image that is made of it.
func readLayer(r io.Reader) (*layer, error) {
	l := &layer{names: map[string]*inode{}, whiteouts: map[string]struct{}{}, opaque: map[string]struct{}{}}
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		ino, err := l.entry(hdr, tr)
		if err != nil {
			return nil, fmt.Errorf("entry %q: %w", hdr.Name, err)
		}
		l.entries = append(l.entries, ino)
	}
	l.directory(".")
	for _, name := range slices.Collect(maps.Keys(l.names)) {
		for dir := range above(name) {
			l.directory(dir)
		}
	}
	_, err := io.Copy(io.Discard, r)
	return l, err
}

func (l *layer) directory(name string) {
	if l.names[name] == nil {
		l.names[name] = &inode{hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, Format: tar.FormatPAX}, names: []string{name}}
	}
}

func (l *layer) entry(hdr *tar.Header, body io.Reader) (*inode, error) {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil, nil
	}
	name := cleanName(hdr.Name)
	dir, base := path.Dir(name), path.Base(name)
	switch {
	case base == opaqueMarker:
		l.opaque[dir] = struct{}{}
		return nil, nil
	case strings.HasPrefix(base, whiteoutMeta):
		return nil, nil
	case strings.HasPrefix(base, whiteoutPrefix):
		l.whiteouts[path.Join(dir, strings.TrimPrefix(base, whiteoutPrefix))] = struct{}{}
		return nil, nil
	}
	var ino *inode
	if hdr.Typeflag == tar.TypeLink {
		if ino = l.names[cleanName(hdr.Linkname)]; ino == nil {
			return nil, shed.Errorf(shed.CodeInvalid, "it is a hard link to %q, which does not precede it", hdr.Linkname)
		}
	} else {
		ino = &inode{hdr: inodeHeader(hdr)}
		if ino.hdr.Typeflag == tar.TypeReg {
			h := sha256.New()
			if _, err := io.Copy(h, body); err != nil {
				return nil, err
			}
			h.Sum(ino.sum[:0])
		}
	}
	if before := l.names[name]; before != nil {
		before.names = slices.DeleteFunc(before.names, func(n string) bool { return n == name })
	}
	l.names[name] = ino
	ino.names = append(ino.names, name)
	return ino, nil
}

// inodeHeader returns what of hdr belongs to the file and not to its name. Times are kept to the second:
// a fraction costs each entry of a tar one kilobyte.
func inodeHeader(hdr *tar.Header) tar.Header {
	out := tar.Header{
		Typeflag: hdr.Typeflag,
		Mode:     hdr.Mode & 0o7777,
		Uid:      hdr.Uid,
		Gid:      hdr.Gid,
		ModTime:  hdr.ModTime.Truncate(time.Second),
		Format:   tar.FormatPAX,
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		out.Typeflag = tar.TypeReg
		out.Size = hdr.Size
	case tar.TypeSymlink:
		out.Linkname = hdr.Linkname
	case tar.TypeChar, tar.TypeBlock:
		out.Devmajor, out.Devminor = hdr.Devmajor, hdr.Devminor
	}
	for key, value := range hdr.PAXRecords {
		if strings.HasPrefix(key, xattrRecord) {
			if out.PAXRecords == nil {
				out.PAXRecords = map[string]string{}
			}
			out.PAXRecords[key] = value
		}
	}
	return out
}

// cleanName returns name relative to the root, "." for the root itself.
func cleanName(name string) string {
	if clean := path.Clean("/" + name); clean != "/" {
		return clean[1:]
	}
	return "."
}

// above yields the directories that name is in, the root last.
func above(name string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for name != "." {
			if name = path.Dir(name); !yield(name) {
				return
			}
		}
	}
}

// hides says whether l takes away what has that name in the layers below.
func (l *layer) hides(name string) bool {
	if _, ok := l.whiteouts[name]; ok {
		return true
	}
	for dir := range above(name) {
		_, removed := l.whiteouts[dir]
		_, opaque := l.opaque[dir]
		if ino := l.names[dir]; removed || opaque || ino != nil && !ino.isDir() {
			return true
		}
	}
	return false
}

// merge returns what layers, bottom first, are when each is applied upon those below.
func merge(layers []*layer) map[string]*inode {
	merged := map[string]*inode{}
	for _, l := range layers {
		maps.DeleteFunc(merged, func(name string, _ *inode) bool { return l.hides(name) })
		maps.Copy(merged, l.names)
	}
	return merged
}

// live returns those names of ino that merged has it by.
func live(merged map[string]*inode, ino *inode) []string {
	names := make([]string, 0, len(ino.names))
	for _, name := range ino.names {
		if merged[name] == ino {
			names = append(names, name)
		}
	}
	return names
}

// copy copies files from r, the tar that l was read from, to w, each with the names that names returns of its names,
// if any.
func (l *layer) copy(w *tar.Writer, r io.Reader, names func(*inode) []string) error {
	tr := tar.NewReader(r)
	for _, ino := range l.entries {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if ino == nil {
			continue
		}
		kept := names(ino)
		if len(kept) == 0 {
			continue
		}
		if hdr.Typeflag == tar.TypeLink {
			// The content may have come under this name already, if the one that the tar has it by isn't kept.
			if name := cleanName(hdr.Name); slices.Contains(kept[1:], name) {
				err = writeLink(w, ino, name, kept[0])
			}
		} else {
			err = writeInode(w, ino, kept[0], tr)
		}
		if err != nil {
			return fmt.Errorf("entry %q: %w", hdr.Name, err)
		}
	}
	return nil
}

func writeInode(w *tar.Writer, ino *inode, name string, content io.Reader) error {
	hdr := ino.hdr
	hdr.Name = name
	if ino.isDir() {
		hdr.Name += "/"
	}
	if err := w.WriteHeader(&hdr); err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.Copy(w, content)
	return err
}

// writeLink writes the header of a hard link. It has the file's mode and owner: who unpacks it may set them again.
func writeLink(w *tar.Writer, ino *inode, name, target string) error {
	return w.WriteHeader(&tar.Header{
		Typeflag: tar.TypeLink, Name: name, Linkname: target, Format: tar.FormatPAX,
		Mode: ino.hdr.Mode, Uid: ino.hdr.Uid, Gid: ino.hdr.Gid, ModTime: ino.hdr.ModTime,
	})
}

// diff writes to w the tar of the layer that makes upper of lower, which is merged layers. upper is a whole tree, and r the
// tar that it was read from.
//
// A file of which nothing but times has changed is left out: unpacking a tree and packing it again changes
// those of directories, and so does installing a package that has it already. A file that
// gained or lost a hard link is written with all its names. The directories above a change are written too.
func diff(w io.Writer, lower map[string]*inode, upper *layer, r io.Reader) error {
	for marker := range upper.whiteouts {
		return shed.Errorf(shed.CodeUnsupported, "the tree has a file %q: a layer can't have a file of such a name",
			path.Join(path.Dir(marker), whiteoutPrefix+path.Base(marker)))
	}
	for dir := range upper.opaque {
		return shed.Errorf(shed.CodeUnsupported, "the tree has a file %q: a layer can't have a file of such a name", path.Join(dir, opaqueMarker))
	}
	changed := map[*inode]struct{}{}
	with := func(name string) {
		for dir := range above(name) {
			changed[upper.names[dir]] = struct{}{}
		}
	}
	for _, ino := range upper.names {
		if unchanged(lower, ino) {
			continue
		}
		changed[ino] = struct{}{}
		for _, name := range ino.names {
			with(name)
		}
	}
	var removed []string
	for name := range lower {
		if upper.names[name] != nil || name == "." {
			continue
		}
		// Otherwise what it was in is gone, and that it is in no directory any more.
		if dir := upper.names[path.Dir(name)]; dir != nil && dir.isDir() {
			removed = append(removed, name)
			with(name)
		}
	}
	tw := tar.NewWriter(w)
	err := upper.copy(tw, r, func(ino *inode) []string {
		if _, ok := changed[ino]; ok {
			return ino.names
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(removed)
	for _, name := range removed {
		marker := path.Join(path.Dir(name), whiteoutPrefix+path.Base(name))
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: marker, Mode: 0o644, Format: tar.FormatPAX}); err != nil {
			return err
		}
	}
	return tw.Close()
}

// unchanged says whether lower has the file, by the same names.
func unchanged(lower map[string]*inode, ino *inode) bool {
	if len(ino.names) == 0 {
		return true // a later entry of the tar replaced it
	}
	old := lower[ino.names[0]]
	return old != nil && old.equal(ino) && slices.Equal(slices.Sorted(slices.Values(live(lower, old))), slices.Sorted(slices.Values(ino.names)))
}
