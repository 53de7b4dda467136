package network

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// resolvConf is a resolv.conf(5) file, read again whenever it has changed.
type resolvConf struct {
	path string

	mu      sync.Mutex
	modTime time.Time
	size    int64
	list    []netip.AddrPort
}

// servers returns the name servers of the file, as resolv.conf(5) has it: the
// local machine if it names none. If it can't be read, as in the middle of being
// replaced, those it had before hold on.
func (r *resolvConf) servers() []netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	if fi, err := os.Stat(r.path); err == nil && (!fi.ModTime().Equal(r.modTime) || fi.Size() != r.size) {
		if conf, err := dns.ClientConfigFromFile(r.path); err == nil {
			r.list = nil
			for _, s := range conf.Servers {
				if ap, err := netip.ParseAddrPort(net.JoinHostPort(s, conf.Port)); err == nil {
					r.list = append(r.list, ap)
				}
			}
			r.modTime, r.size = fi.ModTime(), fi.Size()
		}
	}
	if len(r.list) == 0 {
		return []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dnsPort)}
	}
	return r.list
}
