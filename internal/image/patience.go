package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"github.com/charliek/shed"
)

// patience says how long a registry may take, and how often what failed is tried again.
type patience struct {
	stall   time.Duration // without a byte: then a connection counts as broken
	answer  time.Duration // for the answer to what changes something, once it has been sent
	backoff time.Duration // before the second try; doubled for each one that follows
	tries   int           // without any progress
	atMost  time.Duration // that a registry may ask us to wait
}

var patient = patience{
	stall: 30 * time.Second, answer: 5 * time.Minute, backoff: 500 * time.Millisecond, tries: 5, atMost: time.Minute,
}

// before returns how long to wait before the try that follows n others.
func (p patience) before(n int) time.Duration { return p.backoff << (n - 1) }

// sleep returns early, with an error, if ctx is done.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errStalled is why a connection on which nothing moves was given up.
var errStalled = errors.New("the connection stalled")

// broken says whether err is of a connection that broke, so that another one may do better.
func broken(err error) bool {
	return errors.Is(err, errStalled) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// patientTransport does each request with p's patience: it gives up connections that stall, and tries again
// what a registry puts off and, where that does no harm, what failed.
type patientTransport struct {
	base http.RoundTripper
	p    patience
}

func (t patientTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	for try := 1; ; try++ {
		resp, err := t.once(req)
		again := try < t.p.tries && (req.Body == nil || req.GetBody != nil)
		wait := t.p.before(try)
		switch {
		case err != nil:
			again = again && idempotent(req) && broken(err)
		case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable:
			asked, ok := retryAfter(resp.Header.Get("Retry-After"))
			if ok && asked > t.p.atMost {
				resp.Body.Close()
				return nil, shed.Errorf(shed.CodeRegistry, "%s says %s, and to come back in %s", req.URL.Host, resp.Status, asked.Round(time.Second)).
					WithHint("try again then; registries often allow more to those who are logged in")
			}
			if ok {
				wait = asked
			}
		case resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode >= 500 && resp.StatusCode != http.StatusNotImplemented:
			again = again && idempotent(req)
		default:
			again = false
		}
		if !again {
			return resp, err
		}
		if resp != nil {
			resp.Body.Close()
		}
		if err := sleep(req.Context(), wait); err != nil {
			return nil, err
		}
		if req.GetBody != nil {
			body, err := req.GetBody()
			if err != nil {
				return nil, err
			}
			req = req.Clone(req.Context())
			req.Body = body
		}
	}
}

func idempotent(req *http.Request) bool {
	return req.Method == http.MethodGet || req.Method == http.MethodHead
}

// retryAfter returns how long to wait according to that header: a number of seconds, or a date.
func retryAfter(header string) (time.Duration, bool) {
	if n, err := strconv.Atoi(header); err == nil && n >= 0 && n < 1<<31 {
		return time.Duration(n) * time.Second, true
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(time.Until(at), 0), true
	}
	return 0, false
}

// once does a request once. Nothing of it goes on when it returned an error, or when the body of the
// response is closed.
func (t patientTransport) once(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	w := &watchdog{cancel: cancel}
	limit := t.p.stall
	if !idempotent(req) {
		limit = t.p.answer
	}
	w.timer = time.AfterFunc(limit, w.bark)
	req = req.Clone(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &watchedUpload{ReadCloser: req.Body, w: w, p: t.p}
	}
	resp, err := t.base.RoundTrip(req)
	w.timer.Stop()
	if err != nil {
		err = w.explain(ctx, err)
		cancel(nil)
		return nil, err
	}
	resp.Body = &watchedDownload{ReadCloser: resp.Body, w: w, ctx: ctx, stall: t.p.stall}
	return resp, nil
}

// watchdog cancels a request unless its timer is reset or stopped in time.
type watchdog struct {
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

func (w *watchdog) bark() { w.cancel(errStalled) }

// explain returns err, or errStalled if that is why.
func (w *watchdog) explain(ctx context.Context, err error) error {
	if err != nil && !errors.Is(err, errStalled) && errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w: %w", errStalled, err)
	}
	return err
}

// watchedUpload gives a request's body time as long as it is being sent.
type watchedUpload struct {
	io.ReadCloser
	w *watchdog
	p patience
}

func (u *watchedUpload) Read(b []byte) (int, error) {
	n, err := u.ReadCloser.Read(b)
	limit := u.p.stall
	if err != nil { // it has been sent, but for what is in buffers
		limit = u.p.answer
	}
	u.w.timer.Reset(limit)
	return n, err
}

// watchedDownload gives a response's body time for each Read. Between reads, it isn't the registry that is slow.
type watchedDownload struct {
	io.ReadCloser
	w     *watchdog
	ctx   context.Context
	stall time.Duration
}

func (d *watchedDownload) Read(b []byte) (int, error) {
	d.w.timer.Reset(d.stall)
	n, err := d.ReadCloser.Read(b)
	d.w.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = d.w.explain(d.ctx, err)
	}
	return n, err
}

func (d *watchedDownload) Close() error {
	d.w.timer.Stop()
	d.w.cancel(nil)
	return d.ReadCloser.Close()
}
