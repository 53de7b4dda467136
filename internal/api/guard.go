package api

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
)

const (
	// bodyTimeout is how long a client may take to send a body, other than one of any size.
	bodyTimeout = 30 * time.Second
	// writeTimeout is how long a client may take to read before it counts as gone.
	writeTimeout = time.Minute
	// refusalInterval is how often it is logged at most that callers are refused.
	refusalInterval = time.Second
)

// responseWriter is what handlers write to. It remembers whether an answer has begun, and gives up clients that don't read it.
type responseWriter struct {
	http.ResponseWriter
	ctl   *http.ResponseController
	wrote bool
}

// newResponseWriter begins the answer to r. What r has for a body must arrive in bodyTimeout, whether a handler
// reads it or net/http does, before and after an answer; handlers that have read all, or read longer, change that.
func newResponseWriter(w http.ResponseWriter, r *http.Request) *responseWriter {
	rw := &responseWriter{ResponseWriter: w, ctl: http.NewResponseController(w)}
	if r.ContentLength != 0 {
		rw.ctl.SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	rw.ctl.SetWriteDeadline(time.Time{}) // that of the last request of this connection has passed
	return rw
}

// end is for when the handler has returned, and net/http writes the rest of the answer.
func (w *responseWriter) end() { w.ctl.SetWriteDeadline(time.Now().Add(writeTimeout)) }

func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *responseWriter) WriteHeader(status int) {
	w.wrote = true
	w.ResponseWriter.WriteHeader(status)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	w.wrote = true
	w.ctl.SetWriteDeadline(time.Now().Add(writeTimeout))
	return w.ResponseWriter.Write(p)
}

// checkCaller keeps browsers out: a page may neither send requests here
// nor, by pointing a name of its own at this address, read the answers.
func checkCaller(r *http.Request) error {
	if len(r.Header.Values("Origin")) > 0 {
		return shed.Errorf(shed.CodeInvalid, "requests from web pages are refused")
	}
	for _, site := range r.Header.Values("Sec-Fetch-Site") {
		if site != "none" && site != "same-origin" {
			return shed.Errorf(shed.CodeInvalid, "requests from web pages are refused")
		}
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok {
		return nil
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if strings.EqualFold(host, "localhost") {
		return nil
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err == nil && (ip.IsLoopback() || ip.Unmap() == local.AddrPort().Addr().Unmap()) {
		return nil
	}
	return shed.Errorf(shed.CodeInvalid, "requests for the host %.200q are refused", r.Host).
		WithHint("use localhost or the server's address")
}

// refusals are callers that are refused. Any page that somebody opens can send as many as it likes.
type refusals struct {
	mu     sync.Mutex
	n      int // since the last line in the log
	logged time.Time
}

// add counts one more, and returns how many are to be logged now, if any.
func (f *refusals) add() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	now := time.Now()
	if now.Sub(f.logged) < refusalInterval {
		return 0
	}
	n, f.n, f.logged = f.n, 0, now
	return n
}

func (s *server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if n := s.refusals.add(); n > 0 {
		s.Log.Warn("requests refused", "requests", n, "remote", r.RemoteAddr, "origin", fmt.Sprintf("%.200s", r.Header.Get("Origin")),
			"method", fmt.Sprintf("%.20s", r.Method), "path", fmt.Sprintf("%.200s", r.URL.Path), "error", err)
	}
	writeJSON(w, http.StatusForbidden, newErrorBody(err))
}
