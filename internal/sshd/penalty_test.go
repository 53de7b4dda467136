package sshd

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestSourceOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:5":             "192.0.2.1/32",
		"[::ffff:192.0.2.1]:5":    "192.0.2.1/32",
		"[2001:db8:1:2:3:4:5:6]:": "invalid Prefix",
		"[2001:db8:1:2:3::6]:7":   "2001:db8:1:2::/64",
		"[fe80::1%eth0]:7":        "fe80::/64",
		"@":                       "invalid Prefix",
	} {
		if got := sourceOf(textAddr(addr)).String(); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

type textAddr string

func (textAddr) Network() string  { return "tcp" }
func (a textAddr) String() string { return string(a) }

func TestGate(t *testing.T) {
	a, b, c := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32"), netip.MustParsePrefix("192.0.2.3/32")
	synctest.Test(t, func(t *testing.T) {
		g := gate{max: 3, maxPerSource: 2, burst: 10 * time.Second}
		var ended []string
		enter := func(name string, src netip.Prefix) *attempt {
			t.Helper()
			at, refused := g.enter(src, func() { ended = append(ended, name) })
			if at == nil || refused != 0 {
				t.Fatalf("%s: refused %d", name, refused)
			}
			return at
		}
		refuse := func(src netip.Prefix, want int) {
			t.Helper()
			if at, refused := g.enter(src, nil); at != nil || refused != want {
				t.Errorf("%v, refused %d, want %d", at, refused, want)
			}
		}
		leave := func(at *attempt, penalty time.Duration, want bool) {
			t.Helper()
			if got := g.leave(at, penalty); got != want {
				t.Errorf("barred: %v", got)
			}
		}
		expect := func(want ...string) {
			t.Helper()
			if !slices.Equal(ended, want) {
				t.Errorf("ended %v, want %v", ended, want)
			}
			ended = nil
		}
		a1, a2 := enter("a1", a), enter("a2", a)
		expect()
		a3 := enter("a3", a) // one too many of the source
		expect("a1")
		b1 := enter("b1", b)
		c1 := enter("c1", c) // one too many of all
		expect("a2")
		b2 := enter("b2", b)
		expect("b1")
		leave(a1, time.Hour, false) // costs nothing any more
		leave(a2, time.Hour, false)
		leave(b1, time.Hour, false)
		leave(b2, 0, false)
		leave(c1, 0, false)

		a4 := enter("a4", a)
		leave(a3, 6*time.Second, false)
		leave(a4, 6*time.Second, true)
		refuse(a, 1)
		refuse(a, 0)
		leave(enter("b3", b), 0, false)
		time.Sleep(2 * time.Second)
		leave(enter("a5", a), reportInterval, true)
		refuse(a, 0)
		time.Sleep(reportInterval - 2*time.Second)
		refuse(a, 3)
		refuse(a, 0)
		time.Sleep(13 * time.Second)
		leave(enter("a6", a), 0, false)
		expect()
		if len(g.sources) != 0 || len(g.open) != 0 {
			t.Errorf("left: %v, %v", g.sources, g.open)
		}
	})
}

// However many sources fail, what is remembered is bounded, and those that are barred are remembered longest.
func TestManySources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gate{max: 10, maxPerSource: 2, burst: time.Second}
		fail := func(src netip.Prefix, penalty time.Duration) {
			t.Helper()
			at, _ := g.enter(src, nil)
			if at == nil {
				t.Fatal("refused")
			}
			g.leave(at, penalty)
		}
		barred := netip.MustParsePrefix("192.0.2.1/32")
		fail(barred, time.Hour)
		pending, _ := g.enter(netip.MustParsePrefix("192.0.2.2/32"), nil)
		most := 0
		for i := range uint32(1_000_000) {
			addr := [16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8}
			binary.BigEndian.PutUint32(addr[4:], i)
			fail(netip.PrefixFrom(netip.AddrFrom16(addr), 64), time.Second)
			most = max(most, len(g.sources))
		}
		if most > maxSources || most < maxSources/2 {
			t.Errorf("%d sources", most)
		}
		if at, _ := g.enter(barred, nil); at != nil {
			t.Error("it has forgotten who is barred")
		}
		g.leave(pending, 0)
		time.Sleep(time.Hour)
		fail(netip.MustParsePrefix("192.0.2.3/32"), time.Second)
		if len(g.sources) != 1 {
			t.Errorf("%d sources are left", len(g.sources))
		}
	})
}

func TestLogBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		log := slog.New(boundedHandler{
			slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}), &logBudget{burst: 10, every: time.Second},
		})
		lines := func(n int) (written string) {
			for i := range n {
				log.With("i", i).WithGroup("g").Info("refused", "x", 1)
			}
			defer b.Reset()
			return b.String()
		}
		if out := lines(1000); strings.Count(out, "\n") != 10 || !strings.Contains(out, "i=9 g.x=1\n") || strings.Contains(out, "suppressed") {
			t.Errorf("%s", out)
		}
		log.Debug("asked for")
		if !strings.Contains(b.String(), "asked for") {
			t.Error("a line for debugging is suppressed")
		}
		b.Reset()
		time.Sleep(2500 * time.Millisecond)
		if out := lines(5); strings.Count(out, "\n") != 2 || !strings.Contains(out, "suppressed=990\n") || strings.Count(out, "suppressed") != 1 {
			t.Errorf("%s", out)
		}
		time.Sleep(500 * time.Millisecond)
		if out := lines(5); strings.Count(out, "\n") != 1 || !strings.Contains(out, "suppressed=3\n") {
			t.Errorf("%s", out)
		}
		time.Sleep(time.Hour)
		if out := lines(1000); strings.Count(out, "\n") != 10 {
			t.Errorf("%s", out)
		}
	})
}

func TestBarred(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = 2 * penaltyLogin })
	wrong := memoryKey(t)
	for range 3 {
		if c, err := ts.dial("box", wrong); err == nil {
			c.Close()
			t.Fatal("in with a wrong key")
		}
	}
	// The server counts a moment after the client knows, and what it has counted passes.
	for {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		if line != "Not allowed at this time\r\n" {
			continue
		}
		c, err := ts.dial("box", ts.signer)
		if err != nil {
			break
		}
		c.Close()
	}
	// Whoever crossed the limit logs it a moment after the others are barred.
	for !strings.Contains(ts.logged.String(), "source=127.0.0.1/32") {
		time.Sleep(time.Millisecond)
	}
	if log := ts.logged.String(); !strings.Contains(log, "remote=127.0.0.1:") {
		t.Errorf("logged %s", log)
	}
}

func TestIdleConnections(t *testing.T) {
	ts := newTestServer(t)
	for range 1000 {
		ts.mustDial("box")
	}
	s, err := ts.mustDial("box").NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := s.Output("echo in"); string(out) != "in\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}

// Garbage, before and after the banner and in place of packets, ends its connection and nothing else.
func TestGarbage(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = time.Hour })
	junk := make([]byte, 100_000)
	rand.Read(junk)
	for _, b := range [][]byte{
		junk, []byte("GET / HTTP/1.1\r\n\r\n"), []byte(strings.Repeat("x", 1<<20)),
		append([]byte("SSH-2.0-x\r\n"), junk...),
		[]byte("SSH-2.0-x\r\n\xff\xff\xff\xff"), []byte("SSH-2.0-x\r\n\x00\x00\x00\x00\x00"), []byte("SSH-1.5-x\r\n"),
		append([]byte("SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x14"), make([]byte, 10)...), // a KEXINIT with nothing in it
	} {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		go conn.Write(b)
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	ts.mustDial("box")
}

// An authenticated client can't hurt the server either, whatever it sends.
func TestGarbageChannels(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	for _, kind := range []string{"", "session", "direct-tcpip", "direct-streamlocal@openssh.com", strings.Repeat("x", 10_000)} {
		for _, payload := range [][]byte{
			nil, {0}, {0xff, 0xff, 0xff, 0xff}, ssh.Marshal(directPayload{"", 1, "", 0}), ssh.Marshal(directPayload{"a\x00b", 1, "", 0}),
			ssh.Marshal(directPayload{"localhost", 1 << 31, "", 0}), ssh.Marshal(directPayload{"\xff", 80, "", 0}),
			ssh.Marshal(struct {
				P, R string
				N    uint32
			}{"../x", "", 0}),
		} {
			ch, reqs, err := client.OpenChannel(kind, payload)
			var refused *ssh.OpenChannelError
			if kind == "session" && err == nil {
				go ssh.DiscardRequests(reqs)
				ch.Close()
			} else if !errors.As(err, &refused) {
				t.Errorf("%.20s %q: %v", kind, payload, err)
			}
		}
	}
	if _, err := client.NewSession(); err != nil {
		t.Error(err)
	}
}
