package image

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// What a registry does wrong for good is tried so many times and no more, whoever notices it.
func TestTriesDontMultiply(t *testing.T) {
	p := hasty
	p.stall = time.Minute
	p.answer = p.stall
	hang := func(w http.ResponseWriter, r *http.Request, n int) { <-r.Context().Done() }
	abort := func(http.ResponseWriter, *http.Request, int) { panic(http.ErrAbortHandler) }
	answer := func(status int) func(http.ResponseWriter, *http.Request, int) {
		return func(w http.ResponseWriter, r *http.Request, n int) { w.WriteHeader(status) }
	}
	// begin answers, and then does with the content what then does.
	begin := func(then func(http.ResponseWriter, *http.Request, int)) func(http.ResponseWriter, *http.Request, int) {
		return func(w http.ResponseWriter, r *http.Request, n int) {
			w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
			w.(http.Flusher).Flush()
			then(w, r, n)
		}
	}
	inTurn := func(w http.ResponseWriter, r *http.Request, n int) {
		[]func(http.ResponseWriter, *http.Request, int){answer(500), begin(abort), abort, begin(hang), answer(503)}[n%5](w, r, n)
	}
	kinds := map[string]struct {
		what func(w http.ResponseWriter, r *http.Request, n int)
		want string
	}{
		"500": {answer(500), "500 Internal Server Error"}, "503": {answer(503), "503 Service Unavailable"},
		"hangs": {hang, "stalled"}, "hangs up": {abort, "EOF"},
		"hangs after the header": {begin(hang), "stalled"}, "hangs up after the header": {begin(abort), "EOF"},
		"everything in turn": {inTurn, ""},
	}
	l := layerOf(t, types.OCILayer, tarOf(t, "f", noise(1<<10, 2)))
	blob := "/blobs/" + descriptor(compressed(t, l), "").Digest.String()
	for what, path := range map[string]string{"manifest": "/manifests/1", "blob": blob} {
		for name, kind := range kinds {
			t.Run(what+" "+name, func(t *testing.T) {
				noGoroutinesLeft(t)
				f := newFakeRegistry(t)
				f.add(t, "1", f.newImage(t, l))
				f.will(func(w http.ResponseWriter, r *http.Request) bool {
					if strings.HasSuffix(r.URL.Path, path) {
						kind.what(w, r, len(f.seen(path)))
					}
					return strings.HasSuffix(r.URL.Path, path)
				})
				p := p
				if hangs(name) {
					p.stall = 500 * time.Millisecond
				}
				_, err := open(t, t.TempDir()).pull(t.Context(), shed.PullOptions{Ref: f.ref()}, p, nil)
				wantTries(t, f.seen(path), err, kind.want, p.tries, name)
			})
		}
	}
	for what, path := range map[string]string{"HEAD": "/blobs/", "POST": "/blobs/uploads/", "PATCH": "/upload", "PUT": "/upload", "PUT manifest": "/manifests/1"} {
		for _, name := range []string{"500", "503", "hangs up"} {
			t.Run(what+" "+name, func(t *testing.T) {
				noGoroutinesLeft(t)
				f := newFakeRegistry(t)
				s := open(t, t.TempDir())
				addImage(t, s, "base")
				verb := strings.TrimSuffix(what, " manifest")
				seen := func() []string {
					return slices.DeleteFunc(f.seen(verb+" "), func(r string) bool { return !strings.Contains(r, path) })
				}
				f.will(func(w http.ResponseWriter, r *http.Request) bool {
					w.Header().Set("Location", "/upload")
					switch {
					case r.Method == verb && strings.Contains(r.URL.Path, path):
						kinds[name].what(w, r, len(seen()))
					case r.Method == http.MethodPost || r.Method == http.MethodPatch:
						w.WriteHeader(http.StatusAccepted)
					case r.Method == http.MethodPut:
						w.WriteHeader(http.StatusCreated)
					default:
						return false
					}
					return true
				})
				_, err := s.push(t.Context(), shed.PushOptions{Image: "base", To: f.ref()}, p, nil)
				wantTries(t, seen(), err, kinds[name].want, p.tries, name)
			})
		}
	}
}

// hangs reports whether a registry that does something of that kind may not answer.
func hangs(kind string) bool {
	return slices.Contains([]string{"hangs", "hangs after the header", "everything in turn"}, kind)
}

// wantTries checks that there were so many requests, and that the error says so. What hangs is given up so soon that a
// busy machine may not have seen all requests by then.
func wantTries(t *testing.T, requests []string, err error, want string, tries int, kind string) {
	t.Helper()
	most := tries
	if kind == "hangs up" || kind == "everything in turn" {
		most++ // net/http has another connection where one that it had used before ends
	}
	if len(requests) < tries && !hangs(kind) || len(requests) > most {
		t.Errorf("%d requests were made, want %d: %q", len(requests), tries, requests)
	}
	if shed.ErrorCode(err) != shed.CodeRegistry || !strings.Contains(err.Error(), want) || !strings.HasSuffix(err.Error(), "in "+strconv.Itoa(tries)+" tries") {
		t.Errorf("got %v, want one that says %q, and how often it was tried", err, want)
	}
	if shed.ErrorHint(err) == "" {
		t.Errorf("%v has no hint", err)
	}
}

// What a registry says with an error is not read without end.
func TestRefusalIsBounded(t *testing.T) {
	f := newFakeRegistry(t)
	sent := 0
	f.will(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v2/" {
			return false
		}
		w.WriteHeader(http.StatusNotFound)
		for r.Context().Err() == nil && sent < 64<<20 {
			n, err := w.Write(make([]byte, 1<<20))
			if sent += n; err != nil {
				break
			}
		}
		return true
	})
	_, err := open(t, t.TempDir()).pull(t.Context(), shed.PullOptions{Ref: f.ref()}, hasty, nil)
	if shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("got %v", err)
	}
	f.Close() // waits for the handler
	if sent >= 64<<20 {
		t.Errorf("%d bytes were read", sent)
	}
}
