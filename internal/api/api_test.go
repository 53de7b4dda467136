package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

var testHostKey = shed.HostKey{Key: "ssh-ed25519 AAAA", Fingerprint: "SHA256:abc"}

func testInfo() shed.Info {
	return shed.Info{Name: "test", Version: "v1", Backend: "qemu", Backends: []string{"qemu"}, Accel: "tcg", StateDir: "/state"}
}

// listenUnix returns a listener, and how to dial it.
func listenUnix(t *testing.T) (net.Listener, func(context.Context) (net.Conn, error)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return ln, func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) }
}

// listenTCP is listenUnix for TCP.
func listenTCP(t *testing.T) (net.Listener, func(context.Context) (net.Conn, error)) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	return ln, func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", addr) }
}

// serve serves fake on ln until the test ends. stop ends it earlier; it
// returns when all that runs in the server has ended.
func serve(t testing.TB, ln net.Listener, fake *apitest.Fake, log *slog.Logger) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, ln, NewServer(Config{Sheds: fake, Images: fake, Info: testInfo(), HostKey: testHostKey, Log: log}), log)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Serve:", err)
		}
		fake.WaitCommands()
	})
	t.Cleanup(stop)
	return stop
}

func newTestClient(t *testing.T, fake *apitest.Fake) *Client {
	t.Helper()
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	c := NewClient(dial, "the server")
	t.Cleanup(c.Close)
	return c
}

func TestErrorsSurvive(t *testing.T) {
	fake := &apitest.Fake{}
	c := newTestClient(t, fake)
	codes := []shed.Code{
		shed.CodeInvalid, shed.CodeNotFound, shed.CodeNoImage, shed.CodeNoSession, shed.CodeExists, shed.CodeConflict, shed.CodeNoSpace,
		shed.CodeBoot, shed.CodeUnreachable, shed.CodeRegistry, shed.CodeCommand, shed.CodeConnect, shed.CodeUnsupported, shed.CodeInternal,
	}
	if len(codes) != len(statuses) {
		t.Fatalf("%d codes here, %d in the table", len(codes), len(statuses))
	}
	progress := func(shed.Event) {}
	calls := map[string]func() error{
		"get":           func() error { _, err := c.Get(t.Context(), "web"); return err },
		"list":          func() error { _, err := c.List(t.Context()); return err },
		"create":        func() error { _, err := c.Create(t.Context(), shed.CreateOptions{Name: "web"}, nil); return err },
		"create events": func() error { _, err := c.Create(t.Context(), shed.CreateOptions{Name: "web"}, progress); return err },
		"delete events": func() error { return c.Delete(t.Context(), "web", progress) },
		"logs":          func() error { _, err := c.Logs(t.Context(), "web", true); return err },
		"exec":          func() error { _, err := c.Exec(t.Context(), "web", shed.Command{Args: []string{"x"}}); return err },
		"images":        func() error { _, err := c.Images(t.Context()); return err },
	}
	for _, code := range codes {
		if got := codeOf(statusOf(code)); statusOf(got) != statusOf(code) {
			t.Errorf("%s becomes %s by way of its status", code, got)
		}
		fake.Before = func(context.Context, string, string, shed.Progress) error {
			return shed.Errorf(code, "what and why").WithHint("try \"this\"\nand that")
		}
		for name, call := range calls {
			var got *shed.Error
			if err := call(); !errors.As(err, &got) {
				t.Fatalf("%s %s: %v", name, code, err)
			}
			if got.Code != code || got.Message != "what and why" || got.Hint != "try \"this\"\nand that" {
				t.Errorf("%s %s: got %+v", name, code, got)
			}
		}
	}
	fake.Before = func(context.Context, string, string, shed.Progress) error { return errors.New("disk on fire") }
	if _, err := c.List(t.Context()); shed.ErrorCode(err) != shed.CodeInternal || err.Error() != "disk on fire" {
		t.Errorf("a plain error: %v", err)
	}
}

func TestStatusWithoutBody(t *testing.T) {
	ln, dial := listenUnix(t)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "<html>", http.StatusServiceUnavailable)
	})}
	go srv.Serve(ln)
	defer srv.Close()
	_, err := NewClient(dial, "the server").List(t.Context())
	if shed.ErrorCode(err) != shed.CodeUnreachable || !strings.Contains(err.Error(), "503") {
		t.Errorf("got %v", err)
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for name, test := range map[string]struct {
		dial    func(context.Context) (net.Conn, error)
		message string
		hint    string
	}{
		"missing": {unixDialer(filepath.Join(dir, "missing")), "does not answer", "shed-server serve"},
		"refused": {unixDialer(stale), "does not answer", "shed-server serve"},
		"permission": {func(context.Context) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", os.ErrPermission)}
		}, "no permission", "permissions"},
	} {
		c := NewClient(test.dial, "the server")
		_, listErr := c.List(t.Context())
		_, execErr := c.Exec(t.Context(), "web", shed.Command{Login: true})
		for _, err := range []error{listErr, execErr} {
			if shed.ErrorCode(err) != shed.CodeUnreachable || !strings.Contains(err.Error(), test.message) || !strings.Contains(shed.ErrorHint(err), test.hint) {
				t.Errorf("%s: %v (hint %q)", name, err, shed.ErrorHint(err))
			}
		}
	}
}

func unixDialer(path string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) }
}

func TestLifecycle(t *testing.T) {
	fake := &apitest.Fake{}
	c := newTestClient(t, fake)
	ctx := t.Context()
	if list, err := c.List(ctx); err != nil || list == nil || len(list) != 0 {
		t.Fatalf("an empty list: %v, %v", list, err)
	}
	opts := shed.CreateOptions{Name: "web", Image: "debian:12", Backend: "qemu", CPUs: 2, MemoryMB: 512, UpperSize: 2 << 30, Repo: "a/b", NoProvision: true}
	made, err := c.Create(ctx, opts, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Get(ctx, "web")
	if err != nil || *got != *made || got.UpperSize != 2<<30 || !got.CreatedAt.Equal(apitest.Created) {
		t.Errorf("created %+v, got %+v, %v", made, got, err)
	}
	if _, err := c.Create(ctx, opts, nil); shed.ErrorCode(err) != shed.CodeExists {
		t.Errorf("a second create: %v", err)
	}
	if _, err := c.Reset(ctx, "web"); shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("reset of a running shed: %v", err)
	}
	if sh, err := c.Stop(ctx, "web", nil); err != nil || sh.Status != shed.StatusStopped {
		t.Errorf("stop: %+v, %v", sh, err)
	}
	if _, err := c.Reset(ctx, "web"); err != nil {
		t.Errorf("reset: %v", err)
	}
	if sh, err := c.Start(ctx, "web", nil); err != nil || sh.Status != shed.StatusRunning {
		t.Errorf("start: %+v, %v", sh, err)
	}
	if err := c.Delete(ctx, "web", nil); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := c.Get(ctx, "web"); shed.ErrorCode(err) != shed.CodeNotFound {
		t.Errorf("get after delete: %v", err)
	}
	for _, name := range []string{"", ".", "..", "a/b", "A", "a%2fb"} {
		if _, err := c.Get(ctx, name); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("the name %q: %v", name, err)
		}
	}
	if img, err := c.BuildPreset(ctx, "base", nil); err != nil || img.Ref != "base" || img.InUse == nil {
		t.Errorf("build: %+v, %v", img, err)
	}
	if info, err := c.Info(ctx); err != nil || !slices.Equal(info.Backends, []string{"qemu"}) || info.Name != "test" {
		t.Errorf("info: %+v, %v", info, err)
	}
}

// rawRequest sends a request as it stands and returns status and body.
func rawRequest(t *testing.T, dial func(context.Context) (net.Conn, error), method, path, body string, header http.Header) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Host = header.Get("Host")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(answer)
}

func TestRefusedRequests(t *testing.T) {
	ln, dial := listenUnix(t)
	fake := &apitest.Fake{}
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	jsonHeader := http.Header{"Content-Type": {"application/json"}}
	for _, test := range []struct {
		name, method, path, body string
		header                   http.Header
		status                   int
		message                  string
	}{
		{"unknown field", "POST", "/api/sheds", `{"name":"a","cpuz":1}`, jsonHeader, 400, `unknown field \"cpuz\"`},
		{"wrong type", "POST", "/api/sheds", `{"name":"a","cpus":"x"}`, jsonHeader, 400, `\"cpus\"`},
		{"broken", "POST", "/api/sheds", `{"name":`, jsonHeader, 400, "unexpected EOF"},
		{"no body", "POST", "/api/sheds", ``, jsonHeader, 400, "body is missing"},
		{"more than one value", "POST", "/api/sheds", `{"name":"a"} {}`, jsonHeader, 400, "goes on"},
		{"rubbish after", "POST", "/api/sheds", `{"name":"a"} x`, jsonHeader, 400, "goes on"},
		{"too large", "POST", "/api/sheds", `{"name":"` + strings.Repeat("a", maxBody) + `"}`, jsonHeader, 413, "limit"},
		{"content type", "POST", "/api/sheds", `{"name":"a"}`, http.Header{"Content-Type": {"text/plain"}}, 415, "text/plain"},
		{"unwanted body", "POST", "/api/sheds/a/start", `{}`, jsonHeader, 400, "takes no body"},
		{"origin", "GET", "/api/sheds", "", http.Header{"Origin": {"http://localhost"}}, 403, "web pages"},
		{"null origin", "POST", "/api/sheds", `{"name":"a"}`, http.Header{"Origin": {"null"}, "Content-Type": {"application/json"}}, 403, "web pages"},
		{"cross-site fetch", "GET", "/api/sheds", "", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403, "web pages"},
		{"no such path", "GET", "/api/nothing", "", nil, 404, "/api/nothing"},
		{"outside", "GET", "/", "", nil, 404, "UNSUPPORTED"},
		{"no such method", "PUT", "/api/sheds", "", nil, 405, "GET, HEAD, POST"},
		{"exec without upgrade", "POST", "/api/sheds/a/exec", `{"login":true}`, jsonHeader, 426, "shed-exec"},
		{"dial without upgrade", "POST", "/api/sheds/a/dial", `{"network":"tcp","address":"a:1"}`, jsonHeader, 426, "shed-dial"},
		{"listen without upgrade", "POST", "/api/sheds/a/listen", `{"network":"tcp","address":"a:1"}`, jsonHeader, 426, "shed-listen"},
		{"follow", "GET", "/api/sheds/a/logs?follow=maybe", "", nil, 400, "follow=1"},
		{"name", "GET", "/api/sheds/a%2Fb", "", nil, 400, "INVALID"},
	} {
		status, body := rawRequest(t, dial, test.method, test.path, test.body, test.header)
		if status != test.status || !strings.Contains(body, test.message) || !strings.HasPrefix(body, `{"error":{"code":`) {
			t.Errorf("%s: %d %s", test.name, status, body)
		}
	}
	if list, _ := fake.List(t.Context()); len(list) != 0 {
		t.Errorf("a refused request created %v", list)
	}
}

func TestHost(t *testing.T) {
	ln, dial := listenTCP(t)
	serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
	for host, want := range map[string]int{
		"localhost": 200, "localhost:8080": 200, "127.0.0.1:8080": 200, "[::1]:8080": 200, "[::1]": 200,
		"evil.example": 403, "evil.example:8080": 403, "localhost.evil.example": 403, "10.1.2.3": 403,
	} {
		if status, body := rawRequest(t, dial, "GET", "/api/info", "", http.Header{"Host": {host}}); status != want {
			t.Errorf("Host %q: %d %s", host, status, body)
		}
	}
	c := NewClient(dial, "the server")
	defer c.Close()
	if _, err := c.Info(t.Context()); err != nil {
		t.Errorf("the client over TCP: %v", err)
	}
}

func TestPanic(t *testing.T) {
	ln, dial := listenUnix(t)
	var log bytes.Buffer
	fake := &apitest.Fake{Before: func(context.Context, string, string, shed.Progress) error { panic("oh no") }}
	stop := serve(t, ln, fake, slog.New(slog.NewTextHandler(&log, nil)))
	c := NewClient(dial, "the server")
	defer c.Close()
	if _, err := c.List(t.Context()); shed.ErrorCode(err) != shed.CodeInternal || !strings.Contains(err.Error(), "fault") {
		t.Errorf("got %v", err)
	}
	if _, err := c.Start(t.Context(), "web", func(shed.Event) {}); shed.ErrorCode(err) != shed.CodeUnreachable {
		t.Errorf("with events: %v", err)
	}
	stop()
	if s := log.String(); !strings.Contains(s, "oh no") || !strings.Contains(s, "api_test.go") {
		t.Errorf("the log has no panic and stack: %s", s)
	}
}

func TestLogs(t *testing.T) {
	more := make(chan string)
	fake := &apitest.Fake{Log: func(ctx context.Context, follow bool) io.ReadCloser {
		if !follow {
			return io.NopCloser(strings.NewReader("one\ntwo\n"))
		}
		r, w := io.Pipe()
		go func() {
			for {
				select {
				case s := <-more:
					io.WriteString(w, s)
				case <-ctx.Done():
					w.Close()
					return
				}
			}
		}()
		return r
	}}
	fake.Add(shed.Shed{Name: "web"})
	c := newTestClient(t, fake)
	r, err := c.Logs(t.Context(), "web", false)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); string(b) != "one\ntwo\n" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	r.Close()

	ctx, cancel := context.WithCancel(t.Context())
	if r, err = c.Logs(ctx, "web", true); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	for _, s := range []string{"now", "later"} {
		more <- s
		if n, err := r.Read(buf); string(buf[:n]) != s {
			t.Fatalf("got %q, %v before the log went on", buf[:n], err)
		}
	}
	cancel()
	if _, err := r.Read(buf); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	r.Close()

	fake.Log = func(context.Context, bool) io.ReadCloser {
		r, w := io.Pipe()
		go func() {
			io.WriteString(w, "begin")
			w.CloseWithError(errors.New("disk on fire"))
		}()
		return r
	}
	if r, err = c.Logs(t.Context(), "web", false); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); string(b) != "begin" || shed.ErrorCode(err) != shed.CodeUnreachable {
		t.Errorf("a log that broke off: %q, %v", b, err)
	}
	r.Close()
}
