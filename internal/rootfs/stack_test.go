package rootfs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"
)

// stack is layers, bottom first, as the headers that layer takes.
type stack [][]tar.Header

// randomStack returns layers that use few names, so that these collide. If complete is true, every
// directory has an entry in each layer that has something in it, and hard links
// stay in their layer: that is, overlayfs makes of the layers what OCI means.
func randomStack(rng *rand.Rand, complete bool) stack {
	s := make(stack, 2+rng.IntN(4))
	for i := range s {
		var lower []string
		for name, h := range apply(s[:i]) {
			if h.Typeflag != tar.TypeDir {
				lower = append(lower, name)
			}
		}
		slices.Sort(lower)
		g := &generator{rng: rng, complete: complete, number: i, lower: lower, dirs: map[string]bool{}, others: map[string]bool{}}
		for range 2 + rng.IntN(12) {
			g.entry()
		}
		s[i] = g.entries
	}
	return s
}

type generator struct {
	rng      *rand.Rand
	complete bool
	number   int      // of the layer
	lower    []string // files that the lower layers have
	dirs     map[string]bool
	others   map[string]bool
	entries  []tar.Header
}

func (g *generator) entry() {
	name := g.name()
	if g.others[name] || !g.parents(name) {
		return
	}
	h := tar.Header{
		Name: name, Mode: int64(g.rng.IntN(0o10000)), Uid: g.rng.IntN(3), Gid: g.rng.IntN(3) * 70000,
		ModTime: time.Unix(int64(1e9+g.rng.IntN(1000)), 0),
	}
	switch k := g.rng.IntN(20); {
	case k < 4 || g.dirs[name] && k < 14:
		h.Typeflag = tar.TypeDir
		g.dirs[name] = true
	case k < 14 && g.dirs[name]:
		return
	case k < 8:
		h.Typeflag, h.Linkname = tar.TypeReg, strings.Repeat(fmt.Sprintf("%s in %d;", name, g.number), 1+g.rng.IntN(900))
	case k < 10:
		h.Typeflag, h.Linkname = tar.TypeSymlink, fmt.Sprintf("../%d", g.rng.IntN(100))
	case k < 11:
		h.Typeflag = tar.TypeFifo
	case k < 12:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(1+g.rng.IntN(3)), int64(g.rng.IntN(300))
	case k < 14:
		targets := slices.Sorted(maps.Keys(g.others))
		if !g.complete {
			targets = append(targets, g.lower...)
			targets = slices.DeleteFunc(targets, func(name string) bool { return g.dirs[name] })
		}
		if len(targets) == 0 {
			return
		}
		h = link(name, targets[g.rng.IntN(len(targets))])
	case k < 18:
		g.entries = append(g.entries, file(path.Join(path.Dir(name), whiteoutPrefix+path.Base(name)), ""))
		return
	default:
		dir := path.Dir(name)
		if dir != "." {
			g.entries = append(g.entries, file(path.Join(dir, opaqueMarker), ""))
			g.dirs[dir] = true
		}
		return
	}
	if h.Typeflag != tar.TypeLink && h.Typeflag != tar.TypeSymlink && g.rng.IntN(3) == 0 {
		h = withXattr(h, []string{"user.x", "trusted.y", "security.z"}[g.rng.IntN(3)], fmt.Sprint("layer ", g.number))
	}
	if !g.dirs[name] {
		g.others[name] = true
	}
	g.entries = append(g.entries, h)
}

func (g *generator) name() string {
	parts := make([]string, 1+g.rng.IntN(3))
	for i := range parts {
		parts[i] = string("abc"[g.rng.IntN(3)])
	}
	return path.Join(parts...)
}

// parents makes sure that the layer can have something in the directory of name, and says whether it can.
func (g *generator) parents(name string) bool {
	for i, c := range name {
		if c == '/' && g.others[name[:i]] {
			return false
		}
	}
	for i, c := range name {
		if dir := name[:i]; c == '/' && !g.dirs[dir] {
			g.dirs[dir] = true
			if g.complete {
				g.entries = append(g.entries, dirOf(dir, g.number))
			}
		}
	}
	return true
}

func dirOf(name string, number int) tar.Header {
	h := dir(name + "/")
	h.Uid, h.ModTime = 1000+number, time.Unix(int64(number), 0)
	return h
}

// model applies layers one after the other, as OCI describes it, to a map. It is the simplest thing
// that is right.
type model map[string]*tar.Header // names of one file have the same header

func apply(s stack) model {
	m := model{".": implied()}
	for _, entries := range s {
		m.apply(entries)
	}
	return m
}

func implied() *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}
}

func (m model) apply(entries []tar.Header) {
	lower := maps.Clone(m)
	own := map[string]*tar.Header{".": m["."]}
	var removed []string
	for _, h := range entries {
		dir, base := path.Split(path.Clean(h.Name))
		dir = path.Clean(dir)
		if base == opaqueMarker {
			m.removeBelow(dir)
		} else if target, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			target = path.Join(dir, target)
			m.removeBelow(target)
			delete(m, target)
			removed = append(removed, target)
		}
	}
	for _, h := range entries {
		name := path.Clean(h.Name)
		dir, base := path.Split(name)
		if base == opaqueMarker {
			m.makeDirs(own, path.Clean(dir))
			continue
		}
		if strings.HasPrefix(base, whiteoutPrefix) {
			continue
		}
		m.makeDirs(own, path.Dir(name))
		switch {
		case h.Typeflag == tar.TypeLink:
			target := own[h.Linkname]
			if target == nil {
				target = lower[h.Linkname]
			}
			h = *target
			m.removeBelow(name)
			m[name], own[name] = target, target
		case h.Typeflag == tar.TypeDir:
			if m[name] != nil && m[name].Typeflag != tar.TypeDir {
				delete(m, name)
			}
			m[name], own[name] = &h, &h
		default:
			m.removeBelow(name)
			m[name], own[name] = &h, &h
		}
	}
	// What a whiteout is in is there too, unless it is removed itself.
	for _, name := range removed {
		gone := own[name] == nil && slices.ContainsFunc(removed, func(r string) bool {
			return strings.HasPrefix(name, r+"/") && own[r] == nil
		})
		if !gone {
			m.makeDirs(own, path.Dir(name))
		}
	}
}

func (m model) removeBelow(name string) {
	maps.DeleteFunc(m, func(n string, _ *tar.Header) bool { return strings.HasPrefix(n, name+"/") })
}

func (m model) makeDirs(own map[string]*tar.Header, name string) {
	if name == "." || own[name] != nil {
		return
	}
	m.makeDirs(own, path.Dir(name))
	if m[name] == nil || m[name].Typeflag != tar.TypeDir {
		m[name] = implied()
	}
	own[name] = m[name]
}

func (m model) snapshot() snapshot {
	s := snapshot{}
	names := map[*tar.Header][]string{}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		names[m[name]] = append(names[m[name]], name)
	}
	for name, h := range m {
		f := fileState{mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, mtime: h.ModTime.Unix(), xattrs: map[string]string{}}
		f.typ = map[byte]string{
			tar.TypeDir: "directory", tar.TypeReg: "regular", tar.TypeSymlink: "symlink", tar.TypeFifo: "FIFO", tar.TypeChar: "character special",
		}[h.Typeflag]
		switch h.Typeflag {
		case tar.TypeSymlink:
			f.mode = 0o777
			fallthrough
		case tar.TypeReg:
			f.content = h.Linkname
		case tar.TypeChar:
			f.content = fmt.Sprintf("%d:%d", h.Devmajor, h.Devminor)
		}
		if h.Typeflag != tar.TypeDir {
			f.names = strings.Join(names[h], " ")
		}
		for key, value := range h.PAXRecords {
			f.xattrs[strings.TrimPrefix(key, xattrRecord)] = value
		}
		s[name] = f.String()
	}
	return s
}

// snapshot is all that a file system says of its files, except of lost+found.
type snapshot map[string]string

type fileState struct {
	typ      string
	mode     int64
	uid, gid int
	mtime    int64
	content  string // of a symbolic link its target, of a device its number
	names    string // all names of the file
	xattrs   map[string]string
}

func (f fileState) String() string {
	content := f.content
	if len(content) > 60 {
		content = fmt.Sprintf("%s… %d bytes, sum %s", content[:20], len(content), sum([]byte(content)).Hex[:8])
	}
	return fmt.Sprintf("%s %04o %d:%d at %d %q [%s] %v", f.typ, f.mode, f.uid, f.gid, f.mtime, content, f.names, f.xattrs)
}

func wantSame(t testing.TB, what string, got, want snapshot) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got[name] != want[name] {
			t.Errorf("%s: %s is\n  %s, want\n  %s", what, name, got[name], want[name])
		}
	}
	for name, state := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s should not be there:\n  %s", what, name, state)
		}
	}
}

func (s stack) String() string {
	var b strings.Builder
	for i, entries := range s {
		fmt.Fprintf(&b, "layer %d\n", i)
		for _, h := range entries {
			fmt.Fprintf(&b, "  %c %s %.30s\n", h.Typeflag, h.Name, h.Linkname)
		}
	}
	return b.String()
}

func mergeLayers(t testing.TB, s stack) []MergeLayer {
	var layers []MergeLayer
	for _, entries := range s {
		layers = append(layers, mergeLayer(layer(t, entries...)))
	}
	return layers
}

func mergeLayer(b []byte) MergeLayer {
	return MergeLayer{DiffID: sum(b), Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

func merge(t testing.TB, l *Layers, layers ...MergeLayer) string {
	t.Helper()
	img, err := l.Merge(t.Context(), layers)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestMergeRandom(t *testing.T) {
	l := openLayers(t)
	for seed := range uint64(60) {
		s := randomStack(rand.New(rand.NewPCG(seed, 0)), seed%2 == 0)
		img := merge(t, l, mergeLayers(t, s)...)
		fsck(t, img)
		wantSame(t, fmt.Sprint("seed ", seed), snapshotOf(t, img), apply(s).snapshot())
		if t.Failed() {
			t.Fatal(s)
		}
	}
}
