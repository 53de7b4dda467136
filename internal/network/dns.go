package network

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// A guest's resolver asks again after 5 s: by then a second server
	// should have been tried.
	dnsTimeout = 2 * time.Second // for one server and transport

	maxDNSQueries = 256 // at a time; above, queries fail
	maxDNSConns   = 128 // over TCP, at a time; further ones wait
	ownTTL        = 60  // seconds, of the records in zone
	dnsPort       = 53
)

// dnsServer answers DNS on Gateway. Names in zone it knows itself; all other
// queries go to the host's name servers as they are, so that types, DNSSEC
// and errors pass through. The host's /etc/hosts is not read here; a name server
// of the host's own, such as systemd-resolved, may answer from it.
type dnsServer struct {
	upstreams func() []netip.AddrPort
	log       *slog.Logger
	slots     chan struct{}
	servers   []*dns.Server
	ctx       context.Context // done when the server is to end
	wg        sync.WaitGroup
}

// newDNSServer starts a server on s. Nil upstreams mean the host's. Queries end when ctx is done, which is
// to be before close is called.
func newDNSServer(ctx context.Context, s *stack.Stack, upstreams []netip.AddrPort, log *slog.Logger) (*dnsServer, error) {
	d := &dnsServer{ctx: ctx, log: log, slots: make(chan struct{}, maxDNSQueries)}
	d.upstreams = func() []netip.AddrPort { return upstreams }
	if upstreams == nil {
		d.upstreams = (&resolvConf{path: "/etc/resolv.conf"}).servers
	}
	at := tcpip.FullAddress{NIC: nicID, Addr: tcpAddr(gatewayAddr), Port: dnsPort}
	pc, err := gonet.DialUDP(s, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	l, err := gonet.ListenTCP(s, at, ipv4.ProtocolNumber)
	if err != nil {
		pc.Close()
		return nil, err
	}
	for _, srv := range []*dns.Server{{PacketConn: pc}, {Listener: netutil.LimitListener(stackListener{l}, maxDNSConns)}} {
		started := make(chan struct{})
		srv.Handler = d
		srv.UDPSize = dns.MaxMsgSize
		srv.NotifyStartedFunc = func() { close(started) }
		d.servers = append(d.servers, srv)
		d.wg.Go(func() {
			if err := srv.ActivateAndServe(); err != nil && d.ctx.Err() == nil {
				d.log.Error("DNS server ended", "error", err)
			}
		})
		<-started
	}
	return d, nil
}

// stackListener is a listener whose Close ends Accept.
type stackListener struct{ *gonet.TCPListener }

func (l stackListener) Close() error {
	l.Shutdown()
	return l.TCPListener.Close()
}

// close ends the server. It returns when all queries have ended, which those of
// a guest that doesn't read their answers do only when their connections are aborted.
func (d *dnsServer) close() {
	for _, s := range d.servers {
		_ = s.Shutdown() // fails only for a server that has ended
	}
	d.wg.Wait()
}

// ServeDNS implements dns.Handler.
func (d *dnsServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	_, overUDP := w.RemoteAddr().(*net.UDPAddr)
	answer := d.answer(q, overUDP)
	if overUDP {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		answer.Truncate(size)
	} else {
		answer.Compress = true // it may be too long without
	}
	b, err := answer.Pack()
	if err != nil || len(b) > dns.MaxMsgSize {
		d.log.Debug("DNS answer can't be passed on", "bytes", len(b), "error", err)
		if b, err = new(dns.Msg).SetRcode(q, dns.RcodeServerFailure).Pack(); err != nil {
			return // not even the question can be repeated
		}
	}
	_, _ = w.Write(b) // fails only if the guest has gone away
}

// answer returns the answer to q.
func (d *dnsServer) answer(q *dns.Msg, overUDP bool) *dns.Msg {
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	default:
		return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	}
	if len(q.Question) == 1 && dns.IsSubDomain(zone+".", q.Question[0].Name) {
		return own(q)
	}
	return d.forward(q, overUDP)
}

// own answers a query for a name in zone.
func own(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative, m.RecursionAvailable = true, true
	question := q.Question[0]
	hdr := dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ownTTL}
	var addr netip.Addr
	switch strings.ToLower(question.Name) {
	case hostName + ".":
		addr = hostAddr
	case gatewayName + ".":
		addr = gatewayAddr
	case zone + ".":
	default:
		m.Rcode = dns.RcodeNameError
	}
	if addr.IsValid() && question.Qclass == dns.ClassINET && (question.Qtype == dns.TypeA || question.Qtype == dns.TypeANY) {
		m.Answer = []dns.RR{&dns.A{Hdr: hdr, A: addr.AsSlice()}}
		return m
	}
	// Says for how long the absence of a record may be remembered.
	hdr.Name, hdr.Rrtype = zone+".", dns.TypeSOA
	m.Ns = []dns.RR{&dns.SOA{
		Hdr: hdr, Ns: gatewayName + ".", Mbox: "nobody." + zone + ".",
		Serial: 1, Refresh: 3600, Retry: 3600, Expire: 3600, Minttl: ownTTL,
	}}
	return m
}

// forward asks one name server after the other until one has an answer.
func (d *dnsServer) forward(q *dns.Msg, overUDP bool) *dns.Msg {
	var failed *dns.Msg
	for _, server := range d.upstreams() {
		m, err := d.exchange(q, server.String(), overUDP)
		if err != nil {
			d.log.Debug("DNS server failed", "server", server, "error", err)
			continue
		}
		switch m.Rcode {
		case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
			failed = m
			continue
		}
		return m
	}
	if failed != nil {
		return failed
	}
	m := new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	m.RecursionAvailable = true
	return m
}

// exchange asks one server, by TCP if the guest did or UDP is too small.
func (d *dnsServer) exchange(q *dns.Msg, server string, overUDP bool) (*dns.Msg, error) {
	var truncated *dns.Msg
	if overUDP {
		m, err := d.exchangeBy("udp", q, server)
		if err != nil || !m.Truncated {
			return m, err
		}
		truncated = m
	}
	m, err := d.exchangeBy("tcp", q, server)
	if err != nil && truncated != nil {
		return truncated, nil
	}
	return m, err
}

func (d *dnsServer) exchangeBy(network string, q *dns.Msg, server string) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(d.ctx, dnsTimeout)
	defer cancel()
	// The identifier protects against forged answers: don't let the guest choose.
	forwarded := q.Copy()
	forwarded.Id = dns.Id()
	c := dns.Client{Net: network, Timeout: dnsTimeout}
	m, _, err := c.ExchangeContext(ctx, forwarded, server)
	if err != nil {
		return nil, fmt.Errorf("ask %s by %s: %w", server, network, err)
	}
	m.Id = q.Id
	return m, nil
}
