package sshd

import (
	"bufio"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
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
		enter := func(src netip.Prefix, want string) {
			t.Helper()
			if got := g.enter(src); got == "" != (want == "") || !strings.Contains(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
		}
		leave := func(src netip.Prefix, penalty time.Duration, want bool) {
			t.Helper()
			if got := g.leave(src, penalty); got != want {
				t.Errorf("barred: %v", got)
			}
		}
		enter(a, "")
		enter(a, "")
		enter(a, "of this source are not")
		enter(b, "")
		enter(c, "too many connections are not")
		leave(b, 0, false)
		enter(c, "")
		leave(c, 0, false)
		leave(a, 6*time.Second, false)
		leave(a, 6*time.Second, true)
		enter(a, "have failed")
		enter(b, "")
		leave(b, 0, false)
		time.Sleep(2 * time.Second)
		enter(a, "")
		leave(a, 0, false)
		time.Sleep(11 * time.Second)
		enter(a, "")
		leave(a, 0, false)
		if len(g.sources) != 0 || g.open != 0 {
			t.Errorf("left: %v, %d", g.sources, g.open)
		}
	})
}

// However many sources fail, what is remembered is bounded.
func TestManySources(t *testing.T) {
	g := gate{max: 10, maxPerSource: 2, burst: time.Second}
	for i := range maxSources + 1000 {
		src := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		if reason := g.enter(src); reason != "" {
			t.Fatal(reason)
		}
		g.leave(src, time.Hour)
	}
	if len(g.sources) > maxSources {
		t.Errorf("%d sources", len(g.sources))
	}
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
	for { // the server counts a moment after the client knows
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		if line == "Not allowed at this time\r\n" {
			break
		}
	}
	if c, err := ts.dial("box", ts.signer); err == nil {
		c.Close()
		t.Error("a barred source got in")
	}
	// Whoever crossed the limit logs it a moment after the others are barred.
	for !strings.Contains(ts.logged.String(), "source=127.0.0.1/32") {
		time.Sleep(time.Millisecond)
	}
	if log := ts.logged.String(); !strings.Contains(log, "remote=127.0.0.1:") {
		t.Errorf("logged %s", log)
	}
}

// A client that keeps sending, but nothing that gets it in, has no more time than others.
func TestSlowloris(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.handshakeTimeout = 100 * time.Millisecond })
	conn, err := net.Dial("tcp", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, conn)
	}()
	for {
		select {
		case <-ended:
			return
		case <-time.After(10 * time.Millisecond):
			conn.Write([]byte("S"))
		}
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
