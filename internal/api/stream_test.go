package api

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
)

func TestProgress(t *testing.T) {
	want := []shed.Event{
		{Phase: "pull", Message: "debian: \"12\"\nand more"},
		{Phase: "pull", Current: 5, Total: 10, Unit: "bytes"},
		{Phase: "pull", Done: true, Elapsed: 3 * time.Second},
		{Phase: "boot"},
		{Phase: "boot", Done: true, Elapsed: time.Nanosecond},
	}
	fake := &apitest.Fake{Before: func(_ context.Context, _, _ string, p shed.Progress) error {
		for _, e := range want {
			p.Report(e)
		}
		return nil
	}}
	fake.Add(shed.Shed{Name: "web"})
	c := newTestClient(t, fake)
	for _, test := range []struct {
		name string
		call func(shed.Progress) error
	}{
		{"start", func(p shed.Progress) error { _, err := c.Start(t.Context(), "web", p); return err }},
		{"stop", func(p shed.Progress) error { _, err := c.Stop(t.Context(), "web", p); return err }},
		{"delete", func(p shed.Progress) error { return c.Delete(t.Context(), "web", p) }},
		{"create", func(p shed.Progress) error {
			sh, err := c.Create(t.Context(), shed.CreateOptions{Name: "web"}, p)
			if err == nil && sh.Status != shed.StatusRunning {
				t.Errorf("created %+v", sh)
			}
			return err
		}},
		{"build", func(p shed.Progress) error { _, err := c.BuildPreset(t.Context(), "base", p); return err }},
	} {
		var got []shed.Event
		if err := test.call(func(e shed.Event) { got = append(got, e) }); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v", test.name, got)
		}
	}
}

func TestReadEvents(t *testing.T) {
	var got []shed.Event
	read := func(s string) ([]byte, error) {
		got = nil
		return readEvents(strings.NewReader(s), func(e shed.Event) { got = append(got, e) })
	}
	data, err := read(": hello\r\n\r\nid: 7\r\nevent: progress\r\ndata:{\"phase\":\r\ndata: \"x\"}\r\n\r\nevent: new\ndata: y\n\nevent: complete\ndata: {}\n\n")
	if err != nil || string(data) != "{}" || len(got) != 1 || got[0].Phase != "x" {
		t.Errorf("got %q, %v, %v", data, got, err)
	}
	if _, err := read("event: complete\ndata: {}\n"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a stream that broke off: %v", err)
	}
	if _, err := read("event: progress\ndata: " + strings.Repeat("x", 2*maxEvent)); !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("an endless line: %v", err)
	}
	if _, err := read("event: complete\n" + strings.Repeat("data: "+strings.Repeat("x", 1<<20)+"\n", 9)); err == nil {
		t.Error("an endless event was taken")
	}
	if _, err := read("event: error\ndata: {\"error\":{\"code\":\"NO_SPACE\",\"message\":\"full\"}}\n\n"); shed.ErrorCode(err) != shed.CodeNoSpace {
		t.Errorf("an error: %v", err)
	}
}

func TestCancelledCreate(t *testing.T) {
	for _, events := range []bool{false, true} {
		begun, rolledBack := make(chan struct{}), make(chan struct{})
		fake := &apitest.Fake{Before: func(ctx context.Context, _, _ string, p shed.Progress) error {
			close(begun)
			<-ctx.Done()
			close(rolledBack)
			return ctx.Err()
		}}
		c := newTestClient(t, fake)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-begun
			cancel()
		}()
		var p shed.Progress
		if events {
			p = func(shed.Event) {}
		}
		if _, err := c.Create(ctx, shed.CreateOptions{Name: "web"}, p); !errors.Is(err, context.Canceled) {
			t.Errorf("events %v: %v", events, err)
		}
		<-rolledBack
	}
}

func TestShutdownCancels(t *testing.T) {
	begun := make(chan struct{})
	fake := &apitest.Fake{Before: func(ctx context.Context, _, _ string, p shed.Progress) error {
		close(begun)
		<-ctx.Done()
		return shed.Errorf(shed.CodeUnreachable, "the server is ending")
	}}
	ln, dial := listenUnix(t)
	stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
	c := NewClient(dial, "the server")
	defer c.Close()
	go func() {
		<-begun
		stop()
	}()
	_, err := c.Create(t.Context(), shed.CreateOptions{Name: "web"}, func(shed.Event) {})
	if err == nil || err.Error() != "the server is ending" {
		t.Errorf("got %v", err)
	}
}

// A client that reads nothing must not hold up the work.
func TestSlowClient(t *testing.T) {
	finished := make(chan struct{})
	message := strings.Repeat("x", 1000)
	fake := &apitest.Fake{Before: func(_ context.Context, _, _ string, p shed.Progress) error {
		for i := range 100_000 {
			p.Report(shed.Event{Phase: fmt.Sprint("phase ", i), Message: message})
		}
		close(finished)
		return nil
	}}
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	conn, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "DELETE /api/sheds/web HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
	<-finished
}

func TestCountsAreMerged(t *testing.T) {
	s := &eventStream{wake: make(chan struct{}, 1)}
	s.add(shed.Event{Phase: "pull"})
	for i := range 1000 {
		s.add(shed.Event{Phase: "pull", Current: int64(i + 1), Total: 1000})
	}
	s.add(shed.Event{Phase: "pull", Done: true})
	want := []shed.Event{{Phase: "pull"}, {Phase: "pull", Current: 1000, Total: 1000}, {Phase: "pull", Done: true}}
	if !reflect.DeepEqual(s.pending, want) {
		t.Errorf("got %+v", s.pending)
	}
}

// cat writes its stdin to stdout.
func cat(_ shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
	for {
		kind, b, err := in.Read()
		if err != nil || kind == agent.FrameStdinEOF {
			return shed.ExitStatus{Code: 7}
		}
		if kind == agent.FrameStdin && (apitest.Ack(out, len(b)) != nil || out.Write(agent.FrameStdout, b) != nil) {
			return shed.ExitStatus{Code: 1}
		}
	}
}

func TestExec(t *testing.T) {
	commands := make(chan shed.Command, 1)
	fake := &apitest.Fake{Run: func(cmd shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
		commands <- cmd
		return cat(cmd, in, out)
	}}
	fake.Add(shed.Shed{Name: "web", Status: shed.StatusStopped})
	c := newTestClient(t, fake)
	cmd := shed.Command{Args: []string{"a b", ""}, Env: []string{"K=V"}, Dir: "/x", User: "root", TTY: &shed.TTY{Term: "xterm", Size: shed.Size{Rows: 2, Cols: 3}}}
	conn, err := c.Exec(t.Context(), "web", cmd)
	if err != nil {
		t.Fatal(err)
	}
	if got := <-commands; !reflect.DeepEqual(got, cmd) {
		t.Errorf("got %+v", got)
	}
	p := agent.NewProcess(conn)
	defer p.Close()
	sent := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{1}).Read(sent)
	go func() {
		p.Stdin().Write(sent)
		p.Stdin().Close()
	}()
	go io.Copy(io.Discard, p.Stderr())
	got, err := io.ReadAll(p.Stdout())
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
	if status, err := p.Wait(); err != nil || status.Code != 7 {
		t.Errorf("ended with %+v, %v", status, err)
	}
}

// The end of the command reaches a client that goes on sending.
func TestExecEndsBeforeStdin(t *testing.T) {
	fake := &apitest.Fake{Run: func(_ shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
		in.Read()
		out.Write(agent.FrameStdout, bytes.Repeat([]byte("x"), 1<<20))
		return shed.ExitStatus{Code: 3}
	}}
	fake.Add(shed.Shed{Name: "web"})
	c := newTestClient(t, fake)
	conn, err := c.Exec(t.Context(), "web", shed.Command{Args: []string{"head"}})
	if err != nil {
		t.Fatal(err)
	}
	p := agent.NewProcess(conn)
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		for {
			if _, err := p.Stdin().Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	go io.Copy(io.Discard, p.Stderr())
	if b, err := io.ReadAll(p.Stdout()); len(b) != 1<<20 || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if status, err := p.Wait(); err != nil || status.Code != 3 {
		t.Errorf("ended with %+v, %v", status, err)
	}
	p.Close()
	<-fed
}

func TestExecClientGone(t *testing.T) {
	ended := make(chan error, 1)
	for name, run := range map[string]func(shed.Command, *agent.FrameReader, *agent.FrameWriter) shed.ExitStatus{
		"reading": func(_ shed.Command, in *agent.FrameReader, _ *agent.FrameWriter) shed.ExitStatus {
			_, _, err := in.Read()
			ended <- err
			return shed.ExitStatus{}
		},
		"writing": func(_ shed.Command, _ *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
			for {
				if err := out.Write(agent.FrameStdout, make([]byte, 64<<10)); err != nil {
					ended <- err
					return shed.ExitStatus{}
				}
			}
		},
	} {
		fake := &apitest.Fake{Run: run}
		fake.Add(shed.Shed{Name: "web"})
		conn, err := newTestClient(t, fake).Exec(t.Context(), "web", shed.Command{Login: true})
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if err := <-ended; err == nil {
			t.Errorf("%s: the command got something from a client that is gone", name)
		}
	}
}

func TestExecShutdown(t *testing.T) {
	fake := &apitest.Fake{Run: cat}
	fake.Add(shed.Shed{Name: "web"})
	ln, dial := listenUnix(t)
	stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
	conn, err := NewClient(dial, "the server").Exec(t.Context(), "web", shed.Command{Login: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stop() // returns only when the command has ended
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from a server that has ended", n)
	}
}

func TestExecCancelled(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	fake := &apitest.Fake{Before: func(ctx context.Context, op, _ string, _ shed.Progress) error {
		close(begun)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	}}
	c := newTestClient(t, fake)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if _, err := c.Exec(ctx, "web", shed.Command{Login: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-ended
}

// A client may send its first frames along with the request.
func TestExecEarlyFrames(t *testing.T) {
	fake := &apitest.Fake{Run: cat}
	fake.Add(shed.Shed{Name: "web"})
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	conn, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var b bytes.Buffer
	body := `{"login":true}`
	fmt.Fprintf(&b, "POST /api/sheds/web/exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: keep-alive, Upgrade\r\nUpgrade: shed-exec\r\n\r\n%s", len(body), body)
	frames := agent.NewFrameWriter(&b)
	frames.Write(agent.FrameStdin, []byte("early"))
	frames.Write(agent.FrameStdinEOF, nil)
	if _, err := conn.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	for line := "-"; line != "\r\n"; {
		if line, err = in.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	p := agent.NewProcess(&bufferedConn{conn, in})
	defer p.Close()
	go io.Copy(io.Discard, p.Stderr())
	if got, err := io.ReadAll(p.Stdout()); string(got) != "early" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := httptest.NewRecorder()
		s := &eventStream{w: w, ctl: http.NewResponseController(w), wake: make(chan struct{}, 1)}
		s.run(t.Context(), func() {}, func(context.Context, shed.Progress) (any, error) {
			time.Sleep(3*keepalive + 1)
			return nil, nil
		})
		if n := strings.Count(w.Body.String(), ": "); n != 3 || strings.Contains(w.Body.String(), "data") {
			t.Errorf("%d comments in 3 intervals: %q", n, w.Body)
		}
	})
}
