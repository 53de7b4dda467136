package image

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// trouble is a registry's behaviour: what it does at the first request for the big blob, and then.
type trouble struct {
	first func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte)
	after func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) // nil: behave
}

func cut(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
	w.Write(blob[:len(blob)/2])
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

func stall(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
	w.Write(blob[:len(blob)/2])
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func status(code int, header ...string) func(*fakeRegistry, http.ResponseWriter, *http.Request, []byte) {
	return func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

func whole(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
	w.Write(blob)
}

// A registry that recovers gives the right image, and no more is asked for than what is missing.
func TestPullRecovers(t *testing.T) {
	content := tarOf(t, "f", noise(3<<20, 1))
	half := fmt.Sprintf("bytes=%d-", len(content)/2)
	for name, tc := range map[string]struct {
		trouble
		ranges []string // of the requests for the blob
	}{
		"cut":                {trouble{first: cut}, []string{"", half}},
		"cut, and no ranges": {trouble{cut, whole}, []string{"", half}},
		"stall":              {trouble{first: stall}, []string{"", half}},
		"429 with seconds":   {trouble{first: status(429, "Retry-After", "1")}, []string{"", ""}},
		"503 with a date":    {trouble{first: status(503, "Retry-After", time.Now().UTC().Add(time.Second).Format(http.TimeFormat))}, []string{"", ""}},
		"500":                {trouble{first: status(500)}, []string{"", ""}},
		"no length": {trouble{first: func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
			w.(http.Flusher).Flush()
			w.Write(blob)
		}}, []string{""}},
		"endless": {trouble{first: func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
			for r.Context().Err() == nil {
				w.Write(blob)
			}
		}}, []string{""}},
		"starts a bit before": {trouble{cut, func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, blob []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 1000-%d/%d", len(blob)-1, len(blob)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(blob[1000:])
		}}, []string{"", half}},
	} {
		t.Run(name, func(t *testing.T) {
			noGoroutinesLeft(t)
			f := newFakeRegistry(t)
			l := layerOf(t, types.OCIUncompressedLayer, content)
			want := f.add(t, "1", f.newImage(t, l))
			blob := compressed(t, l)
			path := "/blobs/" + descriptor(blob, "").Digest.String()
			requests := 0
			f.will(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, path) {
					return false
				}
				f.mu.Lock()
				requests++
				n := requests
				f.mu.Unlock()
				switch {
				case n == 1:
					tc.first(f, w, r, blob)
				case tc.after != nil:
					tc.after(f, w, r, blob)
				default:
					return false
				}
				return true
			})
			pulls(t, open(t, t.TempDir()), f, want.Digest)
			var ranges []string
			for _, r := range f.seen(path) {
				_, rng, _ := strings.Cut(r, path)
				ranges = append(ranges, strings.TrimSpace(rng))
			}
			if !slices.Equal(ranges, tc.ranges) {
				t.Errorf("asked for were the ranges %q, want %q", ranges, tc.ranges)
			}
		})
	}
}

// What a registry does wrong, or an image is wrong with, is an error that says so, and no image.
func TestPullRefuses(t *testing.T) {
	content := tarOf(t, "f", noise(1<<20, 2))
	good := layerOf(t, types.OCILayer, content)
	goodBlob := compressed(t, good)
	always := func(what func(*fakeRegistry, http.ResponseWriter, *http.Request, []byte)) func(*testing.T, *fakeRegistry) {
		return func(t *testing.T, f *fakeRegistry) {
			f.add(t, "1", f.newImage(t, good))
			f.will(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, descriptor(goodBlob, "").Digest.String()) {
					return false
				}
				what(f, w, r, goodBlob)
				return true
			})
		}
	}
	everywhere := func(code int, body string, header ...string) func(*testing.T, *fakeRegistry) {
		return func(t *testing.T, f *fakeRegistry) {
			f.will(func(w http.ResponseWriter, r *http.Request) bool {
				for i := 0; i < len(header); i += 2 {
					w.Header().Set(header[i], header[i+1])
				}
				w.WriteHeader(code)
				w.Write([]byte(body))
				return true
			})
		}
	}
	image := func(spoil func(f *fakeRegistry, img *fakeImage)) func(*testing.T, *fakeRegistry) {
		return func(t *testing.T, f *fakeRegistry) {
			img := f.newImage(t, good)
			spoil(f, img)
			f.add(t, "1", img)
		}
	}
	manifest := func(mediaType types.MediaType, raw string) func(*testing.T, *fakeRegistry) {
		return func(t *testing.T, f *fakeRegistry) { f.addManifest(t, "1", []byte(raw), mediaType) }
	}
	for name, tc := range map[string]struct {
		set  func(*testing.T, *fakeRegistry)
		code shed.Code
		want string
		hint string
	}{
		"401":                        {everywhere(401, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`), shed.CodeRegistry, "authentication required", "docker login 127.0.0.1"},
		"401 with a realm elsewhere": {everywhere(401, "", "WWW-Authenticate", `Bearer realm="http://169.254.169.254/token"`), shed.CodeRegistry, "private", ""},
		"403":                        {everywhere(403, "no"), shed.CodeRegistry, "403 Forbidden", "docker login"},
		"429":                        {always(status(429)), shed.CodeRegistry, "429 Too Many Requests", "docker login"},
		"429 for an hour":            {always(status(429, "Retry-After", "3600")), shed.CodeRegistry, "come back in 1h0m0s", "try again"},
		"500":                        {always(status(500)), shed.CodeRegistry, "500 Internal", "try again"},
		"no blob":                    {always(status(404)), shed.CodeRegistry, "404", "part of the image is missing"},
		"no image":                   {func(*testing.T, *fakeRegistry) {}, shed.CodeNoImage, "MANIFEST_UNKNOWN", "check the name"},
		"no registry":                {everywhere(404, "<html>"), shed.CodeRegistry, "404", "address of an image registry"},
		"a web server":               {everywhere(200, "<html>welcome</html>"), shed.CodeInvalid, "no JSON", "address of an image registry"},
		"always cut at 0":            {always(func(_ *fakeRegistry, w http.ResponseWriter, _ *http.Request, _ []byte) { panic(http.ErrAbortHandler) }), shed.CodeRegistry, "EOF", "try again"},
		"never ranges":               {always(cut), shed.CodeRegistry, "EOF", "try again"},
		"length too long": {always(func(_ *fakeRegistry, w http.ResponseWriter, _ *http.Request, b []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)+4))
			w.Write(append(slices.Clone(b), "more"...))
		}), shed.CodeInvalid, fmt.Sprintf("has %d bytes, and the manifest says %d", len(goodBlob)+4, len(goodBlob)), "push it there again"},
		"length too short": {always(func(_ *fakeRegistry, w http.ResponseWriter, _ *http.Request, b []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)-1))
			w.Write(b[1:])
		}), shed.CodeInvalid, "bytes", "push it there again"},
		"another range": {always(func(f *fakeRegistry, w http.ResponseWriter, r *http.Request, b []byte) {
			if r.Header.Get("Range") == "" {
				cut(f, w, r, b)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", len(b)-10, len(b)-1, len(b)))
			w.WriteHeader(206)
			w.Write(b[len(b)-10:])
		}), shed.CodeRegistry, "asked for the bytes from", ""},
		"another content": {always(func(_ *fakeRegistry, w http.ResponseWriter, _ *http.Request, b []byte) {
			w.Write([]byte(noise(len(b), 9)))
		}), shed.CodeInvalid, "do not have that digest", "damaged"},
		"another size":  {image(func(f *fakeRegistry, img *fakeImage) { img.manifest.Layers[0].Size-- }), shed.CodeInvalid, "the manifest says", ""},
		"negative size": {image(func(f *fakeRegistry, img *fakeImage) { img.manifest.Layers[0].Size = -1 }), shed.CodeInvalid, "-1 bytes", ""},
		"another diff ID": {image(func(f *fakeRegistry, img *fakeImage) {
			img.config.RootFS.DiffIDs[0] = v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}
		}), shed.CodeInvalid, "not what its diff ID says", ""},
		"no tar": {image(func(f *fakeRegistry, img *fakeImage) {
			b := []byte(noise(1<<20, 3))
			img.manifest.Layers[0] = f.addBlob(b, types.OCIUncompressedLayer)
			img.config.RootFS.DiffIDs[0] = descriptor(b, "").Digest
		}), shed.CodeInvalid, "tar", ""},
		"no gzip": {image(func(f *fakeRegistry, img *fakeImage) {
			img.manifest.Layers[0] = f.addBlob([]byte(noise(1<<20, 3)), types.OCILayer)
		}), shed.CodeInvalid, "decompressing: gzip", ""},
		"gzip that is cut": {image(func(f *fakeRegistry, img *fakeImage) {
			img.manifest.Layers[0] = f.addBlob(goodBlob[:len(goodBlob)/2], types.OCILayer)
		}), shed.CodeInvalid, "decompressing", ""},
		"a layer too many": {image(func(f *fakeRegistry, img *fakeImage) {
			img.config.RootFS.DiffIDs = append(img.config.RootFS.DiffIDs, img.config.RootFS.DiffIDs[0])
		}), shed.CodeInvalid, "its manifest has 1 layers, its configuration 2", ""},
		"foreign layer": {image(func(f *fakeRegistry, img *fakeImage) { img.manifest.Layers[0].MediaType = types.DockerForeignLayer }), shed.CodeUnsupported, "foreign", ""},
		"big configuration": {image(func(f *fakeRegistry, img *fakeImage) {
			img.manifest.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Size: 9 << 20, Digest: descriptor(nil, "").Digest}
		}), shed.CodeInvalid, "configuration has", ""},
		"another platform": {image(func(f *fakeRegistry, img *fakeImage) { img.config.Architecture = "s390x" }), shed.CodeUnsupported, "linux/s390x", "--platform linux/s390x"},
		"Windows":          {image(func(f *fakeRegistry, img *fakeImage) { img.config.OS = "windows" }), shed.CodeNoImage, "windows", ""},
		"helm": {image(func(f *fakeRegistry, img *fakeImage) {
			img.manifest.Config = f.addBlob([]byte("{}"), "application/vnd.cncf.helm.config.v1+json")
		}), shed.CodeUnsupported, "helm", ""},
		"artifact":     {image(func(f *fakeRegistry, img *fakeImage) { img.manifest.ArtifactType = "application/vnd.example+type" }), shed.CodeUnsupported, "vnd.example", ""},
		"garbage":      {manifest(types.OCIManifestSchema1, "{\"layers\": 1"), shed.CodeInvalid, "no JSON", ""},
		"other JSON":   {manifest("application/json", `{"hello": "world"}`), shed.CodeUnsupported, "application/json", ""},
		"schema 1":     {manifest(types.DockerManifestSchema1Signed, `{"schemaVersion": 1, "fsLayers": [], "history": []}`), shed.CodeUnsupported, "schema 1", "push the image again"},
		"two in one":   {manifest(types.OCIManifestSchema1, `{"schemaVersion": 2, "layers": [], "manifests": []}`), shed.CodeInvalid, "same time", ""},
		"huge":         {manifest(types.OCIManifestSchema1, `{"x": "`+strings.Repeat("x", maxManifest)+`"}`), shed.CodeInvalid, "more than", ""},
		"no platforms": {manifest(types.OCIImageIndex, `{"schemaVersion": 2, "manifests": []}`), shed.CodeNoImage, "no platform", ""},
		"index that says it leads to itself": {func(t *testing.T, f *fakeRegistry) {
			self := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("1", 64)}
			doc := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{MediaType: types.OCIImageIndex, Digest: self, Size: 100}}}
			desc := f.addManifest(t, "1", doc, types.OCIImageIndex)
			f.manifests[self.String()] = f.manifests[desc.Digest.String()]
		}, shed.CodeInvalid, "does not have that digest", ""},
		"deep indexes": {func(t *testing.T, f *fakeRegistry) {
			desc := f.add(t, "", f.newImage(t, good))
			for range maxDepth {
				desc = f.addManifest(t, "1", v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{desc}}, types.OCIImageIndex)
			}
		}, shed.CodeUnsupported, "deep", ""},
	} {
		t.Run(name, func(t *testing.T) {
			noGoroutinesLeft(t)
			f := newFakeRegistry(t)
			tc.set(t, f)
			dir := t.TempDir()
			s := open(t, dir)
			img, err := s.pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil)
			if err == nil {
				t.Fatalf("it gives %+v", img)
			}
			if code := shed.ErrorCode(err); code != tc.code || !strings.Contains(err.Error(), tc.want) || !strings.Contains(shed.ErrorHint(err), tc.hint) {
				t.Errorf("it gives %s, %v, hint %q; want %s with %q, hint with %q", code, err, shed.ErrorHint(err), tc.code, tc.want, tc.hint)
			}
			if all, err := s.List(t.Context()); err != nil || len(all) != 0 {
				t.Errorf("there are images: %v, %v", all, err)
			}
			for _, path := range leftovers(t, dir) {
				if tc.code != shed.CodeRegistry || !strings.Contains(path, partialDir) {
					t.Errorf("left is %s", path)
				}
			}
			if len(s.held) != 0 {
				t.Errorf("held are %v", s.held)
			}
		})
	}
}

func TestExplainNoSuchHost(t *testing.T) {
	for ref, hint := range map[string]string{"bsae": "Docker Hub", "nothing.invalid/x": "name of the registry"} {
		parsed, err := parseRef(ref)
		if err != nil {
			t.Fatal(err)
		}
		host := parsed.Context().RegistryStr()
		missing := &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		r := &registry{repo: parsed.Context()}
		err = r.explain(&url.Error{Op: "Get", URL: "https://" + host + "/v2/", Err: &net.OpError{Op: "dial", Net: "tcp", Err: missing}})
		if shed.ErrorCode(err) != shed.CodeRegistry || !strings.HasPrefix(err.Error(), host+": ") || !strings.Contains(err.Error(), "no such host") || !strings.Contains(shed.ErrorHint(err), hint) {
			t.Errorf("%s: got %v, hint %q", ref, err, shed.ErrorHint(err))
		}
	}
}

func TestPullUnreachable(t *testing.T) {
	noCredentials(t)
	f := newFakeRegistry(t)
	f.Close()
	s := open(t, t.TempDir())
	_, err := s.Pull(t.Context(), shed.PullOptions{Ref: f.ref()}, nil)
	if shed.ErrorCode(err) != shed.CodeRegistry || !strings.Contains(err.Error(), "refused") || !strings.Contains(err.Error(), f.ref()) || !strings.Contains(shed.ErrorHint(err), "is the registry running") {
		t.Errorf("got %v, hint %q", err, shed.ErrorHint(err))
	}
	for _, opts := range []shed.PullOptions{{Ref: "Bad"}, {Ref: f.ref(), Platform: "linux"}} {
		if _, err := s.Pull(t.Context(), opts, nil); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("%+v gives %v", opts, err)
		}
	}
}
