package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"
)

// Push copies an image to a registry, byte for byte, blobs that the registry lacks first. It
// reports phase "push", with an item for each blob. Errors are as those of Pull.
func (s *Store) Push(ctx context.Context, opts shed.PushOptions, p shed.Progress) (*shed.Pushed, error) {
	pushed, err := s.push(ctx, opts, patient, p)
	if err != nil {
		return nil, fmt.Errorf("pushing %s: %w", opts.Image, err)
	}
	return pushed, nil
}

func (s *Store) push(ctx context.Context, opts shed.PushOptions, patience patience, p shed.Progress) (*shed.Pushed, error) {
	img, release, err := s.Acquire(opts.Image)
	if err != nil {
		return nil, err
	}
	defer release()
	ref, err := destination(img, opts.To)
	if err != nil {
		return nil, err
	}
	digest, err := v1.NewHash(img.Digest)
	if err != nil {
		return nil, err
	}
	raw, err := s.readBlob(digest)
	if err != nil {
		return nil, err
	}
	m, _, mediaType, err := parseManifest(raw, string(types.OCIManifestSchema1))
	if err != nil {
		return nil, err
	}
	p = serialize(p)
	done := p.Phase("push", "pushing to "+familiar(ref))
	r, err := dialRegistry(ctx, ref.Context(), transport.PushScope, patience)
	if err != nil {
		return nil, err
	}
	defer r.close()
	if err := s.upload(ctx, r, ref, m, rawManifest{raw, mediaType}, p); err != nil {
		return nil, err
	}
	back, _, err := r.manifest(ctx, ref.Identifier())
	if err != nil {
		return nil, err
	}
	there := descriptor(back, mediaType).Digest
	if there != digest {
		return nil, shed.Errorf(shed.CodeRegistry, "%s now has %s there, and not %s, which it was sent", r.repo.RegistryStr(), there, digest).
			WithHint("somebody else pushed to the same tag at the same time, or the registry changes images")
	}
	done()
	return &shed.Pushed{Ref: familiar(ref), Digest: there.String()}, nil
}

// destination returns where to push img to: to, or the image's tag.
func destination(img *shed.Image, to string) (name.Tag, error) {
	if to == "" {
		switch {
		case img.Ref == "":
			return name.Tag{}, shed.Errorf(shed.CodeInvalid, "the image has no tag that would say where to").WithHint("say it with --to REGISTRY/REPOSITORY:TAG")
		case !namesRegistry(img.Ref):
			return name.Tag{}, shed.Errorf(shed.CodeInvalid, "%s names no registry", img.Ref).
				WithHint("say where to with --to REGISTRY/REPOSITORY:TAG; --to docker.io/NAME/%s means Docker Hub", img.Ref)
		}
		to = img.Ref
	}
	ref, err := parseRef(to)
	if err != nil {
		return name.Tag{}, err
	}
	tag, ok := ref.(name.Tag)
	if !ok {
		return name.Tag{}, shed.Errorf(shed.CodeInvalid, "%s has a digest, and what is pushed needs a tag", to).
			WithHint("say which one with --to %s:TAG", ref.Context())
	}
	return tag, nil
}

// rawManifest is a manifest as it is.
type rawManifest struct {
	raw       []byte
	mediaType types.MediaType
}

func (m rawManifest) RawManifest() ([]byte, error)        { return m.raw, nil }
func (m rawManifest) MediaType() (types.MediaType, error) { return m.mediaType, nil }

// upload puts the blobs of an image, and then its manifest.
func (s *Store) upload(ctx context.Context, r *registry, ref name.Tag, m *v1.Manifest, raw rawManifest, p shed.Progress) error {
	pusher, err := remote.NewPusher(remote.WithTransport(r.http.Transport), remote.WithNondistributable,
		remote.WithRetryBackoff(remote.Backoff{Duration: r.p.backoff, Factor: 2, Steps: r.p.tries}), remote.WithRetryPredicate(mayResend))
	if err != nil {
		return err
	}
	blobs := append([]v1.Descriptor{m.Config}, m.Layers...)
	slices.SortFunc(blobs, func(a, b v1.Descriptor) int { return strings.Compare(a.Digest.Hex, b.Digest.Hex) })
	blobs = slices.CompactFunc(blobs, func(a, b v1.Descriptor) bool { return a.Digest == b.Digest })
	uploads := newMeter("push", p, blobs)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(transfers)
	for _, desc := range blobs {
		g.Go(func() error {
			b := &storedBlob{store: s, desc: desc, uploads: uploads}
			if err := pusher.Upload((&attempts{p: r.p}).with(gctx), ref.Repository, b); err != nil {
				return fmt.Errorf("blob %s: %w", desc.Digest, r.explain(err))
			}
			message := ""
			if !b.sent {
				message = "already there"
			}
			uploads.done(desc, message)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return r.explain(pusher.Put((&attempts{p: r.p}).with(ctx), ref, raw))
}

// mayResend says whether an upload that failed with err may go better from its beginning.
func mayResend(err error) bool {
	refusal := (*transport.Error)(nil)
	switch {
	case errors.As(err, new(*gaveUp)), errors.Is(err, errStalled): // that took long enough
		return false
	case errors.As(err, &refusal):
		return refusal.Temporary()
	}
	return broken(err)
}

// storedBlob is a blob of the store as a layer to upload.
type storedBlob struct {
	store   *Store
	desc    v1.Descriptor
	uploads *meter
	sent    bool // or tried: else the registry had it
}

func (b *storedBlob) Digest() (v1.Hash, error)             { return b.desc.Digest, nil }
func (b *storedBlob) Size() (int64, error)                 { return b.desc.Size, nil }
func (b *storedBlob) MediaType() (types.MediaType, error)  { return b.desc.MediaType, nil }
func (b *storedBlob) DiffID() (v1.Hash, error)             { return v1.Hash{}, errors.ErrUnsupported }
func (b *storedBlob) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

func (b *storedBlob) Compressed() (io.ReadCloser, error) {
	f, err := os.Open(b.store.blob(b.desc.Digest))
	if err != nil {
		return nil, err
	}
	b.sent = true
	return &uploadReader{ReadCloser: f, b: b}, nil
}

type uploadReader struct {
	io.ReadCloser
	b *storedBlob
	n int64
}

func (u *uploadReader) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	u.n += int64(n)
	u.b.uploads.report(u.b.desc, u.n, true)
	return n, err
}
