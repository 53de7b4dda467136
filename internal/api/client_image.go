package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/charliek/shed"
)

// imagePath returns the path of an image's resource. A name with slashes is one segment.
func imagePath(prefix, name string) string {
	escaped := url.PathEscape(name)
	if name == "." || name == ".." { // these would lead to another path
		escaped = strings.ReplaceAll(name, ".", "%2E")
	}
	return prefix + escaped
}

func (c *Client) Images(ctx context.Context) ([]*shed.Image, error) {
	var images []*shed.Image
	err := c.call(ctx, http.MethodGet, "/api/images", nil, &images, nil)
	return images, err
}

func (c *Client) InspectImage(ctx context.Context, name string) (*shed.ImageDetail, error) {
	return result[shed.ImageDetail](ctx, c, http.MethodGet, imagePath("/api/images/inspect/", name), nil, nil)
}

func (c *Client) BuildPreset(ctx context.Context, preset string, p shed.Progress) (*shed.Image, error) {
	return result[shed.Image](ctx, c, http.MethodPost, "/api/images/build/preset", presetRequest{preset}, p)
}

// Build implements shed.Images. On error a Read of buildContext may still be under way.
func (c *Client) Build(ctx context.Context, opts shed.BuildOptions, buildContext io.Reader, p shed.Progress) (*shed.Image, error) {
	options, err := json.Marshal(opts)
	if err != nil {
		return nil, err
	}
	img := new(shed.Image)
	path := "/api/images/build?options=" + url.QueryEscape(string(options))
	if err := c.upload(ctx, path, buildContext, img, p); err != nil {
		return nil, err
	}
	return img, nil
}

func (c *Client) Pull(ctx context.Context, opts shed.PullOptions, p shed.Progress) (*shed.Image, error) {
	return result[shed.Image](ctx, c, http.MethodPost, "/api/images/pull", opts, p)
}

func (c *Client) Push(ctx context.Context, opts shed.PushOptions, p shed.Progress) (*shed.Pushed, error) {
	return result[shed.Pushed](ctx, c, http.MethodPost, "/api/images/push", opts, p)
}

// Save implements shed.Images. An error of w is returned as it is.
func (c *Client) Save(ctx context.Context, names []string, w io.Writer) error {
	req, err := newRequest(ctx, http.MethodGet, "/api/images/save?"+url.Values{"name": names}.Encode(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("TE", "trailers")
	resp, err := c.send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, &answerReader{resp.Body, ctx, c}); err != nil {
		return err
	}
	trailer := resp.Trailer.Get(errorTrailer)
	if trailer == "" {
		return nil
	}
	text, err := url.PathUnescape(trailer)
	if err == nil {
		err = decodeError([]byte(text))
	}
	return c.requestError(ctx, err)
}

// Load implements shed.Images. On error a Read of archive may still be under way.
func (c *Client) Load(ctx context.Context, archive io.Reader, p shed.Progress) ([]*shed.Image, error) {
	var images []*shed.Image
	if err := c.upload(ctx, "/api/images/load", archive, &images, p); err != nil {
		return nil, err
	}
	return images, nil
}

func (c *Client) Tag(ctx context.Context, name, tag string) (*shed.Image, error) {
	return result[shed.Image](ctx, c, http.MethodPost, "/api/images/tag", tagRequest{name, tag}, nil)
}

func (c *Client) RemoveImage(ctx context.Context, name string, force bool) (*shed.Removed, error) {
	path := imagePath("/api/images/", name)
	if force {
		path += "?force=true"
	}
	return result[shed.Removed](ctx, c, http.MethodDelete, path, nil, nil)
}

func (c *Client) PruneImages(ctx context.Context, dryRun bool) (*shed.Removed, error) {
	return result[shed.Removed](ctx, c, http.MethodPost, "/api/images/prune", pruneRequest{dryRun}, nil)
}

// upload sends a tar and decodes the answer into v. It asks for events even where p
// is nil: writing them is how the server notices a client that has gone away.
func (c *Client) upload(ctx context.Context, path string, tar io.Reader, v any, p shed.Progress) error {
	req, err := newRequest(ctx, http.MethodPost, path, nil)
	if err != nil {
		return err
	}
	// A Read of tar can't be interrupted, but net/http waits for those of the body.
	body, feed := io.Pipe()
	defer body.Close()
	stop := context.AfterFunc(ctx, func() { body.Close() })
	defer stop()
	failed := make(chan error, 1)
	go func() {
		source := &source{r: tar}
		_, err := io.CopyBuffer(feed, source, make([]byte, 64<<10))
		if source.err != nil {
			failed <- source.err
		}
		feed.CloseWithError(err)
	}()
	req.Body = body
	req.ContentLength = -1
	req.Header.Set("Content-Type", tarType)
	req.Header.Set("Accept", eventsType)
	resp, err := c.send(req)
	if err == nil {
		err = c.decodeAnswer(resp, v, p)
		resp.Body.Close()
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	select {
	case cause := <-failed: // what breaks the source off breaks the connection off too
		return fmt.Errorf("sending to %s: %w", c.label, cause)
	default:
		return err
	}
}

// source remembers what its reader failed with.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}
