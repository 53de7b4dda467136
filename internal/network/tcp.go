package network

import (
	"context"
	"io"
	"math"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	dialTimeout = 30 * time.Second // of the host's connect; Linux gives up after 127 s

	// The guest is probed so that connections end which a reset of the machine
	// made it forget: it refuses the probe. Silence ends nothing, since a
	// paused machine is silent.
	guestKeepAlive = 2 * time.Minute
)

// forwardTCP answers the guest's request for a connection after the host's
// attempt to make the same one has ended, so that the guest sees a success
// or failure that is real. Every failure is a reset at once.
func (n *Network) forwardTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	dst := netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort)
	reset := func(msg string, args ...any) {
		n.log.Debug(msg, append(args, "dst", dst)...)
		r.Complete(true)
	}
	if !n.begin() {
		r.Complete(true)
		return
	}
	defer n.wg.Done()

	to, err := n.route(dst)
	if err != nil {
		reset("TCP connection refused", "reason", err)
		return
	}
	select {
	case n.tcpSlots <- struct{}{}:
		defer func() { <-n.tcpSlots }()
	default:
		reset("TCP connection refused", "reason", "too many connections")
		return
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	c, err := dialer.DialContext(n.ctx, "tcp", to.String())
	if err != nil {
		reset("TCP connection failed", "error", err)
		return
	}
	host := c.(*net.TCPConn)
	defer host.Close()

	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if terr != nil {
		// The guest has given up meanwhile.
		n.log.Debug("TCP handshake failed", "dst", dst, "error", terr)
		_ = host.SetLinger(0)
		return
	}
	keepAlive(ep)
	n.splice(&wq, ep, host)
}

func keepAlive(ep tcpip.Endpoint) {
	ep.SocketOptions().SetKeepAlive(true)
	idle := tcpip.KeepaliveIdleOption(guestKeepAlive)
	interval := tcpip.KeepaliveIntervalOption(guestKeepAlive)
	// These can't fail on a TCP endpoint.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, math.MaxInt32)
}

// splice carries data both ways until both have ended, then closes both
// connections. The end of one way is passed on by itself; a failure resets both.
func (n *Network) splice(wq *waiter.Queue, ep tcpip.Endpoint, host *net.TCPConn) {
	guest := gonet.NewTCPConn(wq, ep)
	reset := func() {
		_ = host.SetLinger(0)
		_ = host.Close()
		ep.Abort()
	}
	defer guest.Close()
	defer context.AfterFunc(n.ctx, reset)()

	// A guest that has ended its way and then goes away is noticed by neither
	// copy, as long as the host has nothing to say.
	gone := waiter.NewFunctionEntry(waiter.EventHUp, func(waiter.EventMask) {
		_ = host.SetReadDeadline(time.Now())
	})
	wq.EventRegister(&gone)
	defer wq.EventUnregister(&gone)

	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(guest, host); err != nil || guest.CloseWrite() != nil {
			reset()
		}
	})
	if _, err := io.Copy(host, guest); err != nil || host.CloseWrite() != nil {
		reset()
	}
	wg.Wait()
}
