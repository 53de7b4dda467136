package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/charliek/shed"
)

const (
	tarType = "application/x-tar"
	// uploadIdle is how long a client may take to send the next part of a stream.
	uploadIdle = 5 * time.Minute
	// errorTrailer says, percent-encoded in JSON, why a stream ends before its end. Only
	// clients that take trailers get it: for the others the connection breaks.
	errorTrailer = "Shed-Error"
)

type presetRequest struct {
	Preset string `json:"preset"`
}

type tagRequest struct {
	Image string `json:"image"`
	Tag   string `json:"tag"`
}

type pruneRequest struct {
	DryRun bool `json:"dry_run,omitempty"`
}

// imageAnswer makes sure that lists are lists in JSON, never null.
func imageAnswer(img *shed.Image) shed.Image {
	c := *img
	c.InUse = append([]string{}, c.InUse...)
	c.Layers = append([]shed.Layer{}, c.Layers...)
	return c
}

func imageAnswers(images []*shed.Image) []shed.Image {
	answers := make([]shed.Image, 0, len(images))
	for _, img := range images {
		answers = append(answers, imageAnswer(img))
	}
	return answers
}

// imageResult is the result of an operation that makes an image.
func imageResult(img *shed.Image, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return imageAnswer(img), nil
}

func removedResult(removed *shed.Removed, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	c := *removed
	c.Items = append([]shed.RemovedItem{}, c.Items...)
	return c, nil
}

func (s *server) listImages(w http.ResponseWriter, r *http.Request) {
	images, err := s.Images.Images(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, imageAnswers(images))
}

func (s *server) inspectImage(w http.ResponseWriter, r *http.Request) {
	detail, err := s.Images.InspectImage(r.Context(), r.PathValue("ref"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	answer := *detail
	answer.Image = imageAnswer(&detail.Image)
	answer.History = append([]shed.ImageHistory{}, detail.History...)
	writeJSON(w, http.StatusOK, answer)
}

func (s *server) buildPreset(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusOK, func(ctx context.Context, req presetRequest, p shed.Progress) (any, error) {
		return imageResult(s.Images.BuildPreset(ctx, req.Preset, p))
	})
}

func (s *server) buildImage(w http.ResponseWriter, r *http.Request) {
	var opts shed.BuildOptions
	if err := decodeStrict("the parameter options", strings.NewReader(r.URL.Query().Get("options")), &opts); err != nil {
		s.fail(w, r, err)
		return
	}
	s.upload(w, r, func(ctx context.Context, buildContext io.Reader, p shed.Progress) (any, error) {
		return imageResult(s.Images.Build(ctx, opts, buildContext, p))
	})
}

func (s *server) pullImage(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusOK, func(ctx context.Context, opts shed.PullOptions, p shed.Progress) (any, error) {
		return imageResult(s.Images.Pull(ctx, opts, p))
	})
}

func (s *server) pushImage(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusOK, func(ctx context.Context, opts shed.PushOptions, p shed.Progress) (any, error) {
		return s.Images.Push(ctx, opts, p)
	})
}

func (s *server) tagImage(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusOK, func(ctx context.Context, req tagRequest, _ shed.Progress) (any, error) {
		return imageResult(s.Images.Tag(ctx, req.Image, req.Tag))
	})
}

func (s *server) removeImage(w http.ResponseWriter, r *http.Request) {
	force, err := queryBool(r, "force")
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, _ shed.Progress) (any, error) {
		return removedResult(s.Images.RemoveImage(ctx, r.PathValue("ref"), force))
	})
}

func (s *server) pruneImages(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusOK, func(ctx context.Context, req pruneRequest, _ shed.Progress) (any, error) {
		return removedResult(s.Images.PruneImages(ctx, req.DryRun))
	})
}

func (s *server) loadImages(w http.ResponseWriter, r *http.Request) {
	s.upload(w, r, func(ctx context.Context, archive io.Reader, p shed.Progress) (any, error) {
		images, err := s.Images.Load(ctx, archive, p)
		if err != nil {
			return nil, err
		}
		return imageAnswers(images), nil
	})
}

// saveImages sends an archive. What goes wrong after it has begun must not look like its end.
func (s *server) saveImages(w http.ResponseWriter, r *http.Request) {
	names := r.URL.Query()["name"]
	if len(names) == 0 {
		s.fail(w, r, shed.Errorf(shed.CodeInvalid, "no image is named").WithHint("name each: ?name=base"))
		return
	}
	takesTrailers := strings.Contains(strings.ToLower(r.Header.Get("TE")), "trailers")
	w.Header().Set("Content-Type", tarType)
	err := s.Images.Save(r.Context(), names, w)
	if err == nil {
		return
	}
	if !w.(*responseWriter).wrote {
		s.fail(w, r, err)
		return
	}
	s.logFailure(r, err)
	text, jsonErr := json.Marshal(newErrorBody(err))
	if !takesTrailers || jsonErr != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set(http.TrailerPrefix+errorTrailer, url.PathEscape(string(text)))
}

// upload carries out op, which reads the request's body, a tar of any size. The answer may
// begin, and even end, while the client still sends.
func (s *server) upload(w http.ResponseWriter, r *http.Request, op func(ctx context.Context, body io.Reader, p shed.Progress) (any, error)) {
	if !s.hasType(w, r, tarType) {
		return
	}
	ctl := http.NewResponseController(w)
	if err := ctl.EnableFullDuplex(); err != nil {
		s.fail(w, r, shed.Errorf(shed.CodeInternal, "the answer can't begin before the request ends: %w", err))
		return
	}
	w.Header().Set("Connection", "close") // where the next request would begin isn't sure
	stop := context.AfterFunc(r.Context(), func() { ctl.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s.operation(w, r, http.StatusOK, func(ctx context.Context, p shed.Progress) (any, error) {
		return op(ctx, &uploadReader{r.Context(), r.Body, ctl}, p)
	})
	// A connection that is closed while the client sends could take the answer
	// with it: let the client close first.
	ctl.Flush()
	ctl.SetReadDeadline(time.Now().Add(linger))
	io.Copy(io.Discard, r.Body)
}

// uploadReader reads a body from a client that may be slow, but not stall. Whoever cancels
// ctx moves the deadline to the past.
type uploadReader struct {
	ctx  context.Context
	body io.Reader
	ctl  *http.ResponseController
}

func (u *uploadReader) Read(p []byte) (int, error) {
	deadline := time.Now().Add(uploadIdle)
	u.ctl.SetReadDeadline(deadline)
	if u.ctx.Err() != nil { // it may have been before that
		return 0, u.cancelled()
	}
	n, err := u.body.Read(p)
	var netErr net.Error
	if !errors.As(err, &netErr) || !netErr.Timeout() {
		return n, err
	}
	if time.Now().Before(deadline) {
		return n, u.cancelled()
	}
	return n, shed.Errorf(shed.CodeInvalid, "the client has sent nothing for %s", uploadIdle)
}

func (u *uploadReader) cancelled() error {
	return shed.Errorf(shed.CodeUnreachable, "the server is stopping: %w", context.Cause(u.ctx))
}
