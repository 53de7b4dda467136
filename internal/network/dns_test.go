package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// serveDNS runs a name server on a loopback port, over UDP and TCP, with the
// given handler. A query over TCP has network "tcp".
func serveDNS(t *testing.T, handle func(network string, q *dns.Msg) *dns.Msg) netip.AddrPort {
	t.Helper()
	var l net.Listener
	var pc net.PacketConn
	for pc == nil { // until a port is free in both
		var err error
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if pc, err = net.ListenPacket("udp", l.Addr().String()); err != nil {
			pc = nil
			l.Close()
			if !errors.Is(err, syscall.EADDRINUSE) {
				t.Fatal(err)
			}
		}
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		if m := handle(w.RemoteAddr().Network(), q); m != nil {
			w.WriteMsg(m)
		}
	})
	for _, s := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		started, ended := make(chan struct{}), make(chan struct{})
		s.Handler = handler
		s.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(ended)
			s.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			s.Shutdown()
			<-ended
		})
	}
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// lookup asks the shed's DNS server.
func lookup(t *testing.T, g *guest, network, name string, qtype uint16, edns uint16) *dns.Msg {
	t.Helper()
	conn := &dns.Conn{}
	if network == "tcp" {
		c, err := g.dial(Gateway + ":53")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conn.Conn = c
	} else {
		conn.Conn = packetConn{g.dialUDP(Gateway + ":53")}
		conn.UDPSize = dns.MaxMsgSize
	}
	q := new(dns.Msg).SetQuestion(name, qtype)
	if edns > 0 {
		q.SetEdns0(edns, false)
	}
	if err := conn.WriteMsg(q); err != nil {
		t.Fatal(err)
	}
	m, err := conn.ReadMsg()
	if err != nil {
		t.Fatalf("%s by %s: %v", name, network, err)
	}
	if m.Id != q.Id {
		t.Errorf("%s: the answer has another identifier", name)
	}
	return m
}

// packetConn makes the dns package treat a UDP connection as what it is.
type packetConn struct{ *gonet.UDPConn }

func addrs(m *dns.Msg) string {
	var s []string
	for _, rr := range m.Answer {
		if a, ok := rr.(*dns.A); ok {
			s = append(s, a.A.String())
		}
	}
	return strings.Join(s, " ")
}

func reply(q *dns.Msg, records ...string) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	for _, r := range records {
		rr, err := dns.NewRR(q.Question[0].Name + " 60 IN A " + r)
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func TestDNSOwnZone(t *testing.T) {
	up := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg {
		t.Errorf("%s was forwarded", q.Question[0].Name)
		return reply(q)
	})
	_, g := start(t, Config{Nameservers: []netip.AddrPort{up}})
	for _, network := range []string{"udp", "tcp"} {
		for _, tt := range []struct {
			name  string
			qtype uint16
			rcode int
			addrs string
		}{
			{"host.shed.internal.", dns.TypeA, dns.RcodeSuccess, hostIP},
			{"HOST.Shed.Internal.", dns.TypeA, dns.RcodeSuccess, hostIP},
			{"gateway.shed.internal.", dns.TypeA, dns.RcodeSuccess, Gateway},
			{"host.shed.internal.", dns.TypeAAAA, dns.RcodeSuccess, ""},
			{"shed.internal.", dns.TypeA, dns.RcodeSuccess, ""},
			{"other.shed.internal.", dns.TypeA, dns.RcodeNameError, ""},
		} {
			m := lookup(t, g, network, tt.name, tt.qtype, 0)
			if m.Rcode != tt.rcode || addrs(m) != tt.addrs || (tt.addrs == "") != (len(m.Ns) == 1) {
				t.Errorf("%s by %s:\n%v", tt.name, network, m)
			}
		}
	}
}

func TestDNSForwarded(t *testing.T) {
	up := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg {
		switch q.Question[0].Name {
		case "example.com.":
			return reply(q, "192.0.2.1")
		case "none.example.com.":
			return new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		}
		return new(dns.Msg).SetRcode(q, dns.RcodeRefused)
	})
	_, g := start(t, Config{Nameservers: []netip.AddrPort{up}})
	for _, network := range []string{"udp", "tcp"} {
		if m := lookup(t, g, network, "example.com.", dns.TypeA, 0); addrs(m) != "192.0.2.1" {
			t.Errorf("by %s: %v", network, m)
		}
		if m := lookup(t, g, network, "none.example.com.", dns.TypeA, 0); m.Rcode != dns.RcodeNameError {
			t.Errorf("by %s: %v", network, m)
		}
		if m := lookup(t, g, network, "notshed.internal.", dns.TypeA, 0); m.Rcode != dns.RcodeRefused {
			t.Errorf("by %s: %v", network, m)
		}
	}
}

func TestDNSFailover(t *testing.T) {
	servfail := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg {
		return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	})
	good := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg { return reply(q, "192.0.2.1") })
	dead := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(closedPort(t, "udp")))

	_, g := start(t, Config{Nameservers: []netip.AddrPort{dead, servfail, good}})
	if m := lookup(t, g, "udp", "example.com.", dns.TypeA, 0); addrs(m) != "192.0.2.1" {
		t.Errorf("the third of three servers has it: %v", m)
	}
	for name, servers := range map[string][]netip.AddrPort{"none": {}, "a dead one": {dead}, "a failing one": {servfail}} {
		_, g := start(t, Config{Nameservers: servers})
		if m := lookup(t, g, "udp", "example.com.", dns.TypeA, 0); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestDNSTruncated(t *testing.T) {
	var many []string
	for i := range 100 {
		many = append(many, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}).String())
	}
	up := serveDNS(t, func(network string, q *dns.Msg) *dns.Msg {
		m := reply(q, many...)
		if network == "udp" {
			m.Truncate(dns.MinMsgSize)
		}
		return m
	})
	_, g := start(t, Config{Nameservers: []netip.AddrPort{up}})
	m := lookup(t, g, "udp", "example.com.", dns.TypeA, 0)
	m.Compress = true // as it was on the wire
	if !m.Truncated || m.Len() > dns.MinMsgSize {
		t.Errorf("a small answer: truncated %v, %d bytes", m.Truncated, m.Len())
	}
	if m := lookup(t, g, "udp", "example.com.", dns.TypeA, 4096); m.Truncated || len(m.Answer) != 100 {
		t.Errorf("a guest that takes 4096 bytes: truncated %v, %d records", m.Truncated, len(m.Answer))
	}
	if m := lookup(t, g, "tcp", "example.com.", dns.TypeA, 0); m.Truncated || len(m.Answer) != 100 {
		t.Errorf("by TCP: truncated %v, %d records", m.Truncated, len(m.Answer))
	}
}

// An answer that fits only compressed, as it came.
func TestDNSCompressed(t *testing.T) {
	name := strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ".example.com."
	const count = 600
	up := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg {
		var records []string
		for i := range count {
			records = append(records, netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}).String())
		}
		m := reply(q, records...)
		m.Compress = true
		return m
	})
	_, g := start(t, Config{Nameservers: []netip.AddrPort{up}})
	if m := lookup(t, g, "tcp", name, dns.TypeA, 0); len(m.Answer) != count {
		t.Errorf("%d records, want %d", len(m.Answer), count)
	}
}

// An answer that a better compressor has made just fit is answered with a failure, instead of with nothing.
func TestDNSTooLong(t *testing.T) {
	const count = 3000
	port := serveTCP(t, func(c *net.TCPConn) {
		conn := &dns.Conn{Conn: c}
		q, err := conn.ReadMsg()
		if err != nil {
			t.Error(err)
			return
		}
		b, err := new(dns.Msg).SetReply(q).Pack()
		if err != nil {
			t.Error(err)
			return
		}
		binary.BigEndian.PutUint16(b[6:], count)
		for range count {
			b = append(b, 0xc0, 12)                       // the name is that of the question
			b = append(b, 0, 33, 0, 1, 0, 0, 0, 60, 0, 8) // SRV, IN, TTL, length
			b = append(b, 0, 1, 0, 1, 0, 80, 0xc0, 12)    // priority, weight, port, target
		}
		if _, err := conn.Write(b); err != nil {
			t.Error(err)
		}
	})
	up := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(port))
	_, g := start(t, Config{Nameservers: []netip.AddrPort{up}})
	name := strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ".example.com."
	if m := lookup(t, g, "tcp", name, dns.TypeSRV, 0); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("the answer is %s, with %d records", dns.RcodeToString[m.Rcode], len(m.Answer))
	}
}

// full says whether n has a connection on its port that takes no more to send.
func full(n *Network, port uint16) bool {
	return slices.ContainsFunc(n.stack.RegisteredEndpoints(), func(e stack.TransportEndpoint) bool {
		c, ok := e.(*tcp.Endpoint)
		return ok && c.EndpointState() == tcp.StateEstablished &&
			c.Info().(*stack.TransportEndpointInfo).ID.LocalPort == port && c.Readiness(waiter.WritableEvents) == 0
	})
}

// A guest that takes no answers must not keep Close from returning.
func TestCloseWithUnreadAnswers(t *testing.T) {
	checkLeaks(t)
	asked, cut := make(chan struct{}), make(chan struct{})
	var once sync.Once
	up := serveDNS(t, func(_ string, q *dns.Msg) *dns.Msg {
		once.Do(func() { close(asked) })
		<-cut
		m := new(dns.Msg).SetReply(q)
		hdr := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}
		for range 200 {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{strings.Repeat("x", 255)}})
		}
		return m
	})
	n, err := New(Config{Nameservers: []netip.AddrPort{up}})
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	disconnect := g.connect(n)
	c, err := g.dial(Gateway + ":53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	query, err := new(dns.Msg).SetQuestion("example.com.", dns.TypeTXT).Pack()
	if err != nil {
		t.Fatal(err)
	}
	query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	if _, err := c.Write(bytes.Repeat(query, 100)); err != nil {
		t.Fatal(err)
	}
	<-asked
	disconnect()
	close(cut)
	for !full(n, dnsPort) {
		time.Sleep(time.Millisecond)
	}
	n.Close()
}

// A guest gets no more than maxDNSConns connections served at a time, whatever it asks for on them.
func TestDNSConnections(t *testing.T) {
	_, g := start(t, Config{})
	for range maxDNSConns + 5 { // these are put off
		c, err := g.dial(Gateway + ":53")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	stacks := make([]byte, 4<<20)
	for range 20 {
		if served := strings.Count(string(stacks[:runtime.Stack(stacks, true)]), ".serveTCPConn("); served > maxDNSConns {
			t.Fatalf("%d connections are served", served)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	r := &resolvConf{path: path}
	mtime := time.Now()
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		mtime = mtime.Add(time.Second)
		if err := os.Chtimes(path, mtime, mtime); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want ...string) {
		t.Helper()
		var got []string
		for _, s := range r.servers() {
			got = append(got, s.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("servers are %v, want %v", got, want)
		}
	}
	check("127.0.0.1:53") // no file
	write("search example.com\nnameserver 127.0.0.53\nnameserver 2001:db8::1\nnameserver junk\n")
	check("127.0.0.53:53", "[2001:db8::1]:53")
	write("nameserver 192.0.2.1\n")
	check("192.0.2.1:53")
	write("nameserver 192.0.2.2\n")
	check("192.0.2.2:53")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check("192.0.2.2:53")
	write("# nothing\n")
	check("127.0.0.1:53")
}
