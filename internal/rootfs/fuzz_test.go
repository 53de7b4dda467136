package rootfs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// FuzzConvert checks that every tar is either refused or becomes a file system
// in which e2fsck finds nothing to repair.
func FuzzConvert(f *testing.F) {
	f.Add(layer(f, dir("./"), dir("d/"), file("d/f", "content"), link("d/g", "d/f"), symlink("s", "d")))
	f.Add(layer(f, file("d/.wh.f", ""), file("d/"+opaqueMarker, ""), file(".wh.d", "")))
	f.Add(layer(f, file("f", "1"), file("f", "2"), link("f", "f"), file("lost+found/repeated-1", "")))
	f.Add(layer(f, withXattr(withXattr(dir("d/"), "user.a", strings.Repeat("a", 100)), "security.selinux", "x"), dir("d/")))
	f.Add(layer(f, tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 4, Devminor: 64}, tar.Header{Typeflag: tar.TypeFifo, Name: "p"}))
	f.Add(layer(f, symlink("long", strings.Repeat("l", 300)), file(strings.Repeat("n", 200), "")))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := os.Create(filepath.Join(t.TempDir(), "img"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if _, err := writeImage(t.Context(), out, bytes.NewReader(fixChecksums(b)), 8<<20); err == nil {
			fsck(t, out.Name())
		}
	})
}

// fixChecksums makes the headers of a mutated tar pass, so that what they say gets further than to the tar reader.
func fixChecksums(b []byte) []byte {
	b = bytes.Clone(b)
	for off := 0; off+512 <= len(b); {
		h := b[off : off+512]
		sum := 0
		for i, c := range h {
			if i >= 148 && i < 156 {
				c = ' '
			}
			sum += int(c)
		}
		if sum != 8*' ' {
			copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
		}
		size, err := strconv.ParseUint(strings.Trim(string(h[124:136]), " \x00"), 8, 32)
		if err != nil {
			size = 0
		}
		off += 512 + int(size+511)/512*512
	}
	return b
}
