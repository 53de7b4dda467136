package client

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// two returns servers a and b, by their sockets, and one that never answers, c.
func two(t *testing.T) (a, b *testServer, all map[string]Server) {
	t.Helper()
	home(t)
	a, b = newServer(t), newServer(t)
	socket := filepath.Join(socketDir(t), "s")
	mute, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mute.Close() })
	return a, b, map[string]Server{"a": {Socket: a.socket}, "b": {Socket: b.socket}, "c": {Socket: socket}}
}

func wantFind(t *testing.T, l *Lookup, name, server string, code shed.Code, parts ...string) {
	t.Helper()
	got, err := l.Find(t.Context(), name)
	if got != server || shed.ErrorCode(err) != code {
		t.Errorf("%s: on %q, %v (%s)", name, got, err, shed.ErrorCode(err))
	}
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error()+"\n"+shed.ErrorHint(err), part) {
			t.Errorf("%s: no %q in %v", name, part, err)
		}
	}
}

func TestFind(t *testing.T) {
	a, b, all := two(t)
	delete(all, "c")
	a.Add(shed.Shed{Name: "web"})
	a.Add(shed.Shed{Name: "both"})
	b.Add(shed.Shed{Name: "both"})
	b.Add(shed.Shed{Name: "db"})
	l := open(t, Options{}, all).Lookup()
	wantFind(t, l, "web", "a", "")
	wantFind(t, l, "db", "b", "")
	wantFind(t, l, "both", "", shed.CodeConflict, "a/both, b/both")
	wantFind(t, l, "none", "", shed.CodeNotFound, `no shed "none" on any server`)
}

// A server that is slow with its answer has a moment to say that it has the shed too.
func TestFindGrace(t *testing.T) {
	a, b, all := two(t)
	delete(all, "c")
	a.Add(shed.Shed{Name: "web"})
	b.Add(shed.Shed{Name: "web"})
	first := make(chan struct{})
	a.Before = func(context.Context, string, string, shed.Progress) error { close(first); return nil }
	b.Before = func(context.Context, string, string, shed.Progress) error { <-first; return nil }
	s := open(t, Options{}, all)
	s.minGrace = time.Hour
	wantFind(t, s.Lookup(), "web", "", shed.CodeConflict)
}

// A server that doesn't answer is not waited for where another has the shed. What it had counts.
func TestFindSilent(t *testing.T) {
	a, _, all := two(t)
	a.Add(shed.Shed{Name: "web"})
	a.Add(shed.Shed{Name: "old"})
	s := open(t, Options{}, all)
	write(t, filepath.Join(s.Config.Dir(), "lookup.json"), `{"version":1,"servers":{
		"c":{"address":"`+all["c"].Socket+`","sheds":["gone","old"]},
		"b":{"address":"another","sheds":["web"]},
		"z":{"address":"z","sheds":["z"]}}}`)
	l := s.Lookup()
	wantFind(t, l, "web", "a", "")
	wantFind(t, l, "old", "", shed.CodeConflict, "a/old, c/old (when that server last answered)")
	if !s.cache.get("c", all["c"].Socket).Silent {
		t.Error("it is not remembered that c is silent")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var f cacheFile
	text, err := os.ReadFile(filepath.Join(s.Config.Dir(), "lookup.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &f); err != nil || len(f.Servers["a"].Sheds) != 2 || len(f.Servers["c"].Sheds) != 2 || f.Servers["z"].Address != "z" {
		t.Errorf("%s, %v", text, err)
	}

	// From then on it isn't waited for at all.
	s = open(t, Options{}, all)
	l = s.Lookup()
	for len(l.state("web").silent) > 1 {
		<-l.state("web").changed
	}
	if l.worthWaiting(l.state("web").silent) {
		t.Error("it waits for the silent one")
	}
	wantFind(t, l, "web", "a", "")
}

func TestFindOffline(t *testing.T) {
	a, b, all := two(t)
	a.Add(shed.Shed{Name: "web"})
	b.Add(shed.Shed{Name: "db"})
	all["c"] = Server{Socket: filepath.Join(t.TempDir(), "none")}
	s := open(t, Options{}, all)
	l := s.Lookup()
	wantFind(t, l, "web", "a", "")
	wantFind(t, l, "none", "", shed.CodeNotFound, "on the servers that answer", "c: server \"c\" at ")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	all["b"] = Server{Socket: b.socket}
	b.Before = func(context.Context, string, string, shed.Progress) error {
		return shed.Errorf(shed.CodeInternal, "out of order").WithHint("mend it")
	}
	wantFind(t, open(t, Options{}, all).Lookup(), "db", "", shed.CodeUnreachable, `shed db is on the server "b"`, "out of order", "mend it")

	delete(all, "a")
	wantFind(t, open(t, Options{}, all).Lookup(), "web", "", shed.CodeUnreachable, "no server answers", "b: out of order", "c: ")
}

// Whoever gives up doesn't wait, and nothing is left of the question.
func TestFindInterrupted(t *testing.T) {
	_, _, all := two(t)
	s := open(t, Options{}, all)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Lookup().Find(ctx, "none"); err != context.Canceled {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestTimeoutWhileAsking(t *testing.T) {
	s := NewServers(&Config{}, Options{})
	ctx, cancel := s.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	<-ctx.Done()
	if context.Cause(ctx) != context.DeadlineExceeded {
		t.Error(context.Cause(ctx))
	}
	s.keys.asking.Add(1)
	ctx, cancel = s.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	time.Sleep(20 * time.Millisecond)
	if ctx.Err() != nil {
		t.Error("the time went on while the user was asked")
	}
	s.keys.asking.Add(-1)
	<-ctx.Done()
}

func FuzzCache(f *testing.F) {
	f.Add(`{"version":1,"servers":{"a":{"address":"x","sheds":["b"]}}}`)
	f.Add(`{"version":2}`)
	f.Add(`{"version":1,"servers":{"a":null}}`)
	f.Fuzz(func(t *testing.T, text string) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "lookup.json"), text)
		c := &cache{dir: dir}
		c.get("a", "x")
		c.answered("a", "x", []*shed.Shed{{Name: "new"}})
		if err := c.save(); err != nil {
			t.Fatal(err)
		}
		if got := (&cache{dir: dir}).get("a", "x"); len(got.Sheds) != 1 || got.Sheds[0] != "new" {
			t.Errorf("%+v", got)
		}
	})
}

// A server that was silent is left alone, until it is needed.
func TestFindSilentBefore(t *testing.T) {
	a, b, all := two(t)
	delete(all, "c")
	a.Add(shed.Shed{Name: "web"})
	b.Add(shed.Shed{Name: "db"})
	var asked atomic.Bool
	b.Before = func(context.Context, string, string, shed.Progress) error { asked.Store(true); return nil }
	silent := func(sheds string) *Servers {
		s := open(t, Options{}, all)
		s.silentDelay = time.Hour
		write(t, filepath.Join(s.Config.Dir(), "lookup.json"), `{"version":1,"servers":{"b":{"address":"`+b.socket+`","silent":true,"sheds":[`+sheds+`]}}}`)
		return s
	}
	s := silent("")
	wantFind(t, s.Lookup(), "web", "a", "")
	if err := s.Close(); err != nil || asked.Load() {
		t.Errorf("it was asked; %v", err)
	}
	s = silent("")
	wantFind(t, s.Lookup(), "db", "b", "")
	if !asked.Load() || s.cache.get("b", b.socket).Silent {
		t.Error("it is still taken for silent")
	}
	// What it had then is no reason to refuse what another has, if it answers.
	wantFind(t, silent(`"web"`).Lookup(), "web", "a", "")
	a.Before = func(ctx context.Context, _, _ string, _ shed.Progress) error { <-ctx.Done(); return nil }
	wantFind(t, silent(`"db"`).Lookup(), "db", "b", "")
}
