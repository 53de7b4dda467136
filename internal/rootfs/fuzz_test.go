package rootfs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
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
		// What is refused may be anything.
		_ = writeConverted(t, fixChecksums(b))
	})
}

// FuzzMerge checks the same of two layers, and that what can be converted can be merged: an upper layer is
// refused for what it says itself, not for what is below it.
func FuzzMerge(f *testing.F) {
	lower := layer(f, dir("d/"), file("d/f", "content"), link("d/g", "d/f"), symlink("s", "d"), file("x", "1"))
	f.Add(lower, layer(f, file("d/.wh.f", ""), link("h", "d/f"), file("s/f", ""), dir("x/")))
	f.Add(lower, layer(f, file("d/"+opaqueMarker, ""), file("d/new", ""), tar.Header{Typeflag: tar.TypeChar, Name: "x"}))
	f.Add(lower, layer(f, file("d", ""), link("d2", "d/g"), file(".wh.s", ""), file("x/.wh.y", "")))
	f.Add(layer(f, withXattr(dir("d/"), "user.a", "1")), layer(f, file("d/f", "1"), file("d/f", "2"), link("d/h", "d/f"), file(".wh.d", "")))
	f.Add([]byte{}, gnuSparse("f", "end", 1<<20))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		a, b = fixChecksums(a), fixChecksums(b)
		if writeConverted(t, a) != nil {
			return
		}
		convertErr := writeConverted(t, b)
		layers := []MergeLayer{mergeLayer(a), mergeLayer(b)}
		mergeErr := write(t, func(out *os.File) error {
			merged, err := mergeTrees(t.Context(), layers)
			if err != nil {
				return err
			}
			return writeImage(out, 32<<20, func(w io.Writer) error { return writeMerged(t.Context(), w, merged, layers) })
		})
		if convertErr == nil && mergeErr != nil {
			t.Errorf("merging gives %v", mergeErr)
		}
	})
}

// writeConverted converts a layer, and checks the image if there is no error.
func writeConverted(t *testing.T, b []byte) error {
	t.Helper()
	return write(t, func(out *os.File) error {
		_, err := writeLayer(t.Context(), out, bytes.NewReader(b), 8<<20)
		return err
	})
}

// write has an image written, and checks it if there is no error.
func write(t *testing.T, image func(*os.File) error) error {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "img"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := image(out); err != nil {
		return err
	}
	fsck(t, out.Name())
	return nil
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
