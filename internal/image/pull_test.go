package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestPullIndex(t *testing.T) {
	noGoroutinesLeft(t)
	f := newFakeRegistry(t)
	kinds := []types.MediaType{types.OCIUncompressedLayer, types.OCILayer, types.OCILayerZStd, types.DockerLayer}
	var layers []v1.Layer
	for i, k := range kinds {
		layers = append(layers, layerOf(t, k, tarOf(t, fmt.Sprint("f", i), noise(1<<20, byte(i)))))
	}
	layers = append(layers, layers[0]) // images do have the same layer twice
	ours := f.add(t, "", f.newImage(t, layers...))
	other := f.newImage(t, layerOf(t, types.OCILayer, tarOf(t, "other", "x")))
	other.config.Architecture = "s390x"
	theirs := f.add(t, "", other)
	attestation := f.addManifest(t, "", v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}, types.OCIManifestSchema1)
	attestation.Annotations = map[string]string{referenceType: attestationManifest}
	attestation.Platform = &v1.Platform{OS: "unknown", Architecture: "unknown"}
	inner := f.addManifest(t, "", v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{attestation, ours}}, types.OCIImageIndex)
	f.addManifest(t, "1", v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{theirs, inner}}, types.OCIImageIndex)

	s := open(t, t.TempDir())
	var mu sync.Mutex
	done := map[string]int{}
	last := map[string]int64{}
	img, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, func(e shed.Event) {
		mu.Lock()
		defer mu.Unlock()
		if key := e.Phase + " " + e.Item; e.Done {
			done[key]++
		} else if e.Unit == "bytes" {
			if e.Current < last[key] || e.Current > e.Total || done[key] > 0 {
				t.Errorf("unexpected %+v after %d", e, last[key])
			}
			last[key] = e.Current
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if img.Digest != ours.Digest.String() || len(img.Layers) != 5 || img.Platform != "linux/"+runtime.GOARCH {
		t.Errorf("pulled is %+v", img)
	}
	for _, l := range img.Layers {
		if n := done["pull "+l.Digest[7:19]]; n != 1 || l.BlockImage == 0 {
			t.Errorf("layer %s was done %d times, %+v", l.Digest, n, l)
		}
	}
	if done["pull "] != 1 || done["convert "] != 1 {
		t.Errorf("what ended was %v", done)
	}
	paths, _, err := s.Rootfs(t.Context(), img, func(e shed.Event) { t.Errorf("left to do: %+v", e) })
	if err != nil || !strings.Contains(debugfs(t, paths[3], "ls /"), "f3") {
		t.Errorf("the root file system is %q, %v", paths, err)
	}

	_, err = s.pull(t.Context(), shed.PullOptions{Ref: f.ref(), Platform: "linux/riscv64"}, hasty, nil)
	if shed.ErrorCode(err) != shed.CodeNoImage || !strings.Contains(err.Error(), "s390x, linux/"+runtime.GOARCH) || !strings.Contains(shed.ErrorHint(err), "--platform") {
		t.Errorf("a platform that isn't there gives %v", err)
	}
	img, err = s.pull(t.Context(), shed.PullOptions{Ref: f.ref(), Platform: "linux/s390x"}, hasty, nil)
	if err != nil || img.Digest != theirs.Digest.String() || img.Platform != "linux/s390x" {
		t.Errorf("another platform gives %+v, %v", img, err)
	}
	if left := leftovers(t, filepath.Dir(s.dir)); len(left) != 0 {
		t.Errorf("left are %q", left)
	}

	// A second time nothing is fetched but manifests.
	before := len(f.seen("/blobs/"))
	pulls(t, s, f, ours.Digest)
	if again := f.seen("/blobs/")[before:]; len(again) != 0 {
		t.Errorf("fetched again were %q", again)
	}
	digestRef := f.host + "/x@" + ours.Digest.String()
	if img, err := s.pull(t.Context(), shed.PullOptions{Ref: digestRef}, hasty, nil); err != nil || img.Ref != digestRef {
		t.Errorf("by digest it is %+v, %v", img, err)
	}
}

// A pull that ends half-way is gone on with, from the byte where it ended.
func TestPullGoesOn(t *testing.T) {
	if dir := os.Getenv("SHED_TEST_PULL_DIR"); dir != "" { // to be killed
		_, err := open(t, dir).Pull(t.Context(), shed.PullOptions{Ref: os.Getenv("SHED_TEST_PULL_REF")}, nil)
		t.Fatal(err)
	}
	for how, start := range map[string]func(t *testing.T, dir string, f *fakeRegistry) (end func()){
		"cancelled": func(t *testing.T, dir string, f *fakeRegistry) func() {
			s := open(t, dir)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				_, err := s.pull(ctx, shed.PullOptions{Ref: f.ref()}, patient, nil)
				done <- err
			}()
			return func() {
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("the cancelled pull gives %v", err)
				}
				s.Close()
			}
		},
		"killed": func(t *testing.T, dir string, f *fakeRegistry) func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestPullGoesOn$")
			cmd.Env = append(os.Environ(), "SHED_TEST_PULL_DIR="+dir, "SHED_TEST_PULL_REF="+f.ref())
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			return func() {
				cmd.Process.Kill()
				cmd.Wait()
			}
		},
	} {
		t.Run(how, func(t *testing.T) {
			noGoroutinesLeft(t)
			f := newFakeRegistry(t)
			l := layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", noise(3<<20, 1)))
			blob := compressed(t, l)
			want := f.add(t, "1", f.newImage(t, l))
			digest := descriptor(blob, "").Digest
			f.will(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, digest.Hex) {
					return false
				}
				stall(f, w, r, blob)
				return true
			})
			dir := t.TempDir()
			end := start(t, dir, f)
			partial := filepath.Join(dir, "images", partialDir, "sha256-"+digest.Hex)
			for {
				if fi, err := os.Stat(partial); err == nil && fi.Size() >= int64(len(blob)/2) {
					break
				}
				time.Sleep(time.Millisecond)
			}
			end()
			f.will(nil)
			s := open(t, dir)
			if _, err := s.Resolve(f.ref()); shed.ErrorCode(err) != shed.CodeNoImage {
				t.Errorf("after half of it, the image is %v", err)
			}
			pulls(t, s, f, want.Digest)
			requests := f.seen(digest.Hex)
			if wanted := fmt.Sprintf("bytes=%d-", len(blob)/2); len(requests) != 2 || !strings.HasSuffix(requests[1], wanted) {
				t.Errorf("asked for was %q, want at last %q", requests, wanted)
			}
		})
	}
}

// What a crash of the machine spoilt is noticed, and fetched anew.
func TestPullSpoiltPartial(t *testing.T) {
	f := newFakeRegistry(t)
	l := layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", noise(3<<20, 1)))
	want := f.add(t, "1", f.newImage(t, l))
	blob := compressed(t, l)
	s := open(t, t.TempDir())
	path := s.partial(descriptor(blob, "").Digest)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"zeros": make([]byte, 1<<20), "longer": make([]byte, len(blob)+5), "whole": blob} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		before := len(f.seen(descriptor(blob, "").Digest.Hex))
		pulls(t, s, f, want.Digest)
		if n := len(f.seen(descriptor(blob, "").Digest.Hex)) - before; name == "whole" && n != 0 {
			t.Errorf("a whole blob was fetched %d times", n)
		}
		for _, p := range []string{s.blob(descriptor(blob, "").Digest), filepath.Join(filepath.Dir(s.dir), "layers", "sha256", want.Digest.Hex+".img")} {
			os.Remove(p)
		}
		diffID, _ := l.DiffID()
		if img, ok := s.layers.Path(diffID); ok {
			os.Remove(img)
		}
	}
}

// A blob or a configuration that is damaged on disk is mended by a pull.
func TestPullMends(t *testing.T) {
	f := newFakeRegistry(t)
	l := layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", noise(1<<20, 1)))
	img := f.newImage(t, l)
	want := f.add(t, "1", img)
	s := open(t, t.TempDir())
	pulls(t, s, f, want.Digest)
	diffID, _ := l.DiffID()
	path, _ := s.layers.Path(diffID)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for _, d := range []v1.Descriptor{img.manifest.Config, img.manifest.Layers[0], want} {
		if err := os.WriteFile(s.blob(d.Digest), make([]byte, d.Size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pulls(t, s, f, want.Digest)
}

func TestPullTwiceAtOnce(t *testing.T) {
	noGoroutinesLeft(t)
	f := newFakeRegistry(t)
	var layers []v1.Layer
	for i := range 6 {
		layers = append(layers, layerOf(t, types.OCILayer, tarOf(t, "f", noise(1<<20, byte(i)))))
	}
	want := f.add(t, "1", f.newImage(t, layers...))
	s := open(t, t.TempDir())
	var pullers sync.WaitGroup
	for range 3 {
		pullers.Go(func() {
			img, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil)
			if err != nil || img.Digest != want.Digest.String() {
				t.Errorf("a pull gives %v, %v", img, err)
			}
		})
	}
	pullers.Wait()
	if got := f.seen("/blobs/"); len(got) != len(layers)+1 {
		t.Errorf("fetched were %q", got)
	}
	pulls(t, s, f, want.Digest)
}

// A pull that waits for another one's blob takes over when that one is cancelled.
func TestPullTakesOver(t *testing.T) {
	noGoroutinesLeft(t)
	f := newFakeRegistry(t)
	l := layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", noise(3<<20, 1)))
	blob := compressed(t, l)
	want := f.add(t, "1", f.newImage(t, l))
	digest := descriptor(blob, "").Digest
	stalled := make(chan struct{})
	requests := 0
	f.will(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.Hex) {
			return false
		}
		f.mu.Lock()
		requests++
		n := requests
		f.mu.Unlock()
		if n > 1 {
			return false
		}
		close(stalled)
		stall(f, w, r, blob)
		return true
	})
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first := make(chan error)
	go func() {
		_, err := s.pull(ctx, shed.PullOptions{Ref: f.ref()}, patient, nil)
		first <- err
	}()
	<-stalled
	second := make(chan error)
	var seen sync.Once
	go func() {
		_, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, patient, func(e shed.Event) {
			if e.Item != "" && e.Current == int64(len(blob)/2) {
				seen.Do(cancel) // the second one has seen what the first one has got
			}
		})
		second <- err
	}()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the cancelled pull gives %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the one that took over gives %v", err)
	}
	if got, wanted := f.seen(digest.Hex), fmt.Sprintf("bytes=%d-", len(blob)/2); len(got) != 2 || !strings.HasSuffix(got[1], wanted) {
		t.Errorf("asked for was %q, want at last %q", got, wanted)
	}
	pulls(t, s, f, want.Digest)
}

// The conversion goes on while the blob still comes.
func TestPullOverlaps(t *testing.T) {
	f := newFakeRegistry(t)
	l := layerOf(t, types.OCILayer, tarOf(t, "f", noise(16<<20, 1)))
	blob := compressed(t, l)
	want := f.add(t, "1", f.newImage(t, l))
	dir := t.TempDir()
	f.will(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, descriptor(blob, "").Digest.Hex) {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		w.Write(blob[:len(blob)-1000])
		w.(http.Flusher).Flush()
		for r.Context().Err() == nil { // the last bytes come when most is converted
			images, _ := filepath.Glob(filepath.Join(dir, "layers", "sha256", tempPrefix+"*"))
			if len(images) == 1 {
				if fi, err := os.Stat(images[0]); err == nil && fi.Size() > 8<<20 {
					w.Write(blob[len(blob)-1000:])
					return true
				}
			}
			time.Sleep(time.Millisecond)
		}
		return true
	})
	pulls(t, open(t, dir), f, want.Digest)
	if got := f.seen("/blobs/" + descriptor(blob, "").Digest.String()); len(got) != 1 {
		t.Errorf("asked for was %q", got)
	}
}

// Credentials go to the registry, and not to where it redirects to.
func TestPullRedirect(t *testing.T) {
	noGoroutinesLeft(t)
	f, storage := newFakeRegistry(t), newFakeRegistry(t)
	home := noCredentials(t)
	want := f.add(t, "1", f.newImage(t, layerOf(t, types.OCILayer, tarOf(t, "f", noise(1<<20, 1)))))
	storage.blobs = f.blobs
	f.will(func(w http.ResponseWriter, r *http.Request) bool {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, strings.Replace(storage.URL, "127.0.0.1", "localhost", 1)+r.URL.Path+"?signature=hidden", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	storage.will(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") != "" {
			t.Errorf("the storage got %q", r.Header.Get("Authorization"))
		}
		return false
	})
	s := open(t, t.TempDir())
	if _, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil); shed.ErrorCode(err) != shed.CodeRegistry || !strings.Contains(shed.ErrorHint(err), "docker login "+f.host) {
		t.Errorf("without credentials it gives %v, hint %q", err, shed.ErrorHint(err))
	}
	if err := os.MkdirAll(filepath.Join(home, ".docker"), 0o700); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{"auths": {%q: {"auth": "bWU6c2VjcmV0"}}}`, f.host)
	if err := os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	pulls(t, s, f, want.Digest)
	if len(storage.seen("/blobs/")) == 0 {
		t.Error("nothing was redirected")
	}
	storage.Close()
	s = open(t, t.TempDir())
	if _, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil); shed.ErrorCode(err) != shed.CodeRegistry || strings.Contains(err.Error(), "hidden") || !strings.Contains(err.Error(), "localhost:") {
		t.Errorf("with the storage gone it gives %v", err)
	}
}

func TestPullManyLayers(t *testing.T) {
	f := newFakeRegistry(t)
	var layers []v1.Layer
	for i := range 200 {
		layers = append(layers, layerOf(t, types.OCILayer, tarOf(t, fmt.Sprint("f", i), "x")))
	}
	want := f.add(t, "1", f.newImage(t, layers...))
	s := open(t, t.TempDir())
	img := pulls(t, s, f, want.Digest)
	if paths, _, err := s.RootfsWithin(t.Context(), img, 20, nil); err != nil || len(img.Layers) != 200 || len(paths) != 20 {
		t.Errorf("its %d layers have %d block images, %v", len(img.Layers), len(paths), err)
	}
}

func TestUnpackerIsBounded(t *testing.T) {
	u := &unpacker{r: io.NopCloser(strings.NewReader("12345")), left: 4}
	if got, err := io.ReadAll(iotest.OneByteReader(u)); string(got) != "1234" || shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "unpacks to more than 128 GiB") {
		t.Errorf("it gives %q, %v", got, err)
	}
}
