//go:build linux || darwin

// Package state keeps the server's records on disk: atomic, synced, locked
// against a second server, and versioned.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
)

// Version of the state directory's layout and records.
const Version = 1

const (
	versionFile = "version"
	lockFile    = "lock"
	recordFile  = "shed.json"
)

// Phase says what was going on with a shed when its record was written.
type Phase string

const (
	Creating Phase = "creating" // undone at the next start of the server
	Ready    Phase = "ready"
	Deleting Phase = "deleting" // finished at the next start of the server
)

// Record is what is kept of a shed, in its shed.json.
type Record struct {
	Phase Phase `json:"phase"`

	Name        string    `json:"name"`
	Backend     string    `json:"backend"`
	Image       string    `json:"image"`
	ImageDigest string    `json:"image_digest"`
	Kernel      string    `json:"kernel"`
	CPUs        int       `json:"cpus"`
	MemoryMB    int       `json:"memory_mb"`
	UpperSize   int64     `json:"upper_size"`
	Repo        string    `json:"repo,omitempty"`
	Workspace   string    `json:"workspace"`
	CreatedAt   time.Time `json:"created_at"`
	StartedAt   time.Time `json:"started_at,omitzero"`
}

// Dir is a state directory. One process at a time can have it open.
type Dir struct {
	path string
	lock *os.File
}

// Open opens the state directory at path, making it where there is none.
func Open(path string) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{path, filepath.Join(path, "sheds")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "the state directory can't be made: %w", err).
				WithHint("set state_dir to a directory that this user may write")
		}
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the state directory can't be used: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, shed.Errorf(shed.CodeConflict, "another shed-server uses %s", path).
				WithHint("stop it first, or give this one another state_dir")
		}
		return nil, shed.Errorf(shed.CodeInvalid, "the state directory %s can't be locked: %w", path, err).
			WithHint("set state_dir to a directory on a file system that has locks")
	}
	d := &Dir{path: path, lock: lock}
	if err := d.checkVersion(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Dir) checkVersion() error {
	file := filepath.Join(d.path, versionFile)
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return write(file, []byte(strconv.Itoa(Version)+"\n"))
	}
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || n < 1 {
		return shed.Errorf(shed.CodeInvalid, "%s is damaged: it says %q where a version belongs", file, strings.TrimSpace(string(b))).
			WithHint("this server's version is %d; nothing has been changed", Version)
	}
	if n > Version {
		return shed.Errorf(shed.CodeInvalid, "%s was written by a newer shed-server (version %d; this one knows %d)", d.path, n, Version).
			WithHint("upgrade shed-server; nothing has been changed")
	}
	return nil
}

// Close gives the directory up.
func (d *Dir) Close() error { return d.lock.Close() }

// Path returns the path of a file or directory in d.
func (d *Dir) Path(elem ...string) string {
	return filepath.Join(append([]string{d.path}, elem...)...)
}

// Shed returns the directory of the shed called name.
func (d *Dir) Shed(name string) string { return d.Path("sheds", name) }

// Damaged is a shed whose record can't be read.
type Damaged struct {
	Name string
	Err  error
}

// Load reads all records, sorted by name.
func (d *Dir) Load() (records []Record, damaged []Damaged, err error) {
	entries, err := os.ReadDir(d.Path("sheds"))
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		if !e.IsDir() || shed.ValidateName(e.Name()) != nil {
			continue
		}
		r, err := d.read(e.Name())
		if err != nil {
			damaged = append(damaged, Damaged{e.Name(), err})
			continue
		}
		records = append(records, r)
	}
	sort.Slice(records, func(i, j int) bool { return records[i].Name < records[j].Name })
	return records, damaged, nil
}

func (d *Dir) read(name string) (Record, error) {
	file := filepath.Join(d.Shed(name), recordFile)
	b, err := os.ReadFile(file)
	if err != nil {
		return Record{}, err
	}
	return parse(b, file, name)
}

// parse reads the record of the shed called name, which is in file.
func parse(b []byte, file, name string) (Record, error) {
	var r struct {
		Version int `json:"version"`
		Record
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("%s is damaged: %w", file, err)
	}
	if r.Version > Version {
		return Record{}, fmt.Errorf("%s was written by a newer shed-server (version %d)", file, r.Version)
	}
	if r.Version < 1 || r.Name != name || r.ImageDigest == "" {
		return Record{}, fmt.Errorf("%s is damaged: it isn't the record of %s", file, name)
	}
	switch r.Phase {
	case Creating, Ready, Deleting:
		return r.Record, nil
	}
	return Record{}, fmt.Errorf("%s is damaged: it has the phase %q", file, r.Phase)
}

// Create makes the directory of a new shed, with its record. It fails with
// shed.CodeConflict, and changes nothing, if there is anything by that name.
func (d *Dir) Create(r Record) error {
	dir := d.Shed(r.Name)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrExist) {
		return shed.Errorf(shed.CodeConflict, "%s is in the way: no shed that this server knows of has made it", dir).
			WithHint("move it away, or restart shed-server to have it looked at")
	}
	if err != nil {
		return rootfs.NoSpace(err, dir)
	}
	if err = rootfs.Sync(d.Path("sheds")); err == nil {
		err = d.Save(r)
	}
	if err != nil { // even where the record is there
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// Save writes the record of a shed that has a directory.
func (d *Dir) Save(r Record) error {
	b, err := json.MarshalIndent(struct {
		Version int `json:"version"`
		Record
	}{Version, r}, "", "  ")
	if err != nil {
		return err
	}
	return write(filepath.Join(d.Shed(r.Name), recordFile), append(b, '\n'))
}

// Remove removes all of a shed's files, its record last.
func (d *Dir) Remove(name string) error {
	dir := d.Shed(name)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == recordFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := rootfs.Sync(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return rootfs.Sync(d.Path("sheds"))
}

func write(file string, b []byte) error {
	f, err := rootfs.CreateTemp(file)
	if err != nil {
		return rootfs.NoSpace(err, file)
	}
	if _, err := f.Write(b); err != nil {
		f.Close()
		os.Remove(f.Name())
		return rootfs.NoSpace(err, file)
	}
	return rootfs.Commit(f, file, 0o600)
}
