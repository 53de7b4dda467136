package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Creates, and operations that write an image, go on while images are pruned and lose their tags.
func TestPruneConcurrently(t *testing.T) {
	s := open(t, t.TempDir())
	// Records are written while the image is held, as creates do.
	var mu sync.Mutex
	records := map[string][]string{}
	inUse := func() (map[string][]string, error) {
		mu.Lock()
		defer mu.Unlock()
		used := map[string][]string{}
		for k, v := range records {
			used[k] = slices.Clone(v)
		}
		return used, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var pruner, others sync.WaitGroup
	pruned := 0
	pruner.Go(func() {
		for ctx.Err() == nil {
			r, err := s.Prune(t.Context(), inUse, false)
			if err != nil {
				t.Error(err)
				return
			}
			pruned += len(r.Items)
		}
	})
	// Images are written while they are held, and each takes the tag from the last.
	write := func(i, n int) {
		config := fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{"User":"%d-%d"},"rootfs":{"type":"layers","diff_ids":[]}}`, runtime.GOARCH, i, n)
		c := descriptor(config, types.OCIConfigJSON)
		manifest := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":%q,"size":%d,"digest":%q},"layers":[]}`, c.MediaType, c.Size, c.Digest)
		m := descriptor(manifest, types.OCIManifestSchema1)
		defer s.hold(c.Digest, m.Digest)()
		for d, b := range map[v1.Hash][]byte{c.Digest: config, m.Digest: manifest} {
			if err := s.writeFile(s.blob(d), b); err != nil {
				t.Error(err)
			}
		}
		if err := s.tag(m, fmt.Sprintf("t%d", i)); err != nil {
			t.Error(err)
		}
	}
	for i := range 3 {
		write(i, 0)
		written := make(chan struct{})
		others.Go(func() {
			defer close(written)
			for n := range 30 {
				write(i, n+1)
				if _, err := s.Resolve(fmt.Sprintf("t%d", i)); err != nil {
					t.Error(err)
				}
			}
		})
		// One that creates sheds of them.
		others.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-written:
					return
				default:
				}
				img, release, err := s.Acquire(fmt.Sprintf("t%d", i))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				records[img.Digest] = append(records[img.Digest], fmt.Sprintf("shed-%d-%d", i, n))
				mu.Unlock()
				release()
				if _, _, err := s.Rootfs(t.Context(), img, nil); err != nil {
					t.Errorf("a shed has lost its image: %v", err)
				}
				if n%4 == 0 {
					continue
				}
				mu.Lock() // most of them go again
				if users := records[img.Digest]; len(users) > 1 {
					records[img.Digest] = users[:len(users)-1]
				} else {
					delete(records, img.Digest)
				}
				mu.Unlock()
			}
		})
	}
	others.Wait()
	cancel()
	pruner.Wait()
	for digest := range records {
		img, err := s.Resolve(digest)
		if err != nil {
			t.Errorf("a shed has lost its image: %v", err)
			continue
		}
		if _, _, err := s.Rootfs(t.Context(), img, nil); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d things were pruned, %d images are in use", pruned, len(records))
	if len(records) == 0 {
		t.Error("nothing was created")
	}
	if len(s.held) != 0 {
		t.Errorf("held are %v", s.held)
	}
}

// A layer that is made while images are pruned keeps its block image, though no image has it yet.
func TestPruneWhileAdding(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	var pruner sync.WaitGroup
	pruner.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.Prune(t.Context(), unused, false); err != nil {
				t.Error(err)
				return
			}
		}
	})
	added, err := s.newAddition()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		blob, l, err := added.layer(t.Context(), bytes.NewReader(tarOf(t, fmt.Sprint("f", i), "x")))
		if err != nil {
			t.Fatal(err)
		}
		if err := rootfs.Commit(blob, s.blob(l.desc.Digest), 0o644); err != nil {
			t.Error(err)
		}
		if _, ok := s.layers.Path(l.diffID); !ok {
			t.Errorf("layer %d has lost its block image", i)
		}
	}
	cancel()
	pruner.Wait()
	if err := added.end(nil); err != nil {
		t.Error(err)
	}
	if r, err := s.Prune(t.Context(), unused, false); err != nil || len(r.Items) != 100 {
		t.Errorf("at the end a prune removes %d things, %v; want 50 blobs and as many block images", len(r.Items), err)
	}
}

// However far a removal came, the index leads only to what is there, and the next prune removes the rest.
func TestPruneCutOff(t *testing.T) {
	s := open(t, t.TempDir())
	addImage(t, s, "stays", gz(t, "stays", "x"))
	ready(t, s, "stays")
	want := tree(t, s)
	addImage(t, s, "goes", gz(t, "stays", "x"), gz(t, "goes", "x"))
	ready(t, s, "goes")
	for n := 0; ; n++ {
		// What a kill leaves is what an end after n files does.
		ctx := &endAfter{Context: t.Context(), n: n}
		_, err := s.Remove(ctx, "goes", false, unused)
		if n == 0 && !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		s = reopen(t, s)
		list, lerr := s.List(t.Context())
		if lerr != nil || len(list) != 1 || list[0].Platform == "" {
			t.Fatalf("after %d files the store lists %v, %v", n, list, lerr)
		}
		ready(t, s, "stays")
		r, perr := s.Prune(t.Context(), unused, false)
		if perr != nil || (len(r.Items) == 0) != (err == nil) {
			t.Fatalf("after %d files a prune removes %+v, %v", n, r, perr)
		}
		if now := tree(t, s); !slices.Equal(now, want) {
			t.Fatalf("after %d files and a prune there are %v", n, now)
		}
		if err == nil {
			if n < 4 {
				t.Errorf("it ended after %d files", n)
			}
			return
		}
		addImage(t, s, "goes", gz(t, "stays", "x"), gz(t, "goes", "x"))
		ready(t, s, "goes")
	}
}

// endAfter is a context that is done when it has been asked n times.
type endAfter struct {
	context.Context
	n int
}

func (c *endAfter) Err() error {
	if c.n--; c.n < 0 {
		return context.Canceled
	}
	return nil
}
