package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
)

// A client that doesn't send what it owes is cut off, whatever it has begun, and others are served meanwhile.
func TestSlowloris(t *testing.T) {
	const head = "Host: localhost\r\nContent-Type: application/json\r\n"
	const owed = head + "Content-Length: 1000\r\n\r\n"
	for name, begun := range map[string]string{
		"nothing":             "",
		"half a line":         "GET /api/in",
		"half a head":         "GET /api/info HTTP/1.1\r\nHost: localhost\r\n",
		"between requests":    "GET /api/info HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"a body for a GET":    "GET /api/info HTTP/1.1\r\n" + owed,
		"a chunk for a GET":   "GET /api/sheds HTTP/1.1\r\n" + head + "Transfer-Encoding: chunked\r\n\r\n1",
		"a body":              "POST /api/sheds HTTP/1.1\r\n" + owed + `{"name":"a`,
		"an unwanted body":    "POST /api/sheds/a/start HTTP/1.1\r\n" + owed,
		"after a wrong body":  "POST /api/sheds HTTP/1.1\r\n" + owed + "nonsense",
		"after a wrong type":  "POST /api/sheds HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
		"after no route":      "POST /api/nothing HTTP/1.1\r\n" + owed,
		"after a wrong verb":  "PUT /api/info HTTP/1.1\r\n" + owed,
		"after a refusal":     "POST /api/sheds HTTP/1.1\r\nOrigin: http://evil.example\r\n" + owed,
		"before an upgrade":   "POST /api/sheds/a/exec HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: shed-exec\r\n" + owed,
		"without an upgrade":  "POST /api/sheds/a/exec HTTP/1.1\r\n" + owed,
		"a log that goes on":  "GET /api/sheds/a/logs?follow=1 HTTP/1.1\r\n" + owed,
		"an archive":          "POST /api/images/load HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-tar\r\nContent-Length: 1000\r\n\r\nx",
		"an upload of no tar": "POST /api/images/load HTTP/1.1\r\n" + owed,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := newPipeListener()
				fake := &apitest.Fake{Log: func(ctx context.Context, _ bool) io.ReadCloser {
					r, w := io.Pipe()
					context.AfterFunc(ctx, func() { w.Close() })
					return r
				}}
				fake.Add(shed.Shed{Name: "a"})
				stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
				conn, err := ln.dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					io.Copy(io.Discard, conn)
				}()
				if _, err := io.WriteString(conn, begun); err != nil {
					t.Fatal(err)
				}
				c := NewClient(ln.dial, "the server")
				if _, err := c.Info(t.Context()); err != nil {
					t.Error("another client:", err)
				}
				c.Close()
				<-ended
				stop()
			})
		})
	}
}

// Bytes that come one by one don't make more time.
func TestDribble(t *testing.T) {
	for name, begun := range map[string]string{
		"head": "GET /api/info HTTP/1.1\r\nX: ",
		"body": "POST /api/sheds HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n\"",
	} {
		synctest.Test(t, func(t *testing.T) {
			ln := newPipeListener()
			stop := serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
			conn, err := ln.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, conn)
			io.WriteString(conn, begun)
			sent := 0
			for ; sent < 1000 && err == nil; sent++ {
				time.Sleep(time.Second)
				_, err = conn.Write([]byte("x"))
			}
			if err == nil {
				t.Errorf("%s: the client is still there after %d s", name, sent)
			}
			stop()
		})
	}
}

// A client that asks and asks and reads nothing is given up.
func TestNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		stop := serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
		conn, err := ln.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = io.WriteString(conn, "GET /api/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
		}
		stop()
	})
}

// An answer that pauses is no client that stalls, and neither is the next request of its connection.
func TestPausingAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		fake := &apitest.Fake{Log: func(context.Context, bool) io.ReadCloser {
			r, w := io.Pipe()
			go func() {
				for range 2 {
					io.WriteString(w, "x")
					time.Sleep(10 * writeTimeout)
				}
				w.Close()
			}()
			return r
		}}
		fake.Add(shed.Shed{Name: "a"})
		stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
		conn, err := ln.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(conn)
		for _, path := range []string{"sheds/a/logs?follow=1", "info", "sheds/a/logs?follow=1"} {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost/api/"+path, nil)
			if err := req.Write(conn); err != nil {
				t.Fatal(path, err)
			}
			resp, err := http.ReadResponse(in, req)
			if err != nil {
				t.Fatal(path, err)
			}
			if b, err := io.ReadAll(resp.Body); err != nil || len(b) < 2 {
				t.Errorf("%s: %q, %v", path, b, err)
			}
		}
		conn.Close()
		stop()
	})
}

// openFiles returns how many files this process has open.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Connections that do nothing are in nobody's way, and leave nothing.
func TestIdleConnections(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		listen := listenUnix
		if network == "tcp" {
			listen = listenTCP
		}
		ln, dial := listen(t)
		serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
		c := NewClient(dial, "the server")
		info := func() {
			t.Helper()
			if _, err := c.Info(t.Context()); err != nil {
				t.Fatal(network, err)
			}
			c.Close()
		}
		info()
		goroutines, files := runtime.NumGoroutine(), openFiles(t)
		var conns []net.Conn
		for range 1000 {
			conn, err := dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
		info()
		for _, conn := range conns {
			conn.Close()
		}
		for runtime.NumGoroutine() > goroutines || openFiles(t) > files {
			time.Sleep(time.Millisecond)
		}
	}
}

// A server that has no file left for a connection goes on when there are some again.
func TestNoFilesLeft(t *testing.T) {
	ln, dial := listenUnix(t)
	serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
	c := NewClient(dial, "the server")
	if _, err := c.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = uint64(openFiles(t) + 20)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for {
		conn, err := dial(t.Context())
		if err != nil {
			break
		}
		conns = append(conns, conn)
	}
	// One more waits for the server, which can't take it in.
	if len(conns) == 0 {
		t.Error("the limit was reached before the first connection")
	} else {
		conns[len(conns)-1].Close()
		if conn, err := dial(t.Context()); err == nil {
			conns = append(conns, conn)
		}
	}
	for _, conn := range conns {
		conn.Close()
	}
	// The server may take in those first, and have all the files that were theirs.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	c.Close() // a new connection
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
}

// However the bytes of a request are wrong, the server answers the next.
func FuzzRequests(f *testing.F) {
	ln := newPipeListener()
	fake := &apitest.Fake{
		Run: func(shed.Command, *agent.FrameReader, *agent.FrameWriter) shed.ExitStatus { return shed.ExitStatus{} },
		Connect: func(context.Context, shed.Endpoint) (net.Conn, error) {
			return nil, shed.Errorf(shed.CodeConnect, "no")
		},
		Bind: func(context.Context, shed.Endpoint) (net.Listener, error) {
			return nil, shed.Errorf(shed.CodeConnect, "no")
		},
		Log: func(context.Context, bool) io.ReadCloser { return io.NopCloser(strings.NewReader("log")) },
	}
	fake.Add(shed.Shed{Name: "a"})
	serve(f, ln, fake, slog.New(slog.DiscardHandler))
	c := NewClient(ln.dial, "the server")
	f.Cleanup(c.Close)
	for pattern := range (&server{}).routes() {
		method, path, _ := strings.Cut(pattern, " ")
		path = strings.NewReplacer("{name}", "a", "{session}", "s", "{ref...}", "b/c").Replace(path)
		for _, body := range []string{"", "{}", `{"name":"b"}`, `{"login":true}`, `{"network":"tcp","address":"a:1"}`} {
			f.Add([]byte(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: shed-exec\r\n"+
				"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", method, path, len(body), body)))
		}
	}
	f.Fuzz(func(t *testing.T, request []byte) {
		conn, err := ln.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			io.Copy(io.Discard, conn)
		}()
		conn.Write(request)
		conn.Close()
		<-answered
		if _, err := c.Info(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}
