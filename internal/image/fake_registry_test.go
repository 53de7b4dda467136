package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// hasty is a patience for tests. The time for a stall must be enough for a busy machine to send a byte.
var hasty = patience{stall: 2 * time.Second, answer: 5 * time.Second, backoff: time.Millisecond, tries: 4, atMost: 2 * time.Second}

// fakeRegistry is a registry that does what a test makes of it.
type fakeRegistry struct {
	*httptest.Server
	host string

	mu        sync.Mutex
	manifests map[string]fakeManifest // by tag and by digest
	blobs     map[string][]byte       // by digest
	requests  []string                // METHOD PATH [RANGE]
	// misbehave handles a request instead, if it returns true.
	misbehave func(w http.ResponseWriter, r *http.Request) bool
}

type fakeManifest struct {
	raw       []byte
	mediaType types.MediaType
}

func newFakeRegistry(t testing.TB) *fakeRegistry {
	noCredentials(t)
	f := &fakeRegistry{manifests: map[string]fakeManifest{}, blobs: map[string][]byte{}}
	f.Server = httptest.NewServer(f)
	f.host = strings.TrimPrefix(f.URL, "http://")
	t.Cleanup(f.Close)
	return f
}

// noCredentials keeps the credentials of whoever runs the tests out of them, and returns the home directory that has none.
func noCredentials(t testing.TB) string {
	home := t.TempDir()
	for _, v := range []string{"REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, "")
	}
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", filepath.Join(home, ".docker")) // what HOME says is looked up once in a process
	return home
}

func (f *fakeRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.requests = append(f.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
	misbehave := f.misbehave
	f.mu.Unlock()
	if misbehave != nil && misbehave(w, r) {
		return
	}
	f.behave(w, r)
}

func (f *fakeRegistry) behave(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, id, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/x/"), "/")
	switch {
	case r.URL.Path == "/v2/":
	case strings.HasPrefix(r.URL.Path, "/v2/x/manifests/"):
		m, ok := f.manifests[id]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}`)
			return
		}
		w.Header().Set("Content-Type", string(m.mediaType))
		w.Write(m.raw)
	case strings.HasPrefix(r.URL.Path, "/v2/x/blobs/"):
		blob, ok := f.blobs[id]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors": [{"code": "BLOB_UNKNOWN", "message": "blob unknown"}]}`)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (f *fakeRegistry) ref() string { return f.host + "/x:1" }

// will makes f handle requests with misbehave, or behave if that is nil.
func (f *fakeRegistry) will(misbehave func(w http.ResponseWriter, r *http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.misbehave = misbehave
}

// seen returns the requests so far that contain s.
func (f *fakeRegistry) seen(s string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []string
	for _, r := range f.requests {
		if strings.Contains(r, s) {
			found = append(found, r)
		}
	}
	return found
}

func (f *fakeRegistry) addBlob(b []byte, mediaType types.MediaType) v1.Descriptor {
	desc := descriptor(b, mediaType)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blobs[desc.Digest.String()] = b
	return desc
}

func (f *fakeRegistry) addManifest(t testing.TB, tag string, doc any, mediaType types.MediaType) v1.Descriptor {
	raw, ok := doc.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(doc); err != nil {
			t.Fatal(err)
		}
	}
	desc := descriptor(raw, mediaType)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.manifests[desc.Digest.String()] = fakeManifest{raw, mediaType}
	if tag != "" {
		f.manifests[tag] = fakeManifest{raw, mediaType}
	}
	return desc
}

// fakeImage is an image to be put into a fake registry, after a test has spoilt it.
type fakeImage struct {
	manifest v1.Manifest
	config   v1.ConfigFile
}

func (f *fakeRegistry) newImage(t testing.TB, layers ...v1.Layer) *fakeImage {
	img := &fakeImage{
		manifest: v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1},
		config:   v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}},
	}
	for _, l := range layers {
		mediaType, err := l.MediaType()
		if err != nil {
			t.Fatal(err)
		}
		diffID, err := l.DiffID()
		if err != nil {
			t.Fatal(err)
		}
		img.manifest.Layers = append(img.manifest.Layers, f.addBlob(compressed(t, l), mediaType))
		img.config.RootFS.DiffIDs = append(img.config.RootFS.DiffIDs, diffID)
	}
	return img
}

// add puts the image into the registry, and gives it a tag unless that is "".
func (f *fakeRegistry) add(t testing.TB, tag string, img *fakeImage) v1.Descriptor {
	raw, err := json.Marshal(img.config)
	if err != nil {
		t.Fatal(err)
	}
	if config := f.addBlob(raw, types.OCIConfigJSON); img.manifest.Config.Digest == (v1.Hash{}) {
		img.manifest.Config = config
	}
	desc := f.addManifest(t, tag, img.manifest, img.manifest.MediaType)
	desc.Platform = &v1.Platform{OS: img.config.OS, Architecture: img.config.Architecture, Variant: img.config.Variant}
	return desc
}

func compressed(t testing.TB, l v1.Layer) []byte {
	r, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// noise returns n bytes that don't compress.
func noise(n int, seed byte) string {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return string(b)
}

// leftovers returns the files under the store's directories that an operation that has ended shouldn't have left.
func leftovers(t testing.TB, dir string) []string {
	t.Helper()
	var left []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && (strings.Contains(path, tempPrefix) || strings.Contains(path, partialDir)) {
			left = append(left, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// noGoroutinesLeft makes sure that what the test starts from here on has ended by its end.
func noGoroutinesLeft(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		for range 6000 { // a minute
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines are left, there were %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
	})
}

// pulls checks that a pull of f's image gives the one with that digest, ready to boot.
func pulls(t testing.TB, s *Store, f *fakeRegistry, want v1.Hash) *shed.Image {
	t.Helper()
	img, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil)
	if err != nil {
		t.Fatal(err, "; ", shed.ErrorHint(err))
	}
	if img.Digest != want.String() || img.Ref != f.ref() {
		t.Errorf("pulled is %s, %s, want %s, %s", img.Ref, img.Digest, f.ref(), want)
	}
	if got, err := s.Resolve(f.ref()); err != nil || got.Digest != want.String() {
		t.Errorf("%s is %v, %v", f.ref(), got, err)
	}
	for _, l := range img.Layers {
		if l.BlockImage == 0 {
			t.Errorf("layer %s has no block image", l.Digest)
		}
	}
	if left := leftovers(t, filepath.Dir(s.dir)); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
	return img
}
