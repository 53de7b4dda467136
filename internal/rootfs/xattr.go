package rootfs

import (
	"cmp"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
)

const (
	xattrRecord = "SCHILY.xattr."
	opaqueXattr = "trusted.overlay.opaque"
)

// convertXattrs returns the PAX records of those extended attributes among
// records that a file of a layer can have. Attributes of other systems, which Linux
// would refuse too, are left out, and so are those of overlayfs: a layer
// doesn't get to redirect into others.
func convertXattrs(records map[string]string, isDir bool) (map[string]string, error) {
	var out map[string]string
	for key, value := range records {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || !keepXattr(name) {
			continue
		}
		if len(name) > maxName {
			return nil, invalid("the name of an extended attribute is %d bytes long", len(name))
		}
		if isACL(name) {
			acl, err := convertACL(value)
			if err != nil {
				return nil, invalid("extended attribute %s: %w", name, err)
			}
			if acl == "" || name == defaultACL && !isDir {
				continue
			}
			value = acl
		}
		if out == nil {
			out = make(map[string]string)
		}
		out[xattrRecord+name] = value
	}
	return out, checkXattrs(out, isDir)
}

const (
	accessACL  = "system.posix_acl_access"
	defaultACL = "system.posix_acl_default"
)

func isACL(name string) bool { return name == accessACL || name == defaultACL }

func keepXattr(name string) bool {
	if isACL(name) {
		return true
	}
	if strings.HasPrefix(name, "trusted.overlay.") {
		return false
	}
	for _, ns := range []string{"user.", "trusted.", "security."} {
		if strings.HasPrefix(name, ns) && len(name) > len(ns) {
			return true
		}
	}
	return false
}

// convertACL turns an ACL from the form that system calls and tars have it in
// into the one that ext4 has on disk: another version, and no ID in entries
// without one. "" is an ACL without entries.
func convertACL(value string) (string, error) {
	const (
		headerLen, entryLen = 4, 8
		tagUser, tagGroup   = 0x02, 0x08
	)
	b := []byte(value)
	if len(b) < headerLen || (len(b)-headerLen)%entryLen != 0 || binary.LittleEndian.Uint32(b) != 2 {
		return "", invalid("it is no POSIX ACL")
	}
	if len(b) == headerLen {
		return "", nil
	}
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for e := range slices.Chunk(b[headerLen:], entryLen) {
		out = append(out, e[:4]...)
		switch tag := binary.LittleEndian.Uint16(e); tag {
		case tagUser, tagGroup:
			out = append(out, e[4:]...)
		case 0x01, 0x04, 0x10, 0x20: // owner, owning group, mask, others
		default:
			return "", invalid("a POSIX ACL has no tag %#x", tag)
		}
	}
	return string(out), nil
}

// checkXattrs reports attributes that don't fit into an inode and one block, or that tar2ext4
// would write into the block in an order in which Linux doesn't find them again. It
// leaves room for a directory to become opaque.
func checkXattrs(records map[string]string, isDir bool) error {
	if len(records) == 0 {
		return nil
	}
	records = maps.Clone(records)
	if isDir {
		records[xattrRecord+opaqueXattr] = "y"
	}
	type entry struct {
		index int
		name  string
	}
	var block []entry
	inodeLeft, blockLeft := 96, blockSize-36
	for _, key := range slices.Sorted(maps.Keys(records)) {
		index, name := xattrIndex(strings.TrimPrefix(key, xattrRecord))
		size := 16 + (len(name)+3)&^3 + (len(records[key])+3)&^3
		switch {
		case size <= inodeLeft:
			inodeLeft -= size
		case size <= blockLeft:
			blockLeft -= size
			block = append(block, entry{index, name})
		default:
			return invalid("its extended attributes are too large")
		}
	}
	slices.SortFunc(block, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
	})
	for i := 1; i < len(block); i++ {
		if a, b := block[i-1], block[i]; len(b.name) < len(a.name) || b.name < a.name {
			return invalid("it has too many extended attributes")
		}
	}
	return nil
}

// xattrIndex splits name as ext4 does: into the number of its namespace and the rest.
func xattrIndex(name string) (int, string) {
	switch name {
	case accessACL:
		return 2, ""
	case defaultACL:
		return 3, ""
	}
	ns, rest, _ := strings.Cut(name, ".")
	return map[string]int{"user": 1, "trusted": 4, "security": 6}[ns], rest
}
