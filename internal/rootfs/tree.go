package rootfs

import (
	"archive/tar"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const lostFound = "lost+found"

// tree is which names a layer has, or a stack of layers. It holds no content, and
// of headers those of directories.
type tree struct {
	root  *node
	nodes int
	steps int   // from the root to all nodes that were made and entries that were added
	layer int   // its number
	lower *tree // what the layer is put upon, if that is known; its hard links may lead there
}

// node is one name in a tree.
type node struct {
	name     string
	parent   *node // nil for the root
	depth    int   // of the root: 0
	children map[string]*node
	kind     nodeKind
	whiteout bool        // layers below don't have it
	opaque   bool        // layers below have nothing in it
	hdr      *tar.Header // of a directory; nil if no entry says more of it than that it is there
	origin   origin      // of anything else than a directory
	next     *node       // another name of the same file
}

type nodeKind uint8

const (
	kindAbsent nodeKind = iota // the layer removes it, or something in it, from layers below
	kindDirectory
	kindOther
)

// origin is the entry that made a file.
type origin struct{ layer, entry int }

// newTree returns the tree of an empty layer. It has what every image has.
func newTree(layer int, lower *tree) *tree {
	t := &tree{root: &node{kind: kindDirectory}, nodes: 1, layer: layer, lower: lower}
	t.root.put(&node{name: lostFound, kind: kindDirectory, hdr: directoryHeader(0o700)})
	return t
}

func directoryHeader(mode int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Mode: mode, Format: tar.FormatPAX}
}

func (n *node) put(child *node) {
	if n.children == nil {
		n.children = make(map[string]*node)
	}
	child.parent, child.depth = n, n.depth+1
	n.children[child.name] = child
}

func (n *node) path() string {
	var parts []string
	for ; n.parent != nil; n = n.parent {
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// size returns the number of nodes from n down.
func (n *node) size() int {
	size := 1
	for _, child := range n.children {
		size += child.size()
	}
	return size
}

// find returns the node of a clean name, or nil.
func (t *tree) find(name string) *node {
	n := t.root
	if name == "." {
		return n
	}
	for part := range strings.SplitSeq(name, "/") {
		if n = n.children[part]; n == nil {
			return nil
		}
	}
	return n
}

// make returns the node of a clean name, and adds it as an absent one if need be.
func (t *tree) make(name string) (*node, error) {
	n := t.root
	if name == "." {
		return n, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		child := n.children[part]
		if child == nil {
			if t.nodes++; t.nodes > maxEntries {
				return nil, errTooMany()
			}
			child = &node{name: strings.Clone(part)}
			n.put(child)
			t.steps += child.depth
		}
		n = child
	}
	return n, nil
}

func errTooMany() error {
	return invalid("there are more than %d files and directories", maxEntries)
}

// makeDirectory makes n and all that it is in directories.
func (n *node) makeDirectory() error {
	for ; n != nil && n.kind != kindDirectory; n = n.parent {
		if n.kind == kindOther {
			return invalid("%q, which it is in, is not a directory", n.path())
		}
		n.kind = kindDirectory
	}
	return nil
}

type change uint8

const (
	unchanged change = iota // no file, or a name that it had already
	added                   // a file with a name that the layer didn't have
	replaced                // a file with a name that another one had
)

// add adds what an entry says to the layer t, and returns what that changes for files that are no directories.
func (t *tree) add(e entry) (change, error) {
	n, err := t.make(e.name)
	if err != nil {
		return unchanged, err
	}
	t.steps += n.depth
	if e.hdr != nil && e.hdr.Typeflag == tar.TypeLink {
		t.steps += strings.Count(e.hdr.Linkname, "/") + 1
	}
	if entries := e.index + 1; t.steps > freeSteps+stepsPerEntry*entries {
		return unchanged, invalid("directories are nested too deep in each other for a tar of %d entries", entries)
	}
	switch e.kind {
	case entryWhiteout:
		n.whiteout = true
		return unchanged, nil
	case entryOpaque:
		n.opaque = true
		return unchanged, n.makeDirectory()
	}
	if err := n.parent.makeDirectory(); err != nil {
		return unchanged, err
	}
	isDir := e.hdr.Typeflag == tar.TypeDir
	if n.kind != kindAbsent && isDir != (n.kind == kindDirectory) {
		return unchanged, invalid("the tar has it both as a directory and as something else")
	}
	if isDir {
		n.kind, n.hdr = kindDirectory, e.hdr
		return unchanged, nil
	}
	from := origin{t.layer, e.index}
	if e.hdr.Typeflag == tar.TypeLink {
		target, err := t.target(e.hdr.Linkname)
		if err != nil {
			return unchanged, err
		}
		from = target.origin
	}
	was := added
	if n.kind == kindOther {
		was = replaced
		if n.origin == from {
			was = unchanged
		}
	}
	n.kind, n.origin = kindOther, from
	return was, nil
}

// target returns the file that a hard link to name makes another name of.
func (t *tree) target(name string) (*node, error) {
	n := t.find(name)
	where := "the layer"
	if n == nil || n.kind == kindAbsent {
		n = nil
		if t.lower != nil {
			n = t.lower.find(name)
			where = "its layer, and is in none below"
		}
	}
	switch {
	case n == nil:
		return nil, invalid("it is a hard link to %.200q, which does not precede it in %s", name, where)
	case n.kind == kindDirectory:
		return nil, invalid("it is a hard link to the directory %.200q", name)
	}
	return n, nil
}

// settle ends a layer: it decides what absent nodes that are no whiteouts themselves are.
// Whiteouts are about layers below, wherever in the tar they stand.
func (t *tree) settle() error { return t.root.settle() }

func (n *node) settle() error {
	switch {
	case n.kind == kindAbsent && n.whiteout:
		return nil // what was removed in it is gone with it
	case n.kind == kindAbsent:
		n.kind = kindDirectory
	case n.kind == kindOther && len(n.children) > 0:
		return fmt.Errorf("whiteouts: %w", invalid("%q, which they are in, is not a directory", n.path()))
	}
	for _, child := range n.children {
		if err := child.settle(); err != nil {
			return err
		}
	}
	return nil
}

// stack puts upper, a layer that is settled, upon t, which is then what overlayfs
// would make of the two. But a directory for which a layer has no entry
// keeps the metadata that it has below.
func (t *tree) stack(upper *tree) error {
	t.merge(t.root, upper.root)
	if t.nodes > maxEntries {
		return errTooMany()
	}
	return nil
}

// merge merges the directory upper into the directory n.
func (t *tree) merge(n, upper *node) {
	if upper.opaque {
		for _, child := range n.children {
			t.remove(child)
		}
	}
	if upper.hdr != nil {
		n.hdr = upper.hdr
	}
	for name, child := range upper.children {
		below := n.children[name]
		if below != nil && (child.kind != kindDirectory || below.kind != kindDirectory || child.whiteout) {
			t.remove(below)
			below = nil
		}
		switch {
		case child.kind == kindAbsent:
		case child.kind == kindOther:
			t.nodes++
			n.put(&node{name: name, kind: kindOther, origin: child.origin})
		default:
			if below == nil {
				t.nodes++
				below = &node{name: name, kind: kindDirectory}
				n.put(below)
			}
			t.merge(below, child)
		}
	}
}

func (t *tree) remove(n *node) {
	t.nodes -= n.size()
	delete(n.parent.children, n.name)
}

// files calls f for every name that is not a directory's, in sorted order.
func (n *node) files(f func(*node)) {
	if n.kind == kindOther {
		f(n)
	}
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		n.children[name].files(f)
	}
}

// writeDirectories writes the directories from n down, which is at path, each before what is in it, and the whiteouts:
// as the attributes and device nodes that overlayfs has them as.
func (n *node) writeDirectories(w *tar.Writer, path string) error {
	switch n.kind {
	case kindOther:
		return nil
	case kindAbsent:
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeChar, Name: path, Format: tar.FormatPAX})
	}
	hdr := directoryHeader(0o755)
	if n.hdr != nil {
		*hdr = *n.hdr
	}
	hdr.Name = path + "/"
	if n.opaque || n.whiteout {
		hdr.PAXRecords = maps.Clone(hdr.PAXRecords)
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = make(map[string]string)
		}
		hdr.PAXRecords[xattrRecord+opaqueXattr] = "y"
	}
	if err := w.WriteHeader(hdr); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		if err := n.children[name].writeDirectories(w, path+"/"+name); err != nil {
			return err
		}
	}
	return nil
}
