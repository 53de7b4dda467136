//go:build linux || darwin

package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
)

func openDir(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func record(name string) Record {
	return Record{
		Phase: Ready, Name: name, Backend: "qemu", Image: "base", ImageDigest: "sha256:abc", Kernel: "6.1",
		CPUs: 2, MemoryMB: 1024, UpperSize: 20 << 30, Repo: "https://example.org/a/b.git", Workspace: "/home/shed/b",
		CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), StartedAt: time.Date(2026, 1, 3, 0, 0, 0, 0, time.UTC),
	}
}

func create(t *testing.T, d *Dir, r Record) {
	t.Helper()
	if err := d.Create(r); err != nil {
		t.Fatal(err)
	}
}

func load(t *testing.T, d *Dir) ([]Record, []Damaged) {
	t.Helper()
	records, damaged, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	return records, damaged
}

func writeFile(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// snapshot returns what is in a directory: names and contents.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		files[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestRecordsSurvive(t *testing.T) {
	path := t.TempDir() + "/state"
	d := openDir(t, path)
	create(t, d, record("web"))
	create(t, d, record("a-1"))
	second := record("web")
	second.Phase, second.Kernel, second.StartedAt, second.Repo = Deleting, "6.2", time.Time{}, ""
	if err := d.Save(second); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	records, damaged := load(t, openDir(t, path))
	if want := []Record{record("a-1"), second}; !reflect.DeepEqual(records, want) || len(damaged) != 0 {
		t.Errorf("%+v, %+v; want %+v", records, damaged, want)
	}
	for name, mode := range map[string]fs.FileMode{"": 0o700, "sheds": 0o700, "sheds/web": 0o700, "sheds/web/shed.json": 0o600} {
		if fi, err := os.Stat(filepath.Join(path, name)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%q has mode %v (%v), want %v", name, fi.Mode(), err, mode)
		}
	}
	if left, err := filepath.Glob(path + "/sheds/web/.tmp-*"); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A server that was killed while it wrote leaves a part of a file next to the good one.
func TestLoadIgnoresWhatAKilledServerLeft(t *testing.T) {
	d := openDir(t, t.TempDir())
	create(t, d, record("web"))
	half := d.Shed("web") + "/.tmp-shed.json"
	writeFile(t, half, `{"version": 1, "phase": "del`)
	writeFile(t, d.Path(".tmp-456"), "")
	writeFile(t, d.Path("sheds", "file"), "")
	for _, name := range []string{"UPPER", ".hidden", "lost+found"} {
		if err := os.Mkdir(d.Path("sheds", name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if records, damaged := load(t, d); len(records) != 1 || !reflect.DeepEqual(records[0], record("web")) || len(damaged) != 0 {
		t.Errorf("%+v, %+v", records, damaged)
	}
	if err := d.Save(record("web")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after another save: %v", err)
	}
}

func TestLoadTellsDamagedRecordsApart(t *testing.T) {
	good, err := json.Marshal(struct {
		Version int `json:"version"`
		Record
	}{Version, record("web")})
	if err != nil {
		t.Fatal(err)
	}
	change := func(old, new string) string {
		if !strings.Contains(string(good), old) {
			t.Fatalf("%s isn't in %s", old, good)
		}
		return strings.Replace(string(good), old, new, 1)
	}
	for name, tt := range map[string]struct{ content, want string }{
		"empty":             {"", "is damaged"},
		"truncated":         {string(good[:len(good)/2]), "is damaged"},
		"zeros":             {string(make([]byte, 4096)), "is damaged"},
		"text":              {"hello", "is damaged"},
		"another JSON":      {`[1, 2]`, "is damaged"},
		"null":              {"null", "is damaged"},
		"two records":       {string(good) + string(good), "is damaged"},
		"of another shed":   {change(`"web"`, `"other"`), "isn't the record of web"},
		"without an image":  {change(`"sha256:abc"`, `""`), "isn't the record of web"},
		"without a version": {change(`"version":1,`, ``), "isn't the record of web"},
		"of a newer server": {change(`"version":1`, `"version":2`), "newer shed-server (version 2)"},
		"an unknown phase":  {change(`"ready"`, `"resizing"`), `the phase "resizing"`},
		"without a phase":   {change(`"ready"`, `""`), `the phase ""`},
		"of another type":   {change(`"cpus":2`, `"cpus":"2"`), "is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			d := openDir(t, t.TempDir())
			create(t, d, record("good"))
			create(t, d, record("web"))
			file := d.Shed("web") + "/shed.json"
			writeFile(t, file, tt.content)
			records, damaged := load(t, d)
			if len(records) != 1 || records[0].Name != "good" {
				t.Errorf("the others: %+v", records)
			}
			if len(damaged) != 1 || damaged[0].Name != "web" {
				t.Fatalf("damaged: %+v", damaged)
			}
			if msg := damaged[0].Err.Error(); !strings.Contains(msg, file) || !strings.Contains(msg, tt.want) {
				t.Errorf("%q, want the file's name and %q", msg, tt.want)
			}
			if b, err := os.ReadFile(file); err != nil || string(b) != tt.content {
				t.Errorf("the file was changed: %q, %v", b, err)
			}
		})
	}
	t.Run("not there", func(t *testing.T) {
		d := openDir(t, t.TempDir())
		create(t, d, record("web"))
		if err := os.Remove(d.Shed("web") + "/shed.json"); err != nil {
			t.Fatal(err)
		}
		_, damaged := load(t, d)
		if len(damaged) != 1 || !errors.Is(damaged[0].Err, fs.ErrNotExist) || !strings.Contains(damaged[0].Err.Error(), "shed.json") {
			t.Errorf("%+v", damaged)
		}
	})
}

func TestOnlyOneServer(t *testing.T) {
	path := t.TempDir()
	first := openDir(t, path)
	_, err := Open(path)
	if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), path) || shed.ErrorHint(err) == "" {
		t.Errorf("the second: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	openDir(t, path)
}

func TestOpenRefusesOtherVersions(t *testing.T) {
	for content, want := range map[string]string{
		"2\n": "newer shed-server (version 2", "1000": "newer shed-server", "": "damaged", "x": "damaged", "0": "damaged", "-1": "damaged", "1.5": "damaged",
	} {
		path := t.TempDir()
		d := openDir(t, path)
		create(t, d, record("web"))
		d.Close()
		writeFile(t, path+"/version", content)
		before := snapshot(t, path)
		for range 2 { // the first refusal has let go of the lock
			_, err := Open(path)
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
				t.Errorf("version %q: %v, want %q", content, err, want)
			}
		}
		if after := snapshot(t, path); !reflect.DeepEqual(after, before) {
			t.Errorf("version %q: %v became %v", content, before, after)
		}
	}
}

func TestOpenSaysWhatIsInTheWay(t *testing.T) {
	file := t.TempDir() + "/file"
	writeFile(t, file, "")
	for _, path := range []string{file, file + "/below"} {
		_, err := Open(path)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), file) || !strings.Contains(shed.ErrorHint(err), "state_dir") {
			t.Errorf("%v (%s)", err, shed.ErrorHint(err))
		}
	}
}

func TestCreateRefusesWhatIsThere(t *testing.T) {
	d := openDir(t, t.TempDir())
	create(t, d, record("web"))
	writeFile(t, d.Shed("web")+"/upper.img", "data")
	before := snapshot(t, d.Path())
	again := record("web")
	again.Image = "other"
	err := d.Create(again)
	if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), d.Shed("web")) {
		t.Errorf("%v", err)
	}
	if after := snapshot(t, d.Path()); !reflect.DeepEqual(after, before) {
		t.Errorf("%v became %v", before, after)
	}
}

func TestSaveNeedsItsDirectory(t *testing.T) {
	d := openDir(t, t.TempDir())
	if err := d.Save(record("web")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	d := openDir(t, t.TempDir())
	create(t, d, record("keep"))
	before := snapshot(t, d.Path())
	create(t, d, record("web"))
	dir := d.Shed("web")
	if err := os.MkdirAll(dir+"/run/deeper", 0o700); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	writeFile(t, outside+"/precious", "")
	for _, f := range []string{"upper.img", ".tmp-1", "run/deeper/x"} {
		writeFile(t, dir+"/"+f, "data")
	}
	if err := os.Symlink(outside, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what is gone can be removed again
		if err := d.Remove("web"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("still there: %v", err)
		}
	}
	if after := snapshot(t, d.Path()); !reflect.DeepEqual(after, before) {
		t.Errorf("%v became %v", before, after)
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Errorf("what a link led to: %v", err)
	}
	create(t, d, record("web"))
}

// FuzzParse checks that what is taken for a record is one, and can be written back.
func FuzzParse(f *testing.F) {
	good, err := json.Marshal(struct {
		Version int `json:"version"`
		Record
	}{Version, record("web")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte(`{"version":1,"Name":"web","IMAGE_DIGEST":"x","phase":"deleting","created_at":"2026-01-02T03:04:05+01:00"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parse(data, "f", "web")
		if err != nil {
			return
		}
		if r.Name != "web" || r.ImageDigest == "" || r.Phase != Creating && r.Phase != Ready && r.Phase != Deleting {
			t.Fatalf("%q is taken for %+v", data, r)
		}
		first, err := json.Marshal(struct {
			Version int `json:"version"`
			Record
		}{Version, r})
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(first, "f", "web")
		if err != nil {
			t.Fatalf("%q: %v", first, err)
		}
		second, err := json.Marshal(struct {
			Version int `json:"version"`
			Record
		}{Version, again})
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%q became %q (%v)", first, second, err)
		}
	})
}
