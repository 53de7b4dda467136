package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

func TestImageCalls(t *testing.T) {
	fake := &apitest.Fake{}
	c := newTestClient(t, fake)
	ctx := t.Context()
	if img, err := c.Pull(ctx, shed.PullOptions{Ref: "debian:12"}, nil); err != nil || img.Ref != "debian:12" {
		t.Errorf("pull: %+v, %v", img, err)
	}
	if img, err := c.Tag(ctx, "debian:12", "mine"); err != nil || img.Ref != "mine" {
		t.Errorf("tag: %+v, %v", img, err)
	}
	if pushed, err := c.Push(ctx, shed.PushOptions{Image: "mine", To: "reg/x:1"}, nil); err != nil || pushed.Ref != "reg/x:1" || pushed.Digest != apitest.Digest("b2") {
		t.Errorf("push: %+v, %v", pushed, err)
	}
	want, err := fake.InspectImage(ctx, "mine")
	if err != nil {
		t.Fatal(err)
	}
	want.InUse = []string{}
	if got, err := c.InspectImage(ctx, "mine"); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("inspect: %+v, %v, want %+v", got, err, want)
	}
	fake.AddImage(shed.Image{Ref: "used", Digest: apitest.Digest("7"), InUse: []string{"web"}})
	if _, err := c.RemoveImage(ctx, "used", false); shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("remove what is in use: %v", err)
	}
	if removed, err := c.RemoveImage(ctx, "used", true); err != nil || len(removed.Items) != 2 {
		t.Errorf("remove with force: %+v, %v", removed, err)
	}
	if removed, err := c.PruneImages(ctx, false); err != nil || removed.Items == nil || len(removed.Items) != 0 {
		t.Errorf("prune of nothing: %+v, %v", removed, err)
	}
	fake.AddImage(shed.Image{Digest: apitest.Digest("8"), Source: shed.SourceDangling, Size: 5})
	for _, dryRun := range []bool{true, true, false} {
		if removed, err := c.PruneImages(ctx, dryRun); err != nil || removed.Freed != 5 {
			t.Errorf("prune, dry run %v: %+v, %v", dryRun, removed, err)
		}
	}
	opts := shed.BuildOptions{Tag: "mine:1", Dockerfile: "a b/Dockerfile", Target: "t&u", Args: map[string]string{"K": "ü =%\n"}, NoCache: true}
	if img, err := c.Build(ctx, opts, strings.NewReader("tar"), nil); err != nil || img.Ref != "mine:1" || !reflect.DeepEqual(fake.Built(), opts) {
		t.Errorf("build: %+v, %v, with %+v", img, err, fake.Built())
	}
}

// Whatever a name is made of, the server sees that very name.
func TestImageNames(t *testing.T) {
	var got string
	fake := &apitest.Fake{Before: func(_ context.Context, op, name string, _ shed.Progress) error {
		got = op + " " + name
		return shed.Errorf(shed.CodeNoImage, "none")
	}}
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	c := NewClient(dial, "the server")
	defer c.Close()
	for _, name := range []string{
		"base", "docker.io/library/debian:12", "localhost:5000/a/b:c@sha256:" + strings.Repeat("0", 64), "pull", "inspect/x", "save",
		"", ".", "..", "...", "a/../b", "./a", "a//b", "/a", "a/", "%2F", "%", "a?force=true", "#", "a b", "a+b", "ü", "\x00", "a\nb", "\xff",
	} {
		for op, call := range map[string]func() error{
			"inspect": func() error { _, err := c.InspectImage(t.Context(), name); return err },
			"remove":  func() error { _, err := c.RemoveImage(t.Context(), name, false); return err },
			"save":    func() error { return c.Save(t.Context(), []string{name}, io.Discard) },
		} {
			got = ""
			if err := call(); shed.ErrorCode(err) != shed.CodeNoImage || got != op+" "+name {
				t.Errorf("%s %q: the server got %q, %v", op, name, got, err)
			}
		}
	}
	// As a person would write it.
	if status, _ := rawRequest(t, dial, "GET", "/api/images/inspect/docker.io/library/debian:12", "", nil); status != 404 || got != "inspect docker.io/library/debian:12" {
		t.Errorf("slashes as they are: %d, %q", status, got)
	}
}

func TestImageErrorsSurvive(t *testing.T) {
	fake := &apitest.Fake{Before: func(context.Context, string, string, shed.Progress) error {
		return shed.Errorf(shed.CodeRegistry, "what and why").WithHint("try \"this\"\nand that")
	}}
	c := newTestClient(t, fake)
	ctx := t.Context()
	for _, p := range []shed.Progress{nil, func(shed.Event) {}} {
		for name, call := range map[string]func() error{
			"inspect": func() error { _, err := c.InspectImage(ctx, "x"); return err },
			"preset":  func() error { _, err := c.BuildPreset(ctx, "x", p); return err },
			"build":   func() error { _, err := c.Build(ctx, shed.BuildOptions{}, strings.NewReader("x"), p); return err },
			"pull":    func() error { _, err := c.Pull(ctx, shed.PullOptions{}, p); return err },
			"push":    func() error { _, err := c.Push(ctx, shed.PushOptions{}, p); return err },
			"save":    func() error { return c.Save(ctx, []string{"x"}, io.Discard) },
			"load":    func() error { _, err := c.Load(ctx, strings.NewReader("x"), p); return err },
			"tag":     func() error { _, err := c.Tag(ctx, "x", "y"); return err },
			"remove":  func() error { _, err := c.RemoveImage(ctx, "x", false); return err },
			"prune":   func() error { _, err := c.PruneImages(ctx, false); return err },
		} {
			var got *shed.Error
			if err := call(); !errors.As(err, &got) || got.Code != shed.CodeRegistry || got.Message != "what and why" || got.Hint != "try \"this\"\nand that" {
				t.Errorf("%s: got %v", name, err)
			}
		}
	}
}

func TestRefusedImageRequests(t *testing.T) {
	ln, dial := listenUnix(t)
	serve(t, ln, &apitest.Fake{Before: func(_ context.Context, op, _ string, _ shed.Progress) error {
		t.Errorf("a refused request got as far as %s", op)
		return nil
	}}, slog.New(slog.DiscardHandler))
	tarHeader := http.Header{"Content-Type": {tarType}}
	for _, test := range []struct {
		method, path, body string
		header             http.Header
		status             int
		message            string
	}{
		{"POST", "/api/images/load", "x", http.Header{"Content-Type": {"application/gzip"}}, 415, "application/gzip"},
		{"POST", "/api/images/build?options={}", "x", nil, 415, tarType},
		{"POST", "/api/images/build", "x", tarHeader, 400, "the parameter options is missing"},
		{"POST", "/api/images/build?options=%7B%22tga%22:1%7D", "x", tarHeader, 400, `unknown field \"tga\"`},
		{"GET", "/api/images/save", "", nil, 400, "?name="},
		{"DELETE", "/api/images/x?force=perhaps", "", nil, 400, "force=1"},
		{"POST", "/api/images/x", "", nil, 405, "DELETE"},
	} {
		status, body := rawRequest(t, dial, test.method, test.path, test.body, test.header)
		if status != test.status || !strings.Contains(body, test.message) {
			t.Errorf("%s %s: %d %s", test.method, test.path, status, body)
		}
	}
}

// Counts of several items that go on at once are merged; what begins and ends is not.
func TestItemsAreMerged(t *testing.T) {
	s := &eventStream{wake: make(chan struct{}, 1)}
	for i := range 1000 {
		for _, item := range []string{"a", "b"} {
			s.add(shed.Event{Phase: "pull", Item: item, Current: int64(i + 1), Total: 1000})
		}
	}
	s.add(shed.Event{Phase: "pull", Item: "a", Done: true})
	want := []shed.Event{
		{Phase: "pull", Item: "a", Current: 1000, Total: 1000}, {Phase: "pull", Item: "b", Current: 1000, Total: 1000},
		{Phase: "pull", Item: "a", Done: true},
	}
	if !reflect.DeepEqual(s.pending, want) {
		t.Errorf("got %+v", s.pending)
	}
	for range 2 * maxPending {
		s.add(shed.Event{Phase: "build", Message: "a line"})
	}
	s.add(shed.Event{Phase: "pull", Item: "b", Done: true})
	if n := len(s.pending); n != maxPending+1 || !s.pending[n-1].Done {
		t.Errorf("%d events wait, the last is %+v", n, s.pending[n-1])
	}
}
