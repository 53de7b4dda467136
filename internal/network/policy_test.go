package network

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestPolicy(t *testing.T) {
	p := policy{hostPorts: []uint16{8080}}
	local := []netip.Prefix{
		netip.MustParsePrefix("127.0.0.1/8"),
		netip.MustParsePrefix("192.168.1.10/24"),
		netip.MustParsePrefix("10.9.8.7/32"),
		netip.MustParsePrefix("172.30.0.0/31"),
		netip.MustParsePrefix("2001:db8::1/64"),
	}
	for _, tt := range []struct{ dst, to, refused string }{
		{dst: "93.184.216.34:443", to: "93.184.216.34:443"},
		{dst: "192.168.1.11:22", to: "192.168.1.11:22"},
		{dst: "10.9.8.6:80", to: "10.9.8.6:80"},
		{dst: "100.64.0.1:80", to: "100.64.0.1:80"},
		{dst: "198.19.176.1:80", to: "198.19.176.1:80"},
		{dst: "[::ffff:93.184.216.34]:443", to: "93.184.216.34:443"},
		{dst: "[2001:db8::2]:443", to: "[2001:db8::2]:443"},
		{dst: hostIP + ":8080", to: "127.0.0.1:8080"},
		{dst: hostIP + ":8081", refused: "may not reach"},
		{dst: Gateway + ":53", refused: "own network"},
		{dst: Gateway + ":8080", refused: "own network"},
		{dst: Guest + ":8080", refused: "own network"},
		{dst: "198.19.177.255:8080", refused: "own network"},
		{dst: "127.0.0.1:8080", refused: "loopback"},
		{dst: "127.5.6.7:8080", refused: "loopback"},
		{dst: "[::1]:8080", refused: "loopback"},
		{dst: "[::ffff:127.0.0.1]:8080", refused: "loopback"},
		{dst: "0.0.0.0:8080", refused: "unspecified"},
		{dst: "0.1.2.3:8080", refused: "unspecified"},
		{dst: "[::]:8080", refused: "unspecified"},
		{dst: "169.254.169.254:80", refused: "link-local"},
		{dst: "[fe80::1]:80", refused: "link-local"},
		{dst: "224.0.0.251:5353", refused: "multicast"},
		{dst: "[ff02::1]:80", refused: "multicast"},
		{dst: "255.255.255.255:67", refused: "broadcast"},
		{dst: "240.0.0.1:80", refused: "reserved"},
		{dst: "192.168.1.10:22", refused: "of the server"},
		{dst: "10.9.8.7:22", refused: "of the server"},
		{dst: "[2001:db8::1]:22", refused: "of the server"},
		{dst: "[::ffff:10.9.8.7]:22", refused: "of the server"},
		{dst: "192.168.1.255:9", refused: "broadcast"},
		{dst: "192.168.1.0:9", refused: "broadcast"},
		{dst: "172.30.0.1:9", to: "172.30.0.1:9"},
		{dst: "93.184.216.34:0", refused: "without a port"},
	} {
		to, err := p.route(netip.MustParseAddrPort(tt.dst), local)
		switch {
		case tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)):
			t.Errorf("Route(%s) = %v, %v; want refusal with %q", tt.dst, to, err, tt.refused)
		case tt.refused == "" && (err != nil || to.String() != tt.to):
			t.Errorf("Route(%s) = %v, %v; want %s", tt.dst, to, err, tt.to)
		}
	}
	if to, err := p.route(netip.AddrPort{}, nil); err == nil {
		t.Errorf("Route of nothing = %v", to)
	}
	if to, err := (policy{}).route(netip.MustParseAddrPort(hostIP+":8080"), nil); err == nil {
		t.Errorf("zero policy: Route to the host = %v", to)
	}
}

func TestLocalAddrs(t *testing.T) {
	l := localAddrs{list: net.InterfaceAddrs}
	has := func() bool {
		addrs, err := l.get()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if a == netip.MustParsePrefix("127.0.0.1/8") {
				return true
			}
		}
		return false
	}
	if !has() {
		t.Error("127.0.0.1/8 is missing")
	}
	l.prefixes, l.read = nil, time.Now().Add(time.Hour) // less than a second ago, slow as this may be
	if has() {
		t.Error("the addresses were read twice within a second")
	}
	l.read = time.Now().Add(-time.Minute)
	if !has() {
		t.Error("old addresses weren't read again")
	}
}
