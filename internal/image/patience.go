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
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
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

// maxRefusal is how many bytes a registry has to say what is wrong.
const maxRefusal = 64 << 10

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
	return !errors.As(err, new(*gaveUp)) && (errors.Is(err, errStalled) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
}

// gaveUp is why a try that failed was the last.
type gaveUp struct {
	tries int
	err   error // of the last
}

func (g *gaveUp) Error() string { return fmt.Sprintf("%v, in %d tries", g.err, g.tries) }
func (g *gaveUp) Unwrap() error { return g.err }

// attempts counts the tries at one thing that failed since there was progress: those of a request, of reading the answer, and
// of the requests that are made instead. All who would try again count in the one that goes with the
// context, so that their tries don't multiply. It is for one goroutine at a time.
type attempts struct {
	p      patience
	failed int
}

type attemptsKey struct{}

// with returns ctx for requests that count in a.
func (a *attempts) with(ctx context.Context) context.Context {
	return context.WithValue(ctx, attemptsKey{}, a)
}

// attemptsOf returns what a request with that context counts in.
func (p patience) attemptsOf(ctx context.Context) *attempts {
	if a, ok := ctx.Value(attemptsKey{}).(*attempts); ok {
		return a
	}
	return &attempts{p: p}
}

// fail counts a try that failed with err. It returns nil if there may be another, and else what to give up with.
func (a *attempts) fail(err error) error {
	if a.failed++; a.failed < a.p.tries {
		return nil
	}
	return &gaveUp{a.failed, err}
}

// again counts a try that failed with err, and waits until it is time for another. It returns err if that is of no use.
func (a *attempts) again(ctx context.Context, err error) error {
	if !broken(err) || ctx.Err() != nil {
		return err
	}
	if err := a.fail(err); err != nil {
		return err
	}
	return sleep(ctx, a.p.before(a.failed))
}

// patientTransport does each request with p's patience: it gives up connections that stall, and tries again
// what a registry puts off and, where that does no harm, what failed. An answer that says that it may be different another
// time is an error too: a transport.Error.
type patientTransport struct {
	base http.RoundTripper
	p    patience
}

func (t patientTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	a := t.p.attemptsOf(req.Context())
	for {
		resp, err := t.once(req)
		harmless, wait := idempotent(req), time.Duration(-1)
		switch {
		case err != nil:
			if !broken(err) || req.Context().Err() != nil {
				return nil, err
			}
		case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable:
			harmless = true
			if asked, ok := retryAfter(resp.Header.Get("Retry-After")); ok {
				wait = asked
			}
			err = refusal(resp)
		case resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode >= 500 && resp.StatusCode != http.StatusNotImplemented:
			err = refusal(resp)
		default:
			return resp, nil
		}
		if wait > t.p.atMost {
			return nil, shed.Errorf(shed.CodeRegistry, "%s says %s, and to come back in %s", req.URL.Host, resp.Status, wait.Round(time.Second)).
				WithHint("try again then; registries often allow more to those who are logged in")
		}
		if gave := a.fail(err); gave != nil {
			return nil, gave
		}
		if !harmless || req.Body != nil && req.GetBody == nil {
			return nil, err
		}
		if wait < 0 {
			wait = t.p.before(a.failed)
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

// refusal returns what a registry's answer says is wrong, and lets go of it.
func refusal(resp *http.Response) error {
	return errors.Join(transport.CheckError(resp), resp.Body.Close())
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
	if resp.StatusCode >= http.StatusBadRequest { // it is read into memory
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxRefusal), resp.Body}
	}
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
