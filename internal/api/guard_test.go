package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

// Nothing that a web page can send is carried out, however it addresses the server.
func TestWebPages(t *testing.T) {
	tcp, dialTCP := listenTCP(t)
	unix, dialUnix := listenUnix(t)
	var done atomic.Int32
	fake := &apitest.Fake{Before: func(context.Context, string, string, shed.Progress) error {
		done.Add(1)
		return nil
	}}
	serve(t, tcp, fake, slog.New(slog.DiscardHandler))
	serve(t, unix, fake, slog.New(slog.DiscardHandler))
	_, port, _ := net.SplitHostPort(tcp.Addr().String())
	own := "localhost:" + port

	upgrade := func(protocol string) http.Header {
		return http.Header{"Connection": {"Upgrade"}, "Upgrade": {protocol}, "Content-Type": {"application/json"}, "Origin": {"http://evil.example"}}
	}
	websocket := upgrade("websocket")
	websocket.Set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	websocket.Set("Sec-WebSocket-Version", "13")
	const create = `{"name":"a"}`
	for _, test := range []struct {
		name, method, path, body string
		header                   http.Header
		tcpOnly                  bool
		status                   int
	}{
		{"fetch", "POST", "/api/sheds", create, http.Header{"Origin": {"http://evil.example"}, "Content-Type": {"application/json"}}, false, 403},
		{"fetch from a file", "POST", "/api/sheds", create, http.Header{"Origin": {"null"}, "Content-Type": {"application/json"}}, false, 403},
		{"an empty origin", "POST", "/api/sheds", create, http.Header{"Origin": {""}, "Content-Type": {"application/json"}}, false, 403},
		{"another local server's page", "POST", "/api/sheds", create, http.Header{"Origin": {"http://localhost:3000"}, "Content-Type": {"application/json"}}, false, 403},
		{"its own origin", "POST", "/api/sheds", create, http.Header{"Origin": {"http://" + own}, "Content-Type": {"application/json"}}, false, 403},
		{"a form of an old browser", "POST", "/api/sheds", create, http.Header{"Content-Type": {"text/plain"}}, false, 415},
		{"a form", "POST", "/api/sheds", "name=a", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, false, 415},
		{"a form with a file", "POST", "/api/images/load", "--x--", http.Header{"Content-Type": {"multipart/form-data; boundary=x"}}, false, 415},
		{"no type", "POST", "/api/sheds", create, nil, false, 415},
		{"a form without a body", "POST", "/api/sheds/a/start", "", http.Header{"Origin": {"http://evil.example"}}, false, 403},
		{"preflight", "OPTIONS", "/api/sheds", "", http.Header{"Origin": {"http://evil.example"}, "Access-Control-Request-Method": {"DELETE"}}, false, 403},
		{"preflight without an origin", "OPTIONS", "/api/sheds/a", "", nil, false, 405},
		{"an image of a page", "GET", "/api/sheds", "", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"no-cors"}}, false, 403},
		{"a page of another port", "GET", "/api/sheds", "", http.Header{"Sec-Fetch-Site": {"same-site"}}, false, 403},
		{"two sites", "GET", "/api/sheds", "", http.Header{"Sec-Fetch-Site": {"none", "cross-site"}}, false, 403},
		{"WebSocket", "GET", "/api/sheds/a/exec", "", websocket, false, 403},
		{"exec", "POST", "/api/sheds/a/exec", `{"login":true}`, upgrade(execProtocol), false, 403},
		{"dial", "POST", "/api/sheds/a/dial", `{"network":"tcp","address":"a:1"}`, upgrade(dialProtocol), false, 403},
		{"listen", "POST", "/api/sheds/a/listen", `{"network":"tcp","address":"a:1"}`, upgrade(listenProtocol), false, 403},
		{"rebinding", "GET", "/api/sheds", "", http.Header{"Host": {"evil.example:" + port}}, true, 403},
		{"rebinding to localhost", "GET", "/api/sheds", "", http.Header{"Host": {"localhost.evil.example:" + port}, "Sec-Fetch-Site": {"same-origin"}}, true, 403},
		{"rebinding with an address", "GET", "/api/sheds", "", http.Header{"Host": {"127.0.0.1.evil.example"}}, true, 403},
		{"any address", "GET", "/api/sheds", "", http.Header{"Host": {"0.0.0.0:" + port}}, true, 403},
		{"the neighbour's address", "GET", "/api/sheds", "", http.Header{"Host": {"192.0.2.1:" + port}}, true, 403},
	} {
		header := test.header.Clone()
		if header == nil {
			header = http.Header{}
		}
		if header.Get("Host") == "" {
			header.Set("Host", own)
		}
		for network, dial := range map[string]func(context.Context) (net.Conn, error){
			"tcp":  dialTCP,
			"unix": dialUnix,
		} {
			if network == "unix" && test.tcpOnly {
				continue
			}
			status, body := rawRequest(t, dial, test.method, test.path, test.body, header)
			if status != test.status {
				t.Errorf("%s, %s: %d %s", test.name, network, status, body)
			}
		}
	}
	// What only bytes can say: a request for a whole URL, two hosts, and none.
	for _, request := range []string{
		"GET http://evil.example/api/sheds HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"GET /api/sheds HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
		"GET /api/sheds HTTP/1.1\r\nConnection: close\r\n\r\n",
		"GET /api/sheds HTTP/1.0\r\n\r\n",
	} {
		conn, err := dialTCP(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, request)
		answer, _ := io.ReadAll(conn)
		conn.Close()
		if line, _, _ := strings.Cut(string(answer), "\r\n"); !strings.HasPrefix(line, "HTTP/1.1 40") && !strings.HasPrefix(line, "HTTP/1.0 40") {
			t.Errorf("%q: %s", request, line)
		}
		if bytes.Contains(answer, []byte("Access-Control")) {
			t.Errorf("%q: %s", request, answer)
		}
	}
	if n := done.Load(); n != 0 {
		t.Errorf("%d operations were carried out", n)
	}
}

// A page that sends requests all day doesn't fill the log, which says what happens.
func TestRefusalsInLog(t *testing.T) {
	var log bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		stop := serve(t, ln, &apitest.Fake{}, slog.New(slog.NewTextHandler(&log, nil)))
		for range 100 {
			rawRequest(t, ln.dial, "GET", "/api/%1b[31m", "", http.Header{"Origin": {"http://evil.example"}})
		}
		time.Sleep(refusalInterval)
		rawRequest(t, ln.dial, "GET", "/api/sheds", "", http.Header{"Origin": {"http://evil.example"}})
		stop()
	})
	if s := log.String(); strings.Count(s, "\n") != 2 || !strings.Contains(s, "requests=1 ") || !strings.Contains(s, "requests=100 ") ||
		strings.Count(s, "http://evil.example") != 2 || strings.ContainsRune(s, 0x1b) {
		t.Errorf("logged %s", s)
	}
}
