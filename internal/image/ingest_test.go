package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func opened(content []byte, err error) opener {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		r := io.Reader(bytes.NewReader(content[min(int(offset), len(content)):]))
		if err != nil {
			r = io.MultiReader(r, iotest.ErrReader(err))
		}
		return io.NopCloser(r), nil
	}
}

func TestIngest(t *testing.T) {
	s := open(t, t.TempDir())
	content := []byte(noise(1<<20, 1))
	desc := descriptor(content, "")
	broken := errors.New("broken")
	var last int64
	report := func(n int64) { last = n }

	if err := s.ingest(t.Context(), desc, opened(content[:1000], broken), report); !errors.Is(err, broken) || last != 1000 {
		t.Errorf("a source that breaks gives %v after %d", err, last)
	}
	if fi, err := os.Stat(s.partial(desc.Digest)); err != nil || fi.Size() != 1000 {
		t.Errorf("the partial file is %v, %v", fi, err)
	}
	asked := int64(-1)
	err := s.ingest(t.Context(), desc, func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		asked = offset
		return opened(append(bytes.Clone(content), "and more"...), nil)(ctx, offset)
	}, report)
	if err != nil || asked != 1000 || last != desc.Size {
		t.Errorf("going on gives %v, from %d, to %d", err, asked, last)
	}
	if b, err := os.ReadFile(s.blob(desc.Digest)); err != nil || !bytes.Equal(b, content) {
		t.Errorf("the blob has %d bytes, %v", len(b), err)
	}
	never := func(context.Context, int64) (io.ReadCloser, error) {
		t.Error("opened, though it is there")
		return nil, broken
	}
	if err := s.ingest(t.Context(), desc, never, report); err != nil {
		t.Error(err)
	}
	if err := s.ingest(t.Context(), v1.Descriptor{Digest: desc.Digest, Size: 5}, never, report); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("another size gives %v", err)
	}
	for name, bad := range map[string]v1.Descriptor{
		"sha512":   {Digest: v1.Hash{Algorithm: "sha512", Hex: strings.Repeat("0", 128)}},
		"negative": {Digest: descriptor(nil, "").Digest, Size: -1},
	} {
		if err := s.ingest(t.Context(), bad, never, report); shed.ErrorCode(err) != shed.CodeUnsupported {
			t.Errorf("%s gives %v", name, err)
		}
	}
	other := descriptor([]byte("other"), "")
	for name, tc := range map[string]struct {
		content string
		want    string
	}{"content": {"OTHER", "do not have that digest"}, "length": {"oth", "ends after 3 of 5"}} {
		err := s.ingest(t.Context(), other, opened([]byte(tc.content), nil), report)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("another %s gives %v", name, err)
		}
		if name == "content" {
			if _, err := os.Stat(s.partial(other.Digest)); !os.IsNotExist(err) {
				t.Errorf("left is the partial file of bad content: %v", err)
			}
		}
	}
	if err := s.ingest(t.Context(), descriptor(nil, ""), never, report); err != nil {
		t.Errorf("an empty blob gives %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.ingest(ctx, descriptor([]byte("x"), ""), opened([]byte("x"), nil), report); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled, it gives %v", err)
	}
}

func TestIngestOnce(t *testing.T) {
	s := open(t, t.TempDir())
	content := []byte(noise(1<<20, 1))
	desc := descriptor(content, "")
	opens := 0
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			err := s.ingest(t.Context(), desc, func(ctx context.Context, offset int64) (io.ReadCloser, error) {
				opens++ // the race detector says if two do this at once
				return io.NopCloser(iotest.OneByteReader(bytes.NewReader(content[offset:]))), nil
			}, func(int64) {})
			if err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if opens != 1 {
		t.Errorf("it was opened %d times", opens)
	}
}

// What follows a blob gets all of it, however it comes in.
func TestFollower(t *testing.T) {
	content := []byte(noise(1<<20, 1))
	desc := descriptor(content, "")
	for name, source := range map[string]opener{
		"bytes": func(ctx context.Context, offset int64) (io.ReadCloser, error) {
			return io.NopCloser(iotest.OneByteReader(bytes.NewReader(content[offset:]))), nil
		},
		"whole":  opened(content, nil),
		"breaks": opened(content[:1<<19], io.ErrClosedPipe),
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			f := newFollower(s, desc.Digest)
			defer f.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				f.end(s.ingest(t.Context(), desc, source, f.grow))
			}()
			got, err := io.ReadAll(f)
			<-done
			if name == "breaks" {
				if !errors.Is(err, io.ErrClosedPipe) || f.restarted() {
					t.Errorf("it gives %v", err)
				}
			} else if err != nil || !bytes.Equal(got, content) {
				t.Errorf("it has %d bytes, %v", len(got), err)
			}
		})
	}
	s := open(t, t.TempDir())
	f := newFollower(s, desc.Digest)
	f.grow(100)
	f.grow(0)
	if _, err := f.Read(make([]byte, 1)); !errors.Is(err, errRestarted) || !f.restarted() {
		t.Errorf("a blob that began anew gives %v", err)
	}
}
