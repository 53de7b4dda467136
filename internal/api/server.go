package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
)

const (
	maxHeader       = 128 << 10 // bytes of a request, its URL included
	maxBody         = 1 << 20   // bytes of a request
	headerTimeout   = 10 * time.Second
	idleTimeout     = 2 * time.Minute
	shutdownTimeout = 10 * time.Second
)

type server struct {
	Config
	mux      *http.ServeMux
	refusals refusals
}

// Config is what a server serves.
type Config struct {
	Sheds   shed.Sheds
	Images  shed.Images
	Info    shed.Info
	HostKey shed.HostKey // of the SSH server
	Log     *slog.Logger
}

// NewServer returns the handler of everything under /api.
//
// It refuses what comes from a web page: requests with an Origin, and on TCP
// those whose Host is neither loopback nor the address they came in on. An
// exec and a followed log end when the request's context does: Serve sees to it.
func NewServer(c Config) http.Handler {
	s := &server{Config: c, mux: http.NewServeMux()}
	for pattern, h := range s.routes() {
		s.mux.HandleFunc(pattern, h)
	}
	return s
}

// Serve serves h on ln until ctx is done. It then cancels what is going on,
// and returns when every handler has returned, upgraded connections included.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	handlers := &handlerGroup{Handler: h}
	srv := &http.Server{
		Handler:           handlers,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    maxHeader,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		// Handlers are ending by themselves; a client that doesn't read is cut off.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		err := srv.Shutdown(grace)
		srv.Close()
		stopped <- err
	})
	err := srv.Serve(ln)
	if stop() {
		srv.Close()
		handlers.wait()
		return fmt.Errorf("serve %s: %w", ln.Addr(), err)
	}
	if err := <-stopped; err != nil {
		log.Warn("connections were cut off", "error", err)
	}
	handlers.wait()
	return nil
}

// handlerGroup waits for handlers, which http.Server doesn't do for
// connections that were hijacked.
type handlerGroup struct {
	http.Handler
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

func (g *handlerGroup) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		panic(http.ErrAbortHandler)
	}
	g.wg.Add(1)
	g.mu.Unlock()
	defer g.wg.Done()
	g.Handler.ServeHTTP(w, r)
}

// wait returns when all handlers have; none begins any more.
func (g *handlerGroup) wait() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.wg.Wait()
}

func (s *server) routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /api/info":                               s.getInfo,
		"GET /api/openapi.json":                       s.getOpenAPI,
		"GET /api/ssh-host-key":                       s.getHostKey,
		"GET /api/sessions":                           s.allSessions,
		"GET /api/sheds":                              s.listSheds,
		"POST /api/sheds":                             s.createShed,
		"GET /api/sheds/{name}":                       s.getShed,
		"DELETE /api/sheds/{name}":                    s.deleteShed,
		"POST /api/sheds/{name}/start":                s.startShed,
		"POST /api/sheds/{name}/stop":                 s.stopShed,
		"POST /api/sheds/{name}/reset":                s.resetShed,
		"GET /api/sheds/{name}/logs":                  s.logs,
		"POST /api/sheds/{name}/exec":                 s.exec,
		"POST /api/sheds/{name}/dial":                 s.dial,
		"POST /api/sheds/{name}/listen":               s.listen,
		"GET /api/sheds/{name}/sessions":              s.sessions,
		"DELETE /api/sheds/{name}/sessions/{session}": s.killSession,
		"GET /api/images":                             s.listImages,
		"GET /api/images/inspect/{ref...}":            s.inspectImage,
		"GET /api/images/save":                        s.saveImages,
		"POST /api/images/build":                      s.buildImage,
		"POST /api/images/build/preset":               s.buildPreset,
		"POST /api/images/load":                       s.loadImages,
		"POST /api/images/prune":                      s.pruneImages,
		"POST /api/images/pull":                       s.pullImage,
		"POST /api/images/push":                       s.pushImage,
		"POST /api/images/tag":                        s.tagImage,
		"DELETE /api/images/{ref...}":                 s.removeImage,
	}
}

func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := newResponseWriter(rw, r)
	defer w.end()
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		if v == http.ErrAbortHandler {
			panic(v)
		}
		s.Log.Error("panic in a request", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
		if w.wrote {
			panic(http.ErrAbortHandler) // so that the client sees a broken answer
		}
		s.fail(w, r, shed.Errorf(shed.CodeInternal, "%s %s: the server has a fault; its log has the details", r.Method, r.URL.Path))
	}()

	if err := checkCaller(r); err != nil {
		s.refuse(w, r, err)
		return
	}
	// Nothing would notice that a client goes away which owes a body that nobody reads.
	if (r.Method == http.MethodGet || r.Method == http.MethodHead) && !s.noBody(w, r) {
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		s.noRoute(w, r)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// noRoute answers what the mux has no route for. The mux knows which methods the path has.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) {
	h, _ := s.mux.Handler(r)
	probe := &headerProbe{header: http.Header{}}
	h.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", probe.header.Get("Allow"))
		s.failStatus(w, r, probe.status, shed.Errorf(shed.CodeUnsupported, "%s has no method %s", r.URL.Path, r.Method).
			WithHint("it has %s", probe.header.Get("Allow")))
		return
	}
	s.failStatus(w, r, http.StatusNotFound, shed.Errorf(shed.CodeUnsupported, "this server has no %s", r.URL.Path).
		WithHint("client and server may be of different versions; /api/openapi.json lists what there is"))
}

// headerProbe is a ResponseWriter that keeps status and headers alone.
type headerProbe struct {
	header http.Header
	status int
}

func (p *headerProbe) Header() http.Header         { return p.header }
func (p *headerProbe) WriteHeader(status int)      { p.status = status }
func (p *headerProbe) Write(b []byte) (int, error) { return len(b), nil }

func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	s.failStatus(w, r, statusOf(shed.ErrorCode(err)), err)
}

func (s *server) failStatus(w http.ResponseWriter, r *http.Request, status int, err error) {
	s.logFailure(r, err)
	writeJSON(w, status, newErrorBody(err))
}

func (s *server) logFailure(r *http.Request, err error) {
	level := slog.LevelInfo
	if shed.ErrorCode(err) == shed.CodeInternal && r.Context().Err() == nil {
		level = slog.LevelError
	}
	s.Log.Log(r.Context(), level, "request failed", "method", r.Method, "path", r.URL.Path, "error", err)
}

// writeJSON ignores errors: they mean that the client is gone.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// readJSON reads the request's body, one JSON value and nothing else, into v.
// On error it has answered the request.
func (s *server) readJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	return s.hasType(w, r, jsonType) &&
		s.readBody(w, r, func(body io.Reader) error { return decodeStrict("the request's body", body, v) })
}

// hasType checks the type of the request's body. On error it has answered the request.
func (s *server) hasType(w http.ResponseWriter, r *http.Request, want string) bool {
	got := r.Header.Get("Content-Type")
	if t, _, _ := mime.ParseMediaType(got); t == want {
		return true
	}
	s.failStatus(w, r, http.StatusUnsupportedMediaType,
		shed.Errorf(shed.CodeInvalid, "the request's Content-Type is %q", got).WithHint("send %s", want))
	return false
}

// noBody checks that the request has no body. On error it has answered the request.
func (s *server) noBody(w http.ResponseWriter, r *http.Request) bool {
	return s.readBody(w, r, func(body io.Reader) error {
		n, err := body.Read(make([]byte, 1))
		if n > 0 {
			return shed.Errorf(shed.CodeInvalid, "%s %s takes no body", r.Method, r.URL.Path)
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	})
}

// readBody reads to the end of the body: only then does net/http watch the
// connection, and cancel the request's context when the client goes away.
func (s *server) readBody(w http.ResponseWriter, r *http.Request, read func(io.Reader) error) bool {
	err := read(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		http.NewResponseController(w).SetReadDeadline(time.Time{})
		return true
	}
	var tooLarge *http.MaxBytesError
	var netErr net.Error
	switch {
	case errors.As(err, &tooLarge):
		s.failStatus(w, r, http.StatusRequestEntityTooLarge,
			shed.Errorf(shed.CodeInvalid, "the request's body is over the limit of %d bytes", tooLarge.Limit))
	case errors.As(err, &netErr) && netErr.Timeout():
		s.failStatus(w, r, http.StatusRequestTimeout,
			shed.Errorf(shed.CodeInvalid, "the request's body did not arrive within %s", bodyTimeout))
	default:
		s.fail(w, r, err)
	}
	return false
}

// decodeStrict decodes the one JSON value in body, which errors call what.
func decodeStrict(what string, body io.Reader, v any) error {
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if err == nil {
		if _, err = dec.Token(); errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil || errors.As(err, new(*json.SyntaxError)) {
			return shed.Errorf(shed.CodeInvalid, "%s goes on after its JSON value", what)
		}
		return err
	}
	if errors.Is(err, io.EOF) {
		return shed.Errorf(shed.CodeInvalid, "%s is missing; it has to be JSON", what)
	}
	var tooLarge *http.MaxBytesError
	var netErr net.Error
	if errors.As(err, &tooLarge) || errors.As(err, &netErr) {
		return err
	}
	var typeErr *json.UnmarshalTypeError
	if errors.As(err, &typeErr) && typeErr.Field == "" {
		return shed.Errorf(shed.CodeInvalid, "%s can't be a JSON %s", what, typeErr.Value)
	}
	if errors.As(err, &typeErr) {
		return shed.Errorf(shed.CodeInvalid, "%s: the field %q can't be a JSON %s", what, typeErr.Field, typeErr.Value)
	}
	return shed.Errorf(shed.CodeInvalid, "%s: %s", what, strings.TrimPrefix(err.Error(), "json: "))
}

func (s *server) getInfo(w http.ResponseWriter, r *http.Request) {
	info := s.Info
	info.Backends = append([]string{}, info.Backends...)
	writeJSON(w, http.StatusOK, info)
}

func (s *server) getHostKey(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, s.HostKey)
}

func (s *server) getOpenAPI(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", jsonType)
	w.Write(openapi)
}

func (s *server) listSheds(w http.ResponseWriter, r *http.Request) {
	sheds, err := s.Sheds.List(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, append([]*shed.Shed{}, sheds...))
}

func (s *server) getShed(w http.ResponseWriter, r *http.Request) {
	sh, err := s.Sheds.Get(r.Context(), r.PathValue("name"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, sh)
}

func (s *server) createShed(w http.ResponseWriter, r *http.Request) {
	withBody(s, w, r, http.StatusCreated, func(ctx context.Context, opts shed.CreateOptions, p shed.Progress) (any, error) {
		return s.Sheds.Create(ctx, opts, p)
	})
}

func (s *server) startShed(w http.ResponseWriter, r *http.Request) {
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, p shed.Progress) (any, error) {
		return s.Sheds.Start(ctx, r.PathValue("name"), p)
	})
}

func (s *server) stopShed(w http.ResponseWriter, r *http.Request) {
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, p shed.Progress) (any, error) {
		return s.Sheds.Stop(ctx, r.PathValue("name"), p)
	})
}

func (s *server) resetShed(w http.ResponseWriter, r *http.Request) {
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, _ shed.Progress) (any, error) {
		return s.Sheds.Reset(ctx, r.PathValue("name"))
	})
}

func (s *server) deleteShed(w http.ResponseWriter, r *http.Request) {
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, p shed.Progress) (any, error) {
		return struct{}{}, s.Sheds.Delete(ctx, r.PathValue("name"), p)
	})
}

// withBody carries out op, which takes the request's body, a T in JSON.
func withBody[T any](s *server, w http.ResponseWriter, r *http.Request, status int, op func(ctx context.Context, body T, p shed.Progress) (any, error)) {
	var body T
	if !s.readJSON(w, r, &body) {
		return
	}
	s.operation(w, r, status, func(ctx context.Context, p shed.Progress) (any, error) {
		return op(ctx, body, p)
	})
}

// bodiless carries out op for a request without a body.
func (s *server) bodiless(w http.ResponseWriter, r *http.Request, status int, op operation) {
	if s.noBody(w, r) {
		s.operation(w, r, status, op)
	}
}

// queryBool returns the parameter called name, which is false where it is missing.
func queryBool(r *http.Request, name string) (bool, error) {
	v := r.URL.Query().Get(name)
	if v == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, shed.Errorf(shed.CodeInvalid, "%s is %q", name, v).WithHint("use %s=1 or %s=0", name, name)
	}
	return b, nil
}

// logs sends what there is at once, and with follow=1 what comes.
func (s *server) logs(w http.ResponseWriter, r *http.Request) {
	follow, err := queryBool(r, "follow")
	if err != nil {
		s.fail(w, r, err)
		return
	}
	logs, err := s.Sheds.Logs(r.Context(), r.PathValue("name"), follow)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer logs.Close()
	w.Header().Set("Content-Type", textType)
	w.WriteHeader(http.StatusOK)
	ctl := http.NewResponseController(w)
	ctl.Flush()
	buf := make([]byte, 64<<10)
	for {
		n, err := logs.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return // the client is gone
			}
			ctl.Flush()
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			if r.Context().Err() == nil {
				s.Log.Error("logs broke off", "shed", r.PathValue("name"), "error", err)
			}
			panic(http.ErrAbortHandler) // the client must not take it for the end
		}
	}
}
