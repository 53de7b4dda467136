package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestConvertKeeps(t *testing.T) {
	mtime := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	long := strings.Repeat("long/", 100) + "target"
	su := tar.Header{Typeflag: tar.TypeReg, Name: "usr/bin/su", Linkname: "root's", Mode: 0o4755, Uid: 1000, Gid: 100000, ModTime: mtime}
	tmp := dir("./tmp/")
	tmp.Mode = 0o1777
	acl := "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\xe8\x03\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	l := openLayers(t)
	img := convert(t, l, layer(t,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}},
		tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o751, Uid: 7},
		tmp, dir("usr/"), dir("usr/bin/"),
		withXattr(withXattr(su, "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), "user.note", strings.Repeat("n", 300)),
		link("usr/bin/sudo", "usr/bin/su"),
		symlink("usr/bin/short", "su"), symlink("usr/bin/long", long), link("usr/bin/hard-short", "usr/bin/short"),
		file("usr/empty", ""),
		tar.Header{Typeflag: tar.TypeChar, Name: "usr/tty", Mode: 0o620, Devmajor: 5, Devminor: 300},
		tar.Header{Typeflag: tar.TypeBlock, Name: "usr/disk", Mode: 0o660, Devmajor: 259, Devminor: 1},
		tar.Header{Typeflag: tar.TypeFifo, Name: "usr/pipe", Mode: 0o600},
		withXattr(dir("usr/acl/"), accessACL, acl),
		withXattr(file("/usr/foreign", "x"), "com.apple.provenance", "x"),
		withXattr(file("usr/redirect", "x"), "trusted.overlay.redirect", "/etc/shadow"),
	))
	fsck(t, img)
	for request, want := range map[string][]string{
		"stat /":              {"Mode:  0751", "User:     7"},
		"stat /tmp":           {"Mode:  01777", "Type: directory"},
		"stat /usr/bin/su":    {"Mode:  04755", "User:  1000", "Group: 100000", "Links: 2", "mtime: 0x3a7b8372", "security.capability", "user.note (300)"},
		"cat /usr/bin/sudo":   {"root's"},
		"stat /usr/bin/short": {"Type: symlink", `Fast link dest: "su"`, "Links: 2"},
		"cat /usr/bin/long":   {long},
		"stat /usr/empty":     {"Type: regular", "Size: 0"},
		"stat /usr/tty":       {"Type: character special", "Device major/minor number: 05:300 "},
		"stat /usr/disk":      {"Type: block special", "Device major/minor number: 259:01 "},
		"stat /usr/pipe":      {"Type: FIFO", "Mode:  0600"},
		"ea_get -x /usr/bin/su security.capability": {"01 00 00 02 00 20"},
		"ea_get -x /usr/acl " + accessACL:           {"02 00 00 00 01 00 07 00 00 00 00 00 02 00 05 00 e8 03 00 00 04 00 05 00 00 00 00 00 10 00 05 00 00 00 00 00 20 00 00 00 00 00 00 00"},
	} {
		out := debugfs(t, img, request)
		if strings.HasPrefix(request, "cat ") {
			out = e2fs(t, "debugfs", "-R", request, img)
		}
		wantContains(t, request, out, want...)
	}
	if ls := debugfs(t, img, "ls /"); strings.Contains(ls, "pax_global_header") {
		t.Errorf("the global header became a file:\n%s", ls)
	}
	for _, name := range []string{"/usr/foreign", "/usr/redirect"} {
		if out := debugfs(t, img, "ea_list "+name); strings.Contains(out, "(1)") || strings.Contains(out, "redirect") {
			t.Errorf("%s kept attributes that a layer can't have:\n%s", name, out)
		}
	}
	if fi, err := os.Stat(img); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("the image has mode %v, %v, want 0444", fi.Mode(), err)
	}
}

func TestConvertWhiteouts(t *testing.T) {
	conf := withXattr(dir("etc/"), "user.kept", "yes")
	conf.Mode, conf.Uid = 0o700, 42
	img := convert(t, openLayers(t), layer(t,
		file("etc/.wh.gone", ""), file("etc/"+opaqueMarker, ""), conf, file("etc/new", "n"),
		file("not/in/layer/.wh.gone", ""),
		file("both/.wh.file", ""), file("both/file", "f"),
		file("both/.wh.dir", ""), dir("both/dir/"), file("both/dir/x", "x"),
		file(".wh.removed", ""), file("removed/.wh.inside", ""),
		file("only/opaque/"+opaqueMarker, ""),
		file("etc/.wh..wh.aufs", ""), file("etc/.wh..wh.plnk", ""),
		file(opaqueMarker, ""),
	))
	fsck(t, img)
	for request, want := range map[string][]string{
		"stat /etc":               {"Mode:  0700", "User:    42", `user.kept (3) = "yes"`, `trusted.overlay.opaque (1) = "y"`},
		"stat /etc/gone":          {"Type: character special", "Device major/minor number: 00:00 "},
		"stat /etc/new":           {"Type: regular"},
		"stat /not/in/layer":      {"Type: directory", "Mode:  0755", "User:     0"},
		"stat /not/in/layer/gone": {"Type: character special", "Device major/minor number: 00:00 "},
		"stat /both/file":         {"Type: regular", "Size: 1"},
		"stat /both/dir":          {"Type: directory", `trusted.overlay.opaque (1) = "y"`},
		"stat /both/dir/x":        {"Type: regular"},
		"stat /removed":           {"Type: character special", "Device major/minor number: 00:00 "},
		"stat /only/opaque":       {"Type: directory", "Mode:  0755", `trusted.overlay.opaque (1) = "y"`},
		"stat /":                  {`trusted.overlay.opaque (1) = "y"`},
	} {
		wantContains(t, request, debugfs(t, img, request), want...)
	}
	for _, d := range []string{"/", "/etc", "/both"} {
		if ls := debugfs(t, img, "ls "+d); strings.Contains(ls, ".wh.") {
			t.Errorf("%s has a marker left:\n%s", d, ls)
		}
	}
}

func TestConvertRepeats(t *testing.T) {
	private := dir("d/")
	private.Mode = 0o700
	img := convert(t, openLayers(t), layer(t,
		dir("d/"), file("d/f", strings.Repeat("old", 5000)), file("d/f", "new"), private,
		symlink("d/l", "f"), link("d/l", "d/f"), link("d/l", "d/l"), link("d/l", "d/f"),
	))
	fsck(t, img)
	wantContains(t, "d", debugfs(t, img, "stat /d"), "Mode:  0700")
	displaced := debugfs(t, img, "ls /lost+found")
	wantContains(t, "lost+found", displaced, "repeated-1", "repeated-2")
	if strings.Contains(displaced, "repeated-3") {
		t.Errorf("a link that was there already displaced something:\n%s", displaced)
	}
	for _, name := range []string{"/d/f", "/d/l"} {
		wantContains(t, name, e2fs(t, "debugfs", "-R", "cat "+name, img), "new")
	}
}

func TestConvertRejects(t *testing.T) {
	many := file("many", "")
	for i := range 40 {
		many = withXattr(many, fmt.Sprintf("user.%0*d", 40-i, i), strings.Repeat("v", 60))
	}
	big := tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 40}
	for name, tc := range map[string]struct {
		tar  []byte
		want string
	}{
		"parent above root":  {layer(t, file("../etc/passwd", "x")), "outside the layer"},
		"dots in the middle": {layer(t, file("a/../../b", "x")), "outside the layer"},
		"hard link outside":  {layer(t, link("a", "../../etc/shadow")), "outside the layer"},
		"hard link to later": {layer(t, link("a", "b"), file("b", "x")), "does not precede it"},
		"hard link to dir":   {layer(t, dir("d/"), link("a", "d")), "hard link to the directory"},
		"below a symlink":    {layer(t, symlink("d", "/etc"), file("d/passwd", "x")), "not a directory"},
		"below a file":       {layer(t, file("d", "x"), file("d/e/f", "x")), "not a directory"},
		"dir over file":      {layer(t, file("d", "x"), dir("d/")), "both as a directory"},
		"file over dir":      {layer(t, dir("d/"), file("d", "x")), "both as a directory"},
		"file as root":       {layer(t, symlink("./", "x")), "root of a layer"},
		"empty whiteout":     {layer(t, file("d/.wh.", "")), "removes nothing"},
		"whiteout of dots":   {layer(t, file("d/.wh...", "")), "removes nothing"},
		"long name":          {layer(t, file(strings.Repeat("n", 256), "x")), "too long"},
		"long path":          {layer(t, file(strings.Repeat("p/", 2100)+"x", "x")), "too long"},
		"long symlink":       {layer(t, symlink("s", strings.Repeat("s", 4096))), "symbolic link"},
		"empty symlink":      {layer(t, symlink("s", "")), "symbolic link"},
		"large xattr":        {layer(t, withXattr(file("f", ""), "user.x", strings.Repeat("x", 5000))), "too large"},
		"unsortable xattrs":  {layer(t, many), "too many extended"},
		"damaged ACL":        {layer(t, withXattr(file("f", ""), accessACL, "acl")), "POSIX ACL"},
		"owner":              {layer(t, big), "out of range"},
		"device":             {layer(t, tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 5000}), "out of range"},
		"unknown type":       {layer(t, tar.Header{Typeflag: 'Z', Name: "z"}), "not supported"},
		"no tar":             {bytes.Repeat([]byte("shed"), 500), "damaged"},
		"cut short":          {layer(t, file("f", strings.Repeat("x", 4000)))[:2000], "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			l := openLayers(t)
			_, _, err := l.Convert(t.Context(), bytes.NewReader(tc.tar), v1.Hash{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if code := shed.ErrorCode(err); code != shed.CodeInvalid {
				t.Errorf("its code is %s, want %s", code, shed.CodeInvalid)
			}
			_, err = l.Merge(t.Context(), []MergeLayer{mergeLayer(layer(t, dir("d/"))), mergeLayer(tc.tar)})
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("merging gives %v", err)
			}
			wantNothing(t, l)
		})
	}
}

func TestConvertDeclared(t *testing.T) {
	l := openLayers(t)
	b := layer(t, file("f", "x"))
	wrong := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}
	_, _, err := l.Convert(t.Context(), bytes.NewReader(b), wrong)
	if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), wrong.Hex) || !strings.Contains(err.Error(), sum(b).Hex) {
		t.Errorf("another diff ID than declared gives %v", err)
	}
	wantNothing(t, l)
	if _, ok := l.Path(sum(b)); ok {
		t.Error("Path has a layer that was never made")
	}
	// What follows the tar's end belongs to the diff ID.
	b = append(b, make([]byte, 100_000)...)
	kept := false
	if _, _, err := l.ConvertNew(t.Context(), bytes.NewReader(layer(t, file("new", ""))), func(id v1.Hash) {
		path, there := l.Path(id)
		kept = !there && path != ""
	}); err != nil || !kept {
		t.Errorf("ConvertNew: %v; that it says the diff ID before the image is there is %t", err, kept)
	}
	id, path, err := l.Convert(t.Context(), bytes.NewReader(b), sum(b))
	if err != nil || id != sum(b) {
		t.Fatalf("got %s, %v", id, err)
	}
	if got, ok := l.Path(id); !ok || got != path {
		t.Errorf("Path says %q, %t, want %q", got, ok, path)
	}
	if _, again, err := l.Convert(t.Context(), unreadable{}, id); err != nil || again != path {
		t.Errorf("converting again gives %q, %v", again, err)
	}
	evil := v1.Hash{Algorithm: "sha256", Hex: "../../../etc/passwd"}
	if p, ok := l.Path(evil); ok {
		t.Errorf("%v has a path: %s", evil, p)
	}
	if _, _, err := l.Convert(t.Context(), unreadable{}, evil); shed.ErrorCode(err) != shed.CodeUnsupported {
		t.Errorf("%v gives %v", evil, err)
	}
}

type unreadable struct{}

func (unreadable) Read([]byte) (int, error) { return 0, errors.New("must not be read") }

func TestConvertConcurrently(t *testing.T) {
	l := openLayers(t)
	b := layer(t, file("f", strings.Repeat("x", 1<<20)))
	var readers atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			once := sync.OnceFunc(func() { readers.Add(1) })
			r := readerFunc(func(p []byte) (int, error) { once(); return 0, io.EOF })
			if _, _, err := l.Convert(t.Context(), io.MultiReader(bytes.NewReader(b), r), sum(b)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := readers.Load(); n != 1 {
		t.Errorf("%d calls did the work, want 1", n)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A failure is nobody else's: who waited tries with a reader of its own.
func TestConvertAfterFailure(t *testing.T) {
	l := openLayers(t)
	b := layer(t, file("f", "x"))
	reading, fail := make(chan struct{}), make(chan struct{})
	broken := errors.New("connection reset")
	first := make(chan error)
	go func() {
		_, _, err := l.Convert(t.Context(), readerFunc(func([]byte) (int, error) {
			close(reading)
			<-fail
			return 0, broken
		}), sum(b))
		first <- err
	}()
	<-reading

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Convert(ctx, unreadable{}, sum(b)); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting with a cancelled context gives %v", err)
	}
	second := make(chan error)
	go func() {
		_, _, err := l.Convert(t.Context(), bytes.NewReader(b), sum(b))
		second <- err
	}()
	close(fail)
	if err := <-first; !errors.Is(err, broken) {
		t.Errorf("a broken reader gives %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the next one fails too: %v", err)
	}
}

func TestConvertCancelled(t *testing.T) {
	l := openLayers(t)
	ctx, cancel := context.WithCancel(t.Context())
	b := layer(t, file("f", strings.Repeat("x", 1<<20)))
	r := io.MultiReader(bytes.NewReader(b[:1<<19]), readerFunc(func([]byte) (int, error) { cancel(); return 0, nil }), bytes.NewReader(b[1<<19:]))
	if _, _, err := l.Convert(ctx, r, v1.Hash{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	wantNothing(t, l)
}

func TestOpenLayersRemovesLeftovers(t *testing.T) {
	l := openLayers(t)
	path := convert(t, l, layer(t, file("f", "x")))
	merged := merge(t, l, mergeLayer(layer(t, file("f", "x"))))
	for _, p := range []string{path, merged} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(p), tempPrefix+"123"), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenLayers(filepath.Dir(l.dir)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, merged} {
		left, err := os.ReadDir(filepath.Dir(p))
		if err != nil || len(left) != 1 || left[0].Name() != filepath.Base(p) {
			t.Errorf("left are %v, %v, want the image alone", left, err)
		}
	}
}
