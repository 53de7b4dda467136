package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

const large = 200 << 20

// zeros is a stream of n zeros.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// allocated returns how much memory f allocates, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestLargeStreams(t *testing.T) {
	var took, saved int64
	fake := &apitest.Fake{
		Take: func(_ context.Context, r io.Reader, _ shed.Progress) (err error) {
			took, err = io.Copy(io.Discard, r)
			return err
		},
		Archive: func(_ context.Context, w io.Writer) (err error) {
			saved, err = io.Copy(w, zeros(large))
			return err
		},
	}
	c := newTestClient(t, fake)
	for name, call := range map[string]func(){
		"load": func() {
			if images, err := c.Load(t.Context(), zeros(large), nil); err != nil || len(images) != 1 || took != large {
				t.Errorf("load of %d bytes: %v, %v", took, images, err)
			}
		},
		"build": func() {
			if _, err := c.Build(t.Context(), shed.BuildOptions{Tag: "x"}, zeros(large), nil); err != nil || took != large {
				t.Errorf("build of %d bytes: %v", took, err)
			}
		},
		"save": func() {
			var got counter
			if err := c.Save(t.Context(), []string{"base"}, &got); err != nil || got != large || saved != large {
				t.Errorf("save of %d bytes: %d, %v", saved, got, err)
			}
		},
	} {
		took = 0
		if n := allocated(call); n > large/10 {
			t.Errorf("%s allocated %d bytes", name, n)
		}
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// Events come while the archive is on its way, and a body of exactly one tar that
// nobody reads to its end is no trouble.
func TestLoadProgress(t *testing.T) {
	fake := &apitest.Fake{Take: func(_ context.Context, r io.Reader, p shed.Progress) error {
		_, err := io.ReadFull(r, make([]byte, 5))
		p.Report(shed.Event{Phase: "load", Item: "one", Current: 5, Unit: "bytes"})
		if err != nil {
			return err
		}
		_, err = io.ReadFull(r, make([]byte, 5))
		return err
	}}
	c := newTestClient(t, fake)
	pr, pw := io.Pipe()
	seen := make(chan shed.Event, 1)
	go func() {
		io.WriteString(pw, "first")
		<-seen // else the second part never comes
		io.WriteString(pw, "other")
		io.WriteString(pw, "end of the tar")
		pw.Close()
	}()
	if images, err := c.Load(t.Context(), pr, func(e shed.Event) { seen <- e }); err != nil || len(images) != 1 {
		t.Errorf("got %v, %v", images, err)
	}
	pr.Close()
}

// A server that doesn't want the rest of an archive says why, to clients that
// go on sending too.
func TestLoadFailsEarly(t *testing.T) {
	fake := &apitest.Fake{Take: func(_ context.Context, r io.Reader, _ shed.Progress) error {
		if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
			return err
		}
		return shed.Errorf(shed.CodeNoSpace, "the disk is full").WithHint("prune")
	}}
	for _, network := range []string{"unix", "tcp"} {
		listen := listenUnix
		if network == "tcp" {
			listen = listenTCP
		}
		ln, dial := listen(t)
		serve(t, ln, fake, slog.New(slog.DiscardHandler))
		c := NewClient(dial, "the server")
		for range 50 {
			if _, err := c.Load(t.Context(), zeroReader{}, nil); shed.ErrorCode(err) != shed.CodeNoSpace || shed.ErrorHint(err) != "prune" {
				t.Fatalf("%s: got %v", network, err)
			}
		}
		c.Close()
		// Without events the answer has a status.
		status, body := rawRequest(t, dial, "POST", "/api/images/load", strings.Repeat("x", 8<<20), http.Header{"Content-Type": {tarType}, "Host": {"localhost"}})
		if status != http.StatusInsufficientStorage || !strings.Contains(body, "the disk is full") {
			t.Errorf("%s: %d %s", network, status, body)
		}
	}
}

// A stream that the client breaks off is not taken for a whole one.
func TestLoadBrokenOff(t *testing.T) {
	for name, test := range map[string]struct {
		source func(cancel func()) io.Reader
		check  func(error) bool
	}{
		"the source fails": {
			func(func()) io.Reader {
				return io.MultiReader(zeros(1<<20), readerFunc(func([]byte) (int, error) { return 0, errors.New("disk on fire") }))
			},
			func(err error) bool { return err.Error() == "sending to the server: disk on fire" },
		},
		"cancelled": {
			func(cancel func()) io.Reader {
				return io.MultiReader(zeros(1<<20), readerFunc(func([]byte) (int, error) {
					cancel()
					return 0, errors.New("not read")
				}))
			},
			func(err error) bool { return errors.Is(err, context.Canceled) },
		},
	} {
		ended := make(chan error, 1)
		fake := &apitest.Fake{Take: func(ctx context.Context, r io.Reader, _ shed.Progress) error {
			_, err := io.Copy(io.Discard, r)
			ended <- err
			return err
		}}
		c := newTestClient(t, fake)
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := c.Load(ctx, test.source(cancel), nil); err == nil || !test.check(err) {
			t.Errorf("%s: the client got %v", name, err)
		}
		if err := <-ended; err == nil {
			t.Errorf("%s: the server took it for the whole archive", name)
		}
		cancel()
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Once the context has been sent, a client that goes away ends the build.
func TestBuildCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	fake := &apitest.Fake{Take: func(ctx context.Context, r io.Reader, _ shed.Progress) error {
		defer close(ended)
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}}
	c := newTestClient(t, fake)
	if _, err := c.Build(ctx, shed.BuildOptions{Tag: "x"}, zeros(1<<20), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-ended
}

// What goes wrong in the middle of an archive never looks like its end.
func TestSaveFails(t *testing.T) {
	fake := &apitest.Fake{Archive: func(_ context.Context, w io.Writer) error {
		if _, err := io.Copy(w, zeros(1<<20)); err != nil {
			return err
		}
		return shed.Errorf(shed.CodeNoImage, "blob \"ü\"\n is damaged\x7f").WithHint("load 100%% again")
	}}
	ln, dial := listenUnix(t)
	serve(t, ln, fake, slog.New(slog.DiscardHandler))
	c := NewClient(dial, "the server")
	defer c.Close()
	var got counter
	err := c.Save(t.Context(), []string{"base"}, &got)
	if shed.ErrorCode(err) != shed.CodeNoImage || err.Error() != "blob \"ü\"\n is damaged\x7f" || shed.ErrorHint(err) != "load 100% again" || got != 1<<20 {
		t.Errorf("after %d bytes: %v", got, err)
	}
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://localhost/api/images/save?name=base")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Errorf("a client without trailers got %d bytes as the whole archive", n)
	}
}

// The writer's own error comes back, and the server stops.
func TestSaveBrokenOff(t *testing.T) {
	ended := make(chan error, 1)
	fake := &apitest.Fake{Archive: func(_ context.Context, w io.Writer) error {
		_, err := io.Copy(w, zeroReader{})
		ended <- err
		return err
	}}
	c := newTestClient(t, fake)
	full := errors.New("disk full")
	if err := c.Save(t.Context(), []string{"base"}, writerFunc(func([]byte) (int, error) { return 0, full })); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the server wrote an endless archive")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A client that stalls doesn't hold an operation for ever; one that is slow is waited for.
func TestStalledUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		took := make(chan error, 1)
		fake := &apitest.Fake{Take: func(_ context.Context, r io.Reader, _ shed.Progress) error {
			_, err := io.Copy(io.Discard, r)
			took <- err
			return err
		}}
		stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
		c := NewClient(ln.dial, "the server")
		var steps atomic.Int32
		stalled := make(chan struct{})
		_, err := c.Load(t.Context(), readerFunc(func(p []byte) (int, error) {
			if steps.Add(1) > 3 {
				<-stalled
				return 0, io.EOF
			}
			time.Sleep(uploadIdle - time.Second)
			return 1, nil
		}), nil)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "sent nothing for 5m") || steps.Load() != 4 {
			t.Errorf("after %d reads: %v", steps.Load(), err)
		}
		if err := <-took; err == nil {
			t.Error("the server took what a stalled client sent for the whole")
		}
		close(stalled)
		c.Close()
		stop()
	})
}

// Once all is there, the work may take as long as it likes.
func TestLongBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		fake := &apitest.Fake{Take: func(ctx context.Context, r io.Reader, _ shed.Progress) error {
			if _, err := io.Copy(io.Discard, r); err != nil {
				return err
			}
			select {
			case <-time.After(3 * uploadIdle):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}}
		stop := serve(t, ln, fake, slog.New(slog.DiscardHandler))
		c := NewClient(ln.dial, "the server")
		if _, err := c.Build(t.Context(), shed.BuildOptions{Tag: "x"}, zeros(1<<20), nil); err != nil {
			t.Error(err)
		}
		c.Close()
		stop()
	})
}

// A server that stops doesn't wait for a client that has more to send.
func TestUploadShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		stop := serve(t, ln, &apitest.Fake{}, slog.New(slog.DiscardHandler))
		c := NewClient(ln.dial, "the server")
		stalled, ended := make(chan struct{}), make(chan error, 1)
		go func() {
			_, err := c.Load(t.Context(), io.MultiReader(zeros(1<<20), readerFunc(func([]byte) (int, error) {
				<-stalled
				return 0, io.EOF
			})), nil)
			ended <- err
		}()
		synctest.Wait()
		start := time.Now()
		stop()
		if took := time.Since(start); took >= shutdownTimeout {
			t.Errorf("it took %s", took)
		}
		if err := <-ended; shed.ErrorCode(err) != shed.CodeUnreachable || !strings.Contains(err.Error(), "the server is stopping") {
			t.Errorf("the client got %v", err)
		}
		close(stalled)
		c.Close()
	})
}

// Neither a source that gives nothing nor a server that says nothing holds a client that is cancelled.
func TestCancelledUpload(t *testing.T) {
	ln, dial := listenUnix(t)
	defer ln.Close()
	c := NewClient(dial, "the server")
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw := io.Pipe()
	defer pw.Close()
	source := readerFunc(func(p []byte) (int, error) {
		cancel()
		return pr.Read(p)
	})
	if _, err := c.Load(ctx, source, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// pipeListener is a network whose time a test controls.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) dial(ctx context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }
