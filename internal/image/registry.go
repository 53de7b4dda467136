package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// registry is a connection to one repository of a registry, as the user that Docker's configuration, or podman's, says.
type registry struct {
	repo name.Repository
	p    patience
	base *http.Transport
	http *http.Client
}

// dialRegistry finds out how to talk to the registry, and logs in. The caller must call close in the end.
func dialRegistry(ctx context.Context, repo name.Repository, scope string, p patience) (*registry, error) {
	base := remote.DefaultTransport.(*http.Transport).Clone()
	base.DisableCompression = true // digests are of the bytes as they are
	r := &registry{repo: repo, p: p, base: base}
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, repo)
	if err != nil {
		return nil, shed.Errorf(shed.CodeRegistry, "getting the credentials for %s: %w", repo.RegistryStr(), err).
			WithHint("look at the server's ~/.docker/config.json and the credential helpers that it names")
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, patientTransport{base, p}, []string{repo.Scope(scope)})
	if err != nil {
		r.close()
		return nil, r.explain(err)
	}
	r.http = &http.Client{Transport: rt}
	return r, nil
}

func (r *registry) close() { r.base.CloseIdleConnections() }

// get requests a blob or a manifest of the repository. The caller must close the body.
func (r *registry) get(ctx context.Context, kind, id string, header http.Header, codes ...int) (*http.Response, error) {
	u := url.URL{Scheme: r.repo.Scheme(), Host: r.repo.RegistryStr(), Path: fmt.Sprintf("/v2/%s/%s/%s", r.repo.RepositoryStr(), kind, id)}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := r.http.Do(req)
	if err != nil {
		return nil, err
	}
	if err := transport.CheckError(resp, codes...); err != nil {
		return nil, errors.Join(err, resp.Body.Close())
	}
	return resp, nil
}

// manifest returns the bytes of a manifest or an index, by tag or digest, and what the registry calls them.
func (r *registry) manifest(ctx context.Context, id string) (raw []byte, contentType string, err error) {
	tries := &attempts{p: r.p}
	for ctx := tries.with(ctx); ; {
		if raw, contentType, err = r.tryManifest(ctx, id); err == nil {
			break
		}
		if err := tries.again(ctx, err); err != nil {
			return nil, "", r.explain(err)
		}
	}
	if digest, err := v1.NewHash(id); err == nil && digest != descriptor(raw, "").Digest {
		return nil, "", shed.Errorf(shed.CodeInvalid, "the manifest that came for %s does not have that digest", id).
			WithHint("the registry, or something on the way to it, is broken")
	}
	return raw, contentType, nil
}

func (r *registry) tryManifest(ctx context.Context, id string) ([]byte, string, error) {
	resp, err := r.get(ctx, "manifests", id, http.Header{"Accept": accepted}, http.StatusOK)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, "", fmt.Errorf("reading the manifest: %w", err)
	}
	if len(raw) > maxManifest {
		return nil, "", shed.Errorf(shed.CodeInvalid, "its manifest has more than %d bytes", maxManifest)
	}
	return raw, resp.Header.Get("Content-Type"), nil
}

// image returns the manifest of the image for the wanted platform that id, a tag or a digest, leads to.
func (r *registry) image(ctx context.Context, id string, want v1.Platform) (raw []byte, m *v1.Manifest, mediaType types.MediaType, err error) {
	var others []string
	raw, m, mediaType, err = r.imageIn(ctx, id, want, maxDepth, &others)
	if err == nil && m == nil {
		err = shed.Errorf(shed.CodeNoImage, "it is not there for %s; it is for %s", want, listed(others)).
			WithHint("choose one of these with --platform, though sheds here can only run those for this server")
	}
	return raw, m, mediaType, err
}

func listed(platforms []string) string {
	if len(platforms) == 0 {
		return "no platform"
	}
	return strings.Join(platforms, ", ")
}

func (r *registry) imageIn(ctx context.Context, id string, want v1.Platform, depth int, others *[]string) ([]byte, *v1.Manifest, types.MediaType, error) {
	if depth == 0 {
		return nil, nil, "", shed.Errorf(shed.CodeUnsupported, "its indexes are more than %d deep", maxDepth)
	}
	raw, contentType, err := r.manifest(ctx, id)
	if err != nil {
		return nil, nil, "", err
	}
	m, index, mediaType, err := parseManifest(raw, contentType)
	if err != nil || m != nil {
		return raw, m, mediaType, err
	}
	fitting, rest := candidates(index, want)
	*others = append(*others, rest...)
	for _, d := range fitting {
		raw, m, mediaType, err := r.imageIn(ctx, d.Digest.String(), want, depth-1, others)
		if err != nil || m != nil {
			return raw, m, mediaType, err
		}
	}
	return nil, nil, "", nil
}

// blob returns a reader of the blob's bytes from offset on, for Store.ingest: it goes on by itself where a connection
// breaks, as long as there is some progress.
func (r *registry) blob(ctx context.Context, desc v1.Descriptor, offset int64) (io.ReadCloser, error) {
	tries := &attempts{p: r.p}
	b := &remoteBlob{ctx: tries.with(ctx), registry: r, desc: desc, at: offset, tries: tries}
	if err := b.retry(nil); err != nil {
		return nil, r.explain(err)
	}
	return b, nil
}

type remoteBlob struct {
	ctx      context.Context
	registry *registry
	desc     v1.Descriptor
	at       int64 // of the next byte
	body     io.ReadCloser
	tries    *attempts
}

func (b *remoteBlob) Read(p []byte) (int, error) {
	for {
		n, err := b.body.Read(p)
		b.at += int64(n)
		if n > 0 {
			b.tries.failed = 0
			return n, nil
		}
		if err == nil {
			continue
		}
		if b.at >= b.desc.Size && errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err := b.retry(err); err != nil {
			return 0, b.registry.explain(err)
		}
	}
}

// retry opens the blob where its bytes go on, after err ended what was there of them.
func (b *remoteBlob) retry(err error) error {
	for {
		if err != nil {
			if b.body != nil {
				b.body.Close()
				b.body = nil
			}
			if err := b.tries.again(b.ctx, err); err != nil {
				return err
			}
		}
		if err = b.open(); err == nil {
			return nil
		}
	}
}

func (b *remoteBlob) open() error {
	header := http.Header{}
	if b.at > 0 {
		header.Set("Range", fmt.Sprintf("bytes=%d-", b.at))
	}
	resp, err := b.registry.get(b.ctx, "blobs", b.desc.Digest.String(), header, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return err
	}
	skip, err := skipped(resp, b.at, b.desc.Size)
	if err == nil {
		// A registry that knows nothing of ranges sends what is there again.
		_, err = io.CopyN(io.Discard, resp.Body, skip)
	}
	if err != nil {
		return errors.Join(err, resp.Body.Close())
	}
	b.body = resp.Body
	return nil
}

// skipped returns how many bytes of the response come before those from at on, of a blob with size bytes.
func skipped(resp *http.Response, at, size int64) (int64, error) {
	skip := at
	if resp.StatusCode == http.StatusPartialContent {
		var first, last int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &first, &last); err != nil || first > at || first < 0 {
			return 0, shed.Errorf(shed.CodeRegistry, "asked for the bytes from %d on, the registry sent %q", at, resp.Header.Get("Content-Range"))
		}
		skip = at - first
	}
	if n := resp.ContentLength; n >= 0 && n != size-at+skip {
		return 0, shed.Errorf(shed.CodeInvalid, "the registry has %d bytes, and the manifest says %d", n+at-skip, size).
			WithHint("the image is damaged at the registry: push it there again")
	}
	return skip, nil
}

func (b *remoteBlob) Close() error {
	if b.body == nil {
		return nil
	}
	return b.body.Close()
}

// short returns what docker(1) shows of a digest.
func short(digest v1.Hash) string { return digest.Hex[:min(len(digest.Hex), minPrefix)] }
