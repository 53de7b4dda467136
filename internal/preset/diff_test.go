package preset

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// testEntry is an entry of a tar in short: a name, with a slash at the end for a directory; and
// what follows it: "=CONTENT", "->TARGET" for a symbolic link, "==NAME" for a hard link, "#" for a device, nothing for the content "".
type testEntry struct {
	spec string
	edit func(*tar.Header)
}

func header(spec string) (*tar.Header, string) {
	hdr := &tar.Header{Mode: 0o644, ModTime: time.Unix(1e9, 0), Format: tar.FormatPAX}
	if name, target, ok := strings.Cut(spec, "=="); ok {
		hdr.Typeflag, hdr.Name, hdr.Linkname = tar.TypeLink, name, target
		return hdr, ""
	}
	if name, target, ok := strings.Cut(spec, "->"); ok {
		hdr.Typeflag, hdr.Name, hdr.Linkname = tar.TypeSymlink, name, target
		return hdr, ""
	}
	if name, ok := strings.CutSuffix(spec, "#"); ok {
		hdr.Typeflag, hdr.Name, hdr.Devmajor, hdr.Devminor = tar.TypeChar, name, 1, 3
		return hdr, ""
	}
	name, content, _ := strings.Cut(spec, "=")
	hdr.Typeflag, hdr.Name, hdr.Size = tar.TypeReg, name, int64(len(content))
	if strings.HasSuffix(name, "/") {
		hdr.Typeflag, hdr.Mode = tar.TypeDir, 0o755
	}
	return hdr, content
}

func tarFrom(t testing.TB, entries ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		var te testEntry
		switch e := e.(type) {
		case string:
			te.spec = e
		case testEntry:
			te = e
		}
		hdr, content := header(te.spec)
		if te.edit != nil {
			te.edit(hdr)
		}
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func mustRead(t testing.TB, b []byte) *layer {
	t.Helper()
	l, err := readLayer(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mergeTars(t testing.TB, tars ...[]byte) map[string]*inode {
	t.Helper()
	layers := make([]*layer, len(tars))
	for i, b := range tars {
		layers[i] = mustRead(t, b)
	}
	return merge(layers)
}

func diffTars(t testing.TB, upper []byte, lower ...[]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := diff(&out, mergeTars(t, lower...), mustRead(t, upper), bytes.NewReader(upper)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// specs are the entries of a tar in short.
func specs(t testing.TB, b []byte) []string {
	t.Helper()
	out := []string{}
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		s := hdr.Name
		switch {
		case hdr.Typeflag == tar.TypeLink:
			s += "==" + hdr.Linkname
		case hdr.Typeflag == tar.TypeSymlink:
			s += "->" + hdr.Linkname
		case hdr.Typeflag == tar.TypeChar:
			s += "#"
		case len(content) > 0:
			s += "=" + string(content)
		}
		out = append(out, s)
	}
}

// differ says how two trees differ, "" if they don't: files, and which names are links of one.
func differ(a, b map[string]*inode) string {
	if names := slices.Sorted(maps.Keys(a)); !slices.Equal(names, slices.Sorted(maps.Keys(b))) {
		return fmt.Sprintf("%q and %q", names, slices.Sorted(maps.Keys(b)))
	}
	for name := range a {
		if !a[name].equal(b[name]) {
			return fmt.Sprintf("%s: %+v and %+v", name, a[name].hdr, b[name].hdr)
		}
		la, lb := slices.Sorted(slices.Values(live(a, a[name]))), slices.Sorted(slices.Values(live(b, b[name])))
		if !slices.Equal(la, lb) {
			return fmt.Sprintf("%s has the names %q and %q", name, la, lb)
		}
	}
	return ""
}

func mode(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
func owner(id int) func(*tar.Header) { return func(h *tar.Header) { h.Uid = id } }
func mtime(sec int64) func(*tar.Header) {
	return func(h *tar.Header) { h.ModTime = time.Unix(sec, 5e8) }
}
func xattr(k, v string) func(*tar.Header) {
	return func(h *tar.Header) { h.PAXRecords = map[string]string{xattrRecord + k: v} }
}

func TestDiff(t *testing.T) {
	for name, tt := range map[string]struct {
		lower, upper []any
		want         []string
	}{
		"nothing":              {[]any{"d/", "d/f=x", "l->d", "n#"}, []any{"d/", "d/f=x", "l->d", "n#"}, nil},
		"other spelling":       {[]any{"d/", "d/f=x"}, []any{"./", "./d/", "./d/f=x"}, nil},
		"added":                {[]any{"./", "d/", "d/f=x"}, []any{"./", "d/", "d/e/", "d/e/g=y", "d/f=x"}, []string{"./", "d/", "d/e/", "d/e/g=y"}},
		"content of that size": {[]any{"d/", "d/f=x", "g"}, []any{"d/", "d/f=y", "g"}, []string{"d/", "d/f=y"}},
		"removed":              {[]any{"d/", "d/f=x", "d/g=x"}, []any{"d/", "d/f=x"}, []string{"d/", "d/.wh.g"}},
		"removed at the top":   {[]any{"f"}, []any{}, []string{".wh.f"}},
		"tree removed":         {[]any{"d/", "d/e/", "d/e/f=x"}, []any{"d/"}, []string{"d/", "d/.wh.e"}},
		"file for a tree":      {[]any{"d/", "d/e/", "d/e/f"}, []any{"d/", "d/e=x"}, []string{"d/", "d/e=x"}},
		"tree for a file":      {[]any{"d/", "d/e=x"}, []any{"d/", "d/e/", "d/e/f"}, []string{"d/", "d/e/", "d/e/f"}},
		"link for a tree":      {[]any{"d/", "d/f"}, []any{"e/", "e/f", "d->e"}, []string{"e/", "e/f", "d->e"}},
		"link elsewhere":       {[]any{"l->a"}, []any{"l->b"}, []string{"l->b"}},
		"only times": {
			[]any{"d/", "d/f=x"},
			[]any{testEntry{"d/", mtime(5)}, testEntry{"d/f=x", mtime(7)}}, nil,
		},
		"mode":           {[]any{"d/", "d/f"}, []any{"d/", testEntry{"d/f", mode(0o4755)}}, []string{"d/", "d/f"}},
		"mode of a tree": {[]any{"d/", "d/f"}, []any{testEntry{"d/", mode(0o700)}, "d/f"}, []string{"d/"}},
		"owner":          {[]any{"f"}, []any{testEntry{"f", owner(7)}}, []string{"f"}},
		"xattr":          {[]any{testEntry{"f", xattr("user.a", "1")}}, []any{testEntry{"f", xattr("user.a", "2")}}, []string{"f"}},
		"xattr stays":    {[]any{testEntry{"f", xattr("user.a", "1")}}, []any{testEntry{"f", xattr("user.a", "1")}}, nil},
		"device":         {[]any{"n#"}, []any{testEntry{"n#", func(h *tar.Header) { h.Devminor = 5 }}}, []string{"n#"}},

		"links stay":           {[]any{"a=x", "b==a"}, []any{"a=x", "b==a"}, nil},
		"links in other order": {[]any{"a=x", "b==a"}, []any{"b=x", "a==b"}, nil},
		"links gain one":       {[]any{"a=x"}, []any{"a=x", "b==a"}, []string{"a=x", "b==a"}},
		"links lose one":       {[]any{"a=x", "b==a", "c==a"}, []any{"a=x", "c==a"}, []string{"a=x", "c==a", ".wh.b"}},
		"links lose the first": {[]any{"a=x", "b==a", "c==a"}, []any{"b=x", "c==b"}, []string{"b=x", "c==b", ".wh.a"}},
		"links part":           {[]any{"a=x", "b==a"}, []any{"a=x", "b=x"}, []string{"a=x", "b=x"}},
		"links meet":           {[]any{"a=x", "b=x"}, []any{"a=x", "b==a"}, []string{"a=x", "b==a"}},
		"links change":         {[]any{"a=x", "d/", "d/b==a"}, []any{"a=y", "d/", "d/b==a"}, []string{"a=y", "d/", "d/b==a"}},
	} {
		t.Run(name, func(t *testing.T) {
			lower, upper := tarFrom(t, tt.lower...), tarFrom(t, tt.upper...)
			d := diffTars(t, upper, lower)
			want := tt.want
			if want == nil {
				want = []string{}
			}
			if got := specs(t, d); !slices.Equal(got, want) {
				t.Errorf("the layer has %q, want %q", got, want)
			}
			if by := differ(mergeTars(t, lower, d), mergeTars(t, upper)); by != "" {
				t.Errorf("upon the lower one it isn't the upper one: %s", by)
			}
		})
	}
}

func TestDiffKeeps(t *testing.T) {
	upper := tarFrom(t, testEntry{"a=x", func(h *tar.Header) {
		h.Mode, h.Uid, h.Gid, h.Uname, h.ModTime = 0o4751, 1000, 70000, "somebody", time.Unix(1234567890, 5e8)
		h.PAXRecords = map[string]string{xattrRecord + "security.capability": "\x01\x00", "comment": "no"}
	}}, "b==a")
	tr := tar.NewReader(bytes.NewReader(diffTars(t, upper)))
	for _, name := range []string{"a", "b"} {
		hdr, err := tr.Next()
		if err != nil {
			t.Fatal(err)
		}
		if hdr.Name != name || hdr.Mode != 0o4751 || hdr.Uid != 1000 || hdr.Gid != 70000 || hdr.Uname != "" || hdr.ModTime.UnixNano() != 1234567890e9 {
			t.Errorf("got %+v", hdr)
		}
		if got := hdr.PAXRecords[xattrRecord+"security.capability"]; name == "a" && got != "\x01\x00" || hdr.PAXRecords["comment"] != "" {
			t.Errorf("%s has the records %q", name, hdr.PAXRecords)
		}
	}
}

func TestDiffRefusesMarkers(t *testing.T) {
	for _, name := range []string{"d/.wh.f", "d/.wh..wh..opq"} {
		upper := tarFrom(t, "d/", name)
		err := diff(io.Discard, map[string]*inode{}, mustRead(t, upper), bytes.NewReader(upper))
		if shed.ErrorCode(err) != shed.CodeUnsupported || !strings.Contains(err.Error(), name) {
			t.Errorf("a file %s: %v", name, err)
		}
	}
}

func TestDiffOtherTar(t *testing.T) {
	upper := tarFrom(t, "a=x", "b=y")
	if err := diff(io.Discard, map[string]*inode{}, mustRead(t, upper), bytes.NewReader(tarFrom(t, "a=x"))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a tar that has less than was read: %v", err)
	}
}

func TestReadLayer(t *testing.T) {
	if _, err := readLayer(bytes.NewReader(tarFrom(t, "b==a", "a=x"))); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("a link before its target: %v", err)
	}
	whole := tarFrom(t, "a=0123456789")
	if _, err := readLayer(bytes.NewReader(whole[:520])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half a tar: %v", err)
	}
	l := mustRead(t, tarFrom(t, "a=x", "c==a", "b=y", "a==b", "d/e/f"))
	if got := live(l.names, l.names["b"]); !slices.Equal(got, []string{"b", "a"}) {
		t.Errorf("b has the names %q", got)
	}
	if got := live(l.names, l.names["c"]); !slices.Equal(got, []string{"c"}) {
		t.Errorf("c has the names %q", got)
	}
	if d := l.names["d/e"]; d == nil || !d.isDir() || d.hdr.Mode != 0o755 {
		t.Errorf("the directory without an entry is %+v", d)
	}
}

// flatten is one tar of what the layers are.
func flatten(t testing.TB, tars ...[]byte) []byte {
	t.Helper()
	layers := make([]*layer, len(tars))
	for i, b := range tars {
		layers[i] = mustRead(t, b)
	}
	merged := merge(layers)
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for i, l := range layers {
		if err := l.copy(w, bytes.NewReader(tars[i]), func(ino *inode) []string { return live(merged, ino) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestMerge(t *testing.T) {
	for name, tt := range map[string]struct {
		layers [][]any
		want   []string
	}{
		"later counts":     {[][]any{{"d/", "d/a=1", "b=1"}, {"d/", "d/a=2"}}, []string{"b=1", "d/", "d/a=2"}},
		"whiteout":         {[][]any{{"d/", "d/a=1", "d/e/", "d/e/f"}, {"d/", "d/.wh.a", "d/.wh.e"}}, []string{"d/"}},
		"not of its own":   {[][]any{{"a=1"}, {"a=2", ".wh.a"}}, []string{"a=2"}},
		"opaque":           {[][]any{{"d/", "d/a=1", "e=1"}, {"d/", "d/.wh..wh..opq", "d/b=2"}}, []string{"e=1", "d/", "d/b=2"}},
		"file for a tree":  {[][]any{{"d/", "d/a=1"}, {"d=2"}}, []string{"d=2"}},
		"first link gone":  {[][]any{{"a=1", "b==a", "c==a"}, {".wh.a"}}, []string{"b=1", "c==b"}},
		"first link other": {[][]any{{"a=1", "b==a"}, {"a=2"}}, []string{"b=1", "a=2"}},
		"back again":       {[][]any{{"d/", "d/a=1"}, {".wh.d"}, {"d/", "d/b=3"}}, []string{"d/", "d/b=3"}},
	} {
		t.Run(name, func(t *testing.T) {
			var tars [][]byte
			for _, l := range tt.layers {
				tars = append(tars, tarFrom(t, l...))
			}
			flat := flatten(t, tars...)
			if got := specs(t, flat); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if by := differ(mergeTars(t, tars...), mergeTars(t, flat)); by != "" {
				t.Error(by)
			}
		})
	}
}

// randomTree makes a tar of data: what FuzzDiff makes layers of.
func randomTree(t testing.TB, data []byte) []byte {
	var entries []any
	files := map[string]bool{} // and whether they can be linked to
	dirs := []string{""}
	for len(data) >= 4 && len(entries) < 64 {
		kind, in, name, value := data[0], data[1], data[2], data[3]
		data = data[4:]
		path := dirs[int(in)%len(dirs)] + string('a'+rune(name%4))
		if _, taken := files[path]; taken {
			continue
		}
		edit := func(h *tar.Header) { h.Mode, h.Uid = int64(0o600+int(value)%8), int(value>>3)%2 }
		switch kind % 5 {
		case 0:
			dirs = append(dirs, path+"/")
			entries = append(entries, testEntry{path + "/", edit})
		case 1:
			entries = append(entries, testEntry{path + "->" + string('a'+rune(value%3)), nil})
		case 2:
			var targets []string
			for f, linkable := range files {
				if linkable {
					targets = append(targets, f)
				}
			}
			if len(targets) == 0 {
				continue
			}
			slices.Sort(targets)
			entries = append(entries, path+"=="+targets[int(value)%len(targets)])
		default:
			entries = append(entries, testEntry{fmt.Sprintf("%s=%d", path, value%3), edit})
		}
		files[path] = kind%5 >= 2
	}
	return tarFrom(t, entries...)
}

func FuzzDiff(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x03\x01\x01\x01\x02\x00\x02\x00"), []byte("\x03\x00\x00\x01"), []byte("\x00\x00\x00\x07\x02\x01\x01\x01"))
	f.Add([]byte("0000300100200310"), []byte("0000310120200110"), []byte("300031012020"))
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		lowest, middle, upper := randomTree(t, a), randomTree(t, b), randomTree(t, c)
		second := diffTars(t, middle, lowest)
		if by := differ(mergeTars(t, lowest, second), mergeTars(t, middle)); by != "" {
			t.Fatalf("two layers: %s", by)
		}
		third := diffTars(t, upper, lowest, second)
		if by := differ(mergeTars(t, lowest, second, third), mergeTars(t, upper)); by != "" {
			t.Fatalf("three layers: %s", by)
		}
		if by := differ(mergeTars(t, flatten(t, lowest, second, third)), mergeTars(t, upper)); by != "" {
			t.Fatalf("the layers as one: %s", by)
		}
		if again := specs(t, diffTars(t, upper, lowest, second, third)); len(again) > 0 {
			t.Fatalf("from the layers to the tree there is still %q", again)
		}
	})
}
