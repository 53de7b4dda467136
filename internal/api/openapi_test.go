package api

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers/legacy"
)

func loadDocument(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(openapi)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return doc
}

func documented(doc *openapi3.T) []string {
	var routes []string
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			routes = append(routes, method+" "+path)
		}
	}
	slices.Sort(routes)
	return routes
}

func TestDocumentHasEveryRoute(t *testing.T) {
	var served []string
	for pattern := range (&server{}).routes() {
		served = append(served, strings.Replace(pattern, "...}", "}", 1))
	}
	slices.Sort(served)
	if got := documented(loadDocument(t)); !slices.Equal(got, served) {
		t.Errorf("documented: %q\nserved:     %q", got, served)
	}
}

// The schemas have the fields that Go encodes, no more and no fewer.
func TestDocumentHasEveryField(t *testing.T) {
	doc := loadDocument(t)
	for name, v := range map[string]any{
		"Info": shed.Info{}, "HostKey": shed.HostKey{}, "Session": shed.Session{}, "SessionList": shed.SessionList{}, "Unanswered": shed.Unanswered{}, "Attach": shed.Attach{}, "Shed": shed.Shed{}, "CreateOptions": shed.CreateOptions{}, "Command": shed.Command{}, "TTY": shed.TTY{}, "Endpoint": shed.Endpoint{},
		"Image": shed.Image{}, "ImageDetail": shed.ImageDetail{}, "ImageConfig": shed.ImageConfig{}, "ImageHistory": shed.ImageHistory{},
		"Layer": shed.Layer{}, "Removed": shed.Removed{}, "RemovedItem": shed.RemovedItem{}, "Pushed": shed.Pushed{},
		"BuildOptions": shed.BuildOptions{}, "PullOptions": shed.PullOptions{}, "PushOptions": shed.PushOptions{},
		"PresetRequest": presetRequest{}, "TagRequest": tagRequest{}, "PruneRequest": pruneRequest{},
		"Event": shed.Event{}, "Error": errorBody{},
	} {
		want := jsonFields(reflect.TypeOf(v))
		var got []string
		for field := range doc.Components.Schemas[name].Value.Properties {
			got = append(got, field)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: documented %q, encoded %q", name, got, want)
		}
	}
	var codes []any
	for _, s := range statuses {
		codes = append(codes, string(s.code))
	}
	for _, code := range doc.Components.Schemas["Error"].Value.Properties["error"].Value.Properties["code"].Value.Enum {
		if !slices.Contains(codes, code) {
			t.Errorf("the code %v is documented only", code)
		}
	}
	if n := len(doc.Components.Schemas["Error"].Value.Properties["error"].Value.Properties["code"].Value.Enum); n != len(codes) {
		t.Errorf("%d codes are documented, there are %d", n, len(codes))
	}
}

func jsonFields(t reflect.Type) []string {
	var names []string
	for _, f := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && name != "-" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Requests to every operation, and the answers to them, are as documented.
func TestAnswersAreAsDocumented(t *testing.T) {
	for _, contentType := range []string{eventsType, tarType} {
		openapi3filter.RegisterBodyDecoder(contentType, openapi3filter.PlainBodyDecoder)
		t.Cleanup(func() { openapi3filter.UnregisterBodyDecoder(contentType) })
	}
	doc := loadDocument(t)
	router, err := legacy.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	fake := &apitest.Fake{
		Bind: func(context.Context, shed.Endpoint) (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") },
		Connect: func(context.Context, shed.Endpoint) (net.Conn, error) {
			near, far := net.Pipe()
			far.Close()
			return near, nil
		},
		Before: func(_ context.Context, _, _ string, p shed.Progress) error {
			p.Report(shed.Event{Phase: "boot", Message: "x", Current: 1, Total: 2, Unit: "bytes"})
			return nil
		},
		Log: func(context.Context, bool) io.ReadCloser { return io.NopCloser(strings.NewReader("log\n")) },
		Run: func(shed.Command, *agent.FrameReader, *agent.FrameWriter) shed.ExitStatus { return shed.ExitStatus{} },
	}
	fake.AddImage(shed.Image{Digest: apitest.Digest("d"), Source: shed.SourceDangling, InUse: []string{"old"}})
	fake.AddSession(shed.Session{Shed: "old", Name: "main", Keeper: shed.KeptByTmux, Command: "bash", LastLine: "$", CreatedAt: apitest.Created, ActiveAt: apitest.Created})
	fake.Unanswered = []shed.Unanswered{{Shed: "frozen", Reason: "no answer"}}
	fake.Add(shed.Shed{Name: "old", Status: shed.StatusStopped, Reason: "why", StartedAt: apitest.Created})
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}

	seen := map[string]bool{}
	check := func(what string, schema *openapi3.SchemaRef, data []byte) {
		t.Helper()
		var v any
		if err := json.Unmarshal(data, &v); err != nil {
			t.Errorf("%s: %v in %s", what, err, data)
		} else if err := schema.Value.VisitJSON(v); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	do := func(method, path, body, accept string) {
		t.Helper()
		request := func() *http.Request {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if body == "" {
				req.Body = nil
			} else if json.Valid([]byte(body)) {
				req.Header.Set("Content-Type", jsonType)
			} else {
				req.Header.Set("Content-Type", tarType)
			}
			if accept != "" {
				req.Header.Set("Accept", accept)
			}
			for sub, protocol := range map[string]string{"/exec": execProtocol, "/dial": dialProtocol, "/listen": listenProtocol} {
				if strings.HasSuffix(path, sub) {
					req.Header.Set("Connection", "Upgrade")
					req.Header.Set("Upgrade", protocol)
				}
			}
			return req
		}
		req := request()
		route, params, err := router.FindRoute(req)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		seen[method+" "+route.Path] = true
		in := &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: route}
		if err := openapi3filter.ValidateRequest(t.Context(), in); err != nil {
			t.Errorf("%s %s: the request: %v", method, path, err)
		}
		resp, err := client.Do(request())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		out := &openapi3filter.ResponseValidationInput{
			RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header,
			Options: &openapi3filter.Options{IncludeResponseStatus: true},
		}
		if resp.StatusCode != http.StatusSwitchingProtocols {
			data, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			out.SetBodyBytes(data)
			if accept == eventsType {
				for block := range strings.SplitSeq(strings.TrimSpace(string(data)), "\n\n") {
					event, payload, _ := strings.Cut(block, "\ndata: ")
					switch event {
					case "event: " + eventProgress:
						check(event, doc.Components.Schemas["Event"], []byte(payload))
					case "event: " + eventError:
						check(event, doc.Components.Schemas["Error"], []byte(payload))
					case "event: " + eventComplete:
						answer := route.Operation.Responses.Status(http.StatusOK)
						if created := route.Operation.Responses.Status(http.StatusCreated); created != nil {
							answer = created
						}
						check(method+" "+path, answer.Value.Content[jsonType].Schema, []byte(payload))
					default:
						t.Errorf("%s %s: an event that isn't documented: %q", method, path, block)
					}
				}
			}
		}
		if err := openapi3filter.ValidateResponse(t.Context(), out); err != nil {
			t.Errorf("%s %s: the answer: %v", method, path, err)
		}
	}

	do("GET", "/api/info", "", "")
	do("GET", "/api/openapi.json", "", "")
	for _, accept := range []string{"", eventsType} {
		do("POST", "/api/sheds", `{"name":"web","image":"base","cpus":1,"memory_mb":512,"upper_size":1073741824,"repo":"a/b","no_provision":true}`, accept)
		do("POST", "/api/sheds", `{"name":"web"}`, accept) // exists
		do("POST", "/api/sheds/web/reset", "", accept)     // runs
		do("POST", "/api/sheds/web/stop", "", accept)
		do("POST", "/api/sheds/web/reset", "", accept)
		do("POST", "/api/sheds/web/start", "", accept)
		do("DELETE", "/api/sheds/web", "", accept)
		do("DELETE", "/api/sheds/web", "", accept) // gone
		do("POST", "/api/images/build/preset", `{"preset":"base"}`, accept)
		do("POST", "/api/images/build/preset", `{"preset":"none"}`, accept)
		do("POST", "/api/images/build?options="+url.QueryEscape(`{"tag":"a","dockerfile":"D","target":"t","args":{"K":"V"},"no_cache":true}`), "a tar", accept)
		do("POST", "/api/images/load", "a tar", accept)
		do("POST", "/api/images/pull", `{"ref":"debian:12","platform":"linux/arm64"}`, accept)
		do("POST", "/api/images/push", `{"image":"base","to":"registry/x:1"}`, accept)
		do("POST", "/api/images/push", `{"image":"none"}`, accept)
		do("POST", "/api/images/tag", `{"image":"base","tag":"other"}`, accept)
		do("POST", "/api/images/prune", `{"dry_run":true}`, accept)
		do("POST", "/api/images/prune", `{}`, accept)
		do("DELETE", "/api/images/other?force=true", "", accept)
		do("DELETE", "/api/images/other", "", accept) // gone
	}
	do("GET", "/api/images/inspect/base", "", "")
	do("GET", "/api/images/inspect/none", "", "")
	do("GET", "/api/images/save?name=base&name=base", "", "")
	do("GET", "/api/images/save?name=none", "", "")
	do("GET", "/api/sheds", "", "")
	do("GET", "/api/sheds/old", "", "")
	do("GET", "/api/sheds/none", "", "")
	do("GET", "/api/sheds/old/logs?follow=0", "", "")
	do("POST", "/api/sheds/none/exec", `{"args":["true"]}`, "")
	do("POST", "/api/sheds/old/exec", `{"args":["true"],"env":["A=b"],"dir":"/","user":"0","tty":{"term":"xterm","rows":24,"cols":80}}`, "")
	do("POST", "/api/sheds/old/exec", `{"subsystem":"sftp"}`, "")
	do("POST", "/api/sheds/old/dial", `{"network":"tcp","address":"localhost:80","no_start":true}`, "")
	do("POST", "/api/sheds/old/dial", `{"network":"accepted","address":"none"}`, "")
	do("POST", "/api/sheds/old/listen", `{"network":"tcp","address":"localhost:0"}`, "")
	do("POST", "/api/sheds/old/exec", `{"attach":{"session":"x","mode":"new"},"tty":{"term":"xterm","rows":24,"cols":80}}`, "")
	do("GET", "/api/sheds/old/sessions", "", "")
	do("GET", "/api/sheds/none/sessions", "", "")
	do("GET", "/api/sessions", "", "")
	do("DELETE", "/api/sheds/old/sessions/main", "", "")
	do("DELETE", "/api/sheds/old/sessions/main", "", "") // gone
	do("GET", "/api/ssh-host-key", "", "")
	do("GET", "/api/images", "", "")
	for _, route := range documented(doc) {
		if !seen[route] {
			t.Errorf("%s was not tried", route)
		}
	}
}
