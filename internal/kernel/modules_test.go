package kernel

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

func testIndex(dep, softdep, alias, builtin string) fstest.MapFS {
	return fstest.MapFS{
		"modules.dep":     {Data: []byte(dep)},
		"modules.softdep": {Data: []byte(softdep)},
		"modules.alias":   {Data: []byte(alias)},
		"modules.builtin": {Data: []byte(builtin)},
	}
}

func closureOf(t *testing.T, index fstest.MapFS, names ...string) ([]string, error) {
	t.Helper()
	m, err := readModules(index)
	if err != nil {
		t.Fatal(err)
	}
	list, err := m.closure(names...)
	var lines []string
	for _, b := range list {
		lines = append(lines, strings.Join(append([]string{b.name + ":"}, b.deps...), " "))
	}
	return lines, err
}

func TestClosure(t *testing.T) {
	index := testIndex(`kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2.ko.xz
kernel/lib/crc16.ko.xz:
kernel/fs/jbd2.ko.xz:
kernel/drivers/virtio-rng.ko: kernel/drivers/virtio.ko
kernel/drivers/virtio.ko:
kernel/crypto/crc32c_generic.ko:
kernel/crypto/crc32c-intel.ko:
kernel/unrelated.ko:
`, `# Soft dependencies extracted from modules themselves.
softdep ext4 pre: crypto-crc32c nowhere post: unrelated
softdep jbd2 post: unrelated pre: crc16
`, `# Aliases extracted from modules themselves.
alias crypto-crc32c crc32c_intel
alias crypto-crc32c crc32c_generic
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
`, "kernel/fs/overlayfs/over-lay.ko\n")
	got, err := closureOf(t, index, "over_lay", "ext4", "virtio_rng", "virtio")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"crc32c_generic:",
		"crc16:",
		"jbd2: crc16",
		"ext4: crc32c_generic crc16 jbd2",
		"virtio:",
		"virtio_rng: virtio",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The agent loads recursively: it would wait for itself if dependencies went round.
func TestClosureBreaksSoftCycles(t *testing.T) {
	got, err := closureOf(t, testIndex("a.ko:\nb.ko: a.ko\n", "softdep a pre: b\n", "", ""), "a")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"b:", "a: b"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestClosureErrors(t *testing.T) {
	for _, test := range []struct{ dep, want string }{
		{"", "no ext4"},
		{"fs/ext4.ko: lib/crc16.ko\n", "crc16"},
	} {
		_, err := closureOf(t, testIndex(test.dep, "", "", ""), "ext4")
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("modules.dep %q: %v, want an error with %q", test.dep, err, test.want)
		}
	}
	for _, broken := range []fstest.MapFS{
		testIndex("a.ko b.ko\n", "", "", ""),
		testIndex("", "soft a\n", "", ""),
		testIndex("", "", "alias a\n", ""),
		{},
	} {
		if _, err := readModules(broken); err == nil {
			t.Errorf("%v: no error", broken)
		}
	}
}

func TestBootModulesUncompresses(t *testing.T) {
	dir, dst := t.TempDir(), filepath.Join(t.TempDir(), "boot")
	var dep strings.Builder
	for _, name := range bootNames[1:] {
		file := strings.ReplaceAll(name, "_", "-") + ".ko.gz"
		writeFile(t, filepath.Join(dir, file), gzipped(t, []byte("module "+name)))
		dep.WriteString(file + ":\n")
	}
	writeFile(t, filepath.Join(dir, bootNames[0]+".ko"), []byte("module "+bootNames[0]))
	dep.WriteString(bootNames[0] + ".ko:\n")
	for name, f := range testIndex(dep.String(), "", "", "") {
		writeFile(t, filepath.Join(dir, name), f.Data)
	}
	if err := bootModules(dst, dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range bootNames {
		data, err := os.ReadFile(filepath.Join(dst, name+".ko"))
		if err != nil || string(data) != "module "+name {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	data, err := os.ReadFile(filepath.Join(dst, modulesDep))
	if want := strings.Join(bootNames, ":\n") + ":\n"; err != nil || string(data) != want {
		t.Errorf("modules.dep: %q, %v, want %q", data, err, want)
	}
}

func writeFile(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
