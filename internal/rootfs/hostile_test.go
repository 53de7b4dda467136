package rootfs

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// bothWays converts a layer, and merges it too, and returns both images.
func bothWays(t *testing.T, b []byte) map[string]string {
	t.Helper()
	l := openLayers(t)
	images := map[string]string{"converted": convert(t, l, b), "merged": merge(t, l, mergeLayer(b))}
	for _, img := range images {
		fsck(t, img)
	}
	return images
}

// tarOf returns a reader of the tar that write writes.
func tarOf(t *testing.T, write func(*tar.Writer) error) io.Reader {
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w := tar.NewWriter(pw)
		err := write(w)
		if err == nil {
			err = w.Close()
		}
		pw.CloseWithError(err)
	}()
	t.Cleanup(func() {
		pr.Close()
		<-done
	})
	return pr
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestConvertZeros(t *testing.T) {
	const size = 1 << 30
	r := tarOf(t, func(w *tar.Writer) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: size}); err != nil {
			return err
		}
		_, err := io.CopyN(w, zeros{}, size)
		return err
	})
	_, img, err := openLayers(t).Convert(t.Context(), r, v1.Hash{})
	if err != nil {
		t.Fatal(err)
	}
	wantSparse(t, img, "/zeros", size)
}

func wantSparse(t *testing.T, img, name string, size int64) {
	t.Helper()
	fsck(t, img)
	if used := DiskUsage(img); used == 0 || used > 4<<20 {
		t.Errorf("%d bytes of almost nothing use %d on disk", size, used)
	}
	wantContains(t, name, debugfs(t, img, "stat "+name), fmt.Sprintf("Size: %d", size))
}

func TestConvertKeepsContentBetweenHoles(t *testing.T) {
	content := strings.Repeat("\x00", 16<<20) + "end"
	for how, img := range bothWays(t, layer(t, file("holes", content))) {
		if used := DiskUsage(img); used == 0 || used > 2<<20 {
			t.Errorf("%s: 16 MB of zeros use %d bytes on disk", how, used)
		}
		if got := e2fs(t, "debugfs", "-R", "cat /holes", img); !strings.HasSuffix(got, content) {
			t.Errorf("%s: the file comes back with %d bytes that differ", how, len(got))
		}
	}
}

// gnuSparse is a sparse file in GNU tar's old format: of size bytes, the last of which are end.
func gnuSparse(name, end string, size int64) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x00")
	copy(h[124:], fmt.Sprintf("%011o", len(end)))
	h[156] = tar.TypeGNUSparse
	copy(h[257:], "ustar  \x00")
	base256 := func(field []byte, n int64) {
		field[0] = 0x80
		binary.BigEndian.PutUint64(field[4:], uint64(n))
	}
	base256(h[386:398], size-int64(len(end)))
	base256(h[398:410], int64(len(end)))
	base256(h[483:495], size)
	return fixChecksums(append(append(h, pad(end)...), make([]byte, 1024)...))
}

// paxSparse is the same in version 1.0 of its PAX format.
func paxSparse(name, end string, size int64) []byte {
	var records strings.Builder
	for _, kv := range []string{
		"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=" + name, fmt.Sprint("GNU.sparse.realsize=", size),
	} {
		records.WriteString(paxRecord(kv))
	}
	header := func(name string, typ byte, stored int) []byte {
		h := make([]byte, 512)
		copy(h, name)
		copy(h[100:], "0000644\x00")
		copy(h[124:], fmt.Sprintf("%011o", stored))
		h[156] = typ
		copy(h[257:], "ustar\x0000")
		return h
	}
	content := append(pad(fmt.Sprintf("1\n%d\n%d\n", size-int64(len(end)), len(end))), end...)
	return fixChecksums(bytes.Join([][]byte{
		header("x", tar.TypeXHeader, records.Len()), pad(records.String()),
		header("GNUSparseFile.0/"+name, tar.TypeReg, len(content)), pad(string(content)), make([]byte, 1024),
	}, nil))
}

func paxRecord(kv string) string {
	for n := len(kv); ; n++ {
		if r := fmt.Sprintf("%d %s\n", n, kv); len(r) == n {
			return r
		}
	}
}

func pad(s string) []byte {
	return append([]byte(s), make([]byte, -len(s)&511)...)
}

func TestConvertSparse(t *testing.T) {
	// One has a size that a header has no octal digits for.
	for name, tc := range map[string]struct {
		tar  []byte
		size int64
	}{
		"GNU": {gnuSparse("f", "end", 9<<30), 9 << 30},
		"PAX": {paxSparse("f", "end", 1<<30), 1 << 30},
	} {
		t.Run(name, func(t *testing.T) {
			img := convert(t, openLayers(t), tc.tar)
			wantSparse(t, img, "/f", tc.size)
			f, err := os.Open(img)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// The end of the file is alone in its block.
			var found bool
			for pos := int64(0); !found; {
				start, end, err := nextData(f, pos)
				if err != nil {
					t.Fatalf("the end of the file is nowhere: %v", err)
				}
				b := make([]byte, end-start)
				if _, err := f.ReadAt(b, start); err != nil {
					t.Fatal(err)
				}
				found = bytes.Contains(b, append(make([]byte, 100), "end"...))
				pos = end
			}
		})
	}
}

func TestConvertTooLarge(t *testing.T) {
	for name, tc := range map[string]struct {
		tar   io.Reader
		limit int64
		want  string
	}{
		"content": {bytes.NewReader(layer(t, file("f", strings.Repeat("x", 2<<20)))), 1 << 20, "the tar has more than 1048576 bytes"},
		"ignored content": {tarOf(t, func(w *tar.Writer) error {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: ".wh.f", Size: 1 << 40}); err != nil {
				return err
			}
			_, err := io.Copy(w, zeros{})
			return err
		}), 1 << 20, "the tar has more than 1048576 bytes"},
		"holes":         {bytes.NewReader(gnuSparse("f", "end", 9<<30)), 1 << 30, "exceeded maximum size of 1073741824 bytes"},
		"endless zeros": {io.MultiReader(bytes.NewReader(layer(t, dir("d/"))), zeros{}), maxImage, "more than 16 MB follow the end of the tar"},
		"endless garbage": {io.MultiReader(bytes.NewReader(layer(t, dir("d/"))), readerFunc(func(p []byte) (int, error) {
			for i := range p {
				p[i] = 'x'
			}
			return len(p), nil
		})), maxImage, "more than 16 MB follow the end of the tar"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "img"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = writeLayer(t.Context(), f, tc.tar, tc.limit)
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

// A tar may imply many more directories than it has entries.
func TestManyDirectories(t *testing.T) {
	tree := newTree(0, nil)
	var err error
	for i := 0; i < maxEntries/5+1 && err == nil; i++ {
		name := fmt.Sprintf("%d/d/d/d/f", i)
		_, err = tree.add(entry{name: name, index: i, hdr: &tar.Header{Typeflag: tar.TypeReg}})
	}
	if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "more than 2097152 files and directories") {
		t.Errorf("got %v, want an error about their number", err)
	}
}

// What a tar costs is in proportion to its entries, however deep the directories are that their names imply.
func TestDeepDirectories(t *testing.T) {
	deep := strings.Repeat("d/", 2000)
	for name, nth := range map[string]func(i int) tar.Header{
		"implied":     func(i int) tar.Header { return file(fmt.Sprintf("%d/%sf", i, deep), "") },
		"many in one": func(i int) tar.Header { return file(fmt.Sprint(deep, i), "") },
		"repeated":    func(i int) tar.Header { return file(deep+"f", "") },
		"whiteouts":   func(i int) tar.Header { return file(fmt.Sprint(deep, whiteoutPrefix, i), "") },
		"links": func(i int) tar.Header {
			if i == 0 {
				return file(deep+"f", "")
			}
			return link(fmt.Sprint(i), deep+"f")
		},
	} {
		t.Run(name, func(t *testing.T) {
			var written atomic.Int64
			read := tarOf(t, func(w *tar.Writer) error {
				for i := range 10_000 {
					hdr := nth(i)
					hdr.Size = 0
					if err := w.WriteHeader(&hdr); err != nil {
						return err
					}
					written.Store(int64(i))
				}
				return nil
			})
			_, _, err := openLayers(t).Convert(t.Context(), read, v1.Hash{})
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "nested too deep") {
				t.Errorf("got %.300v, want an error about the depth", err)
			}
			// Each takes 2,000 steps at least. Reading is ahead by what buffers hold.
			const most = freeSteps/(2000-stepsPerEntry) + 1000
			if n := written.Load(); n > most {
				t.Errorf("it took %d entries to find that out, want at most %d", n, most)
			}
		})
	}
}

func TestConvertPadding(t *testing.T) {
	b := append(layer(t, file("f", "x")), make([]byte, 8<<20)...)
	for how, img := range bothWays(t, b) {
		if got := snapshotOf(t, img); got["f"] == "" {
			t.Errorf("%s: got %v", how, got)
		}
	}
}

func TestConvertHostileRejects(t *testing.T) {
	links := make([]tar.Header, 0, 70000)
	links = append(links, file("f", "x"))
	dirs := make([]tar.Header, 0, 70000)
	for i := range 70000 {
		links = append(links, link(fmt.Sprintf("l%d", i), "f"))
		dirs = append(dirs, dir(fmt.Sprintf("d%d/", i)))
	}
	huge := tar.Header{Typeflag: tar.TypeReg, Name: "huge", Mode: 0o644, Size: maxFile + 1}
	var hugeTar bytes.Buffer
	if err := tar.NewWriter(&hugeTar).WriteHeader(&huge); err != nil {
		t.Fatal(err)
	}
	lying := layer(t, file("a", "x"), file("b", "y"))
	copy(lying[124:], "00000000000\x00") // so that the content stands where a header should
	record := make([]byte, 512)
	copy(record, "x")
	copy(record[124:], fmt.Sprintf("%011o", 2<<20))
	record[156] = tar.TypeXHeader
	copy(record[257:], "ustar\x0000")
	socket := layer(t, tar.Header{Typeflag: 's', Name: "socket"})
	for name, tc := range map[string]struct {
		tar  []byte
		want string
	}{
		"many links":         {layer(t, links...), "maximum link count"},
		"many directories":   {layer(t, dirs...), "maximum link count"},
		"huge file":          {hugeTar.Bytes(), "larger than a layer can hold"},
		"lying size":         {append(fixChecksums(lying[:512]), lying[512:]...), "damaged"},
		"truncated":          {layer(t, file("f", strings.Repeat("x", 100_000)))[:50_000], "damaged"},
		"huge record":        {append(fixChecksums(record), bytes.Repeat([]byte("x"), 3<<20)...), "damaged"},
		"deep directories":   {layer(t, dir(strings.Repeat("d/", 10_000))), "a path of 19999 bytes is too long"},
		"link to itself":     {layer(t, link("a", "a")), "does not precede it"},
		"links to another":   {layer(t, link("a", "b"), link("b", "a")), "does not precede it"},
		"link from absolute": {layer(t, link("a", "/etc/passwd")), "does not precede it"},
		"long link":          {layer(t, file("f", ""), link("a", strings.Repeat("f/", 3000))), "too long"},
		"socket":             {socket, "not supported"},
		"huge xattr":         {layer(t, withXattr(file("f", ""), "user.x", strings.Repeat("x", 900_000))), "too large"},
		"whiteout in a file": {layer(t, file("d/.wh.f", ""), file("d", "x")), "is not a directory"},
		"opaque file":        {layer(t, file("d", "x"), file("d/"+opaqueMarker, "")), "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			l := openLayers(t)
			_, _, err := l.Convert(t.Context(), bytes.NewReader(tc.tar), v1.Hash{})
			_, merr := l.Merge(t.Context(), []MergeLayer{mergeLayer(layer(t, dir("lower/"))), mergeLayer(tc.tar)})
			for how, err := range map[string]error{"converting": err, "merging": merr} {
				if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%s gives %.300v, want an error with %q", how, err, tc.want)
				} else if len(err.Error()) > 1000 {
					t.Errorf("%s gives an error of %d bytes", how, len(err.Error()))
				}
			}
			wantNothing(t, l)
		})
	}
}

func TestConvertOddNames(t *testing.T) {
	long := strings.Repeat("n", maxName)
	b := layer(t,
		file("new\nline", "1"), file("not \xff UTF-8", "2"), file(long, "3"), file("-R", "4"), file(`back\slash`, "5"), file("/absolute", "6"),
		file(whiteoutPrefix+strings.Repeat("w", maxName), ""),
	)
	for how, img := range bothWays(t, b) {
		raw, err := os.ReadFile(img)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"new\nline", "not \xff UTF-8", long, "-R", `back\slash`, "absolute"} {
			// A directory entry has the lengths of itself and of the name, and the type, before the name.
			if !bytes.Contains(raw, append([]byte{byte(len(name)), 1}, name...)) {
				t.Errorf("%s: there is no %q", how, name)
			}
		}
		if removed := bytes.Contains(raw, []byte(strings.Repeat("w", maxName))); removed != (how == "converted") {
			t.Errorf("%s: that it has a whiteout of a long name is %t", how, removed)
		}
	}
}

func TestConvertDeep(t *testing.T) {
	deep := strings.Repeat("d/", 1000)
	for how, img := range bothWays(t, layer(t, file(deep+"f", "deep"))) {
		if got := e2fs(t, "debugfs", "-R", "cat /"+deep+"f", img); !strings.HasSuffix(got, "deep") {
			t.Errorf("%s: the file is not there: %.300s", how, got)
		}
	}
}

func TestConvertManyFiles(t *testing.T) {
	const files = 50_000
	entries := make([]tar.Header, files)
	for i := range entries {
		entries[i] = file(fmt.Sprintf("%d/%d", i/100, i), "tiny")
	}
	for how, img := range bothWays(t, layer(t, entries...)) {
		// The files, the directories that they are in, the root, lost+found and the inodes that ext4 reserves.
		wantContains(t, how, e2fs(t, "e2fsck", "-fn", img), fmt.Sprintf("%d/", files+files/100+11))
	}
}

// Nothing in a layer passes for what overlayfs keeps of its own.
func TestConvertOverlayMetadata(t *testing.T) {
	f := withXattr(file("f", "x"), "trusted.overlay.metacopy", "")
	f = withXattr(withXattr(f, "trusted.overlay.redirect", "/etc/shadow"), "trusted.overlay.overlay.opaque", "y")
	d := withXattr(withXattr(dir("d/"), "trusted.overlay.opaque", "y"), "user.kept", "yes")
	d = withXattr(withXattr(d, "trusted.overlay.origin", "x"), "trusted.kept", "too")
	l := openLayers(t)
	lower := layer(t, dir("d/"), file("d/lower", ""), file("removed", ""))
	upper := layer(t, f, d, tar.Header{Typeflag: tar.TypeChar, Name: "removed"})
	for how, img := range map[string]string{"converted": convert(t, l, upper), "merged": merge(t, l, mergeLayer(lower), mergeLayer(upper))} {
		fsck(t, img)
		got := snapshotOf(t, img)
		for name, want := range map[string]string{"f": "map[]", "d": "map[trusted.kept:too user.kept:yes]"} {
			if !strings.HasSuffix(got[name], want) {
				t.Errorf("%s: %s is %s, want %s", how, name, got[name], want)
			}
		}
		if how == "converted" {
			continue
		}
		if got["d/lower"] == "" || got["removed"] != "" {
			t.Errorf("%s: got %v, want d/lower and not what the device 0:0 hides", how, got)
		}
	}
}
