package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// maxFrame is the size of the largest frame on the wire, in bytes. The
	// guest may add a VLAN tag; QEMU would carry up to 69632.
	maxFrame = header.EthernetMinimumSize + 4 + MTU

	// sendBatch bounds the packets written with one system call.
	sendBatch = 64
)

var errBusy = errors.New("the network is connected to a machine already")

// Serve carries frames between the stack and the machine at the other end of
// conn until conn ends, ctx is done or n is closed, and closes conn. The wire
// is that of QEMU's "-netdev stream": a frame's length as 4 bytes, big-endian,
// then the ethernet frame.
//
// It returns nil when the other end closed conn, and ctx's cause or net.ErrClosed when
// that was the reason. It may then be called again with a new conn:
// connections survive that. One call at a time; others fail.
func (n *Network) Serve(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	if !n.serving.TryLock() {
		return errBusy
	}
	defer n.serving.Unlock()
	if !n.begin() {
		return net.ErrClosed
	}
	defer n.wg.Done()

	run, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(n.ctx, func() { cancel(net.ErrClosed) })()
	defer context.AfterFunc(run, func() { conn.Close() })()

	var wg sync.WaitGroup
	wg.Go(func() { cancel(n.send(run, conn)) })
	err := n.receive(conn)
	cancel(err)
	wg.Wait()
	// The first cause is the reason; what followed came of closing conn.
	if err := context.Cause(run); err != context.Canceled || ctx.Err() != nil {
		return err
	}
	return nil
}

// receive hands the frames that come from r to the stack until r ends, and
// returns nil if that is between two frames.
func (n *Network) receive(r io.Reader) error {
	br := bufio.NewReaderSize(r, 4*maxFrame)
	var length [4]byte
	for {
		if _, err := io.ReadFull(br, length[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read from the machine's network card: %w", err)
		}
		size := binary.BigEndian.Uint32(length[:])
		if size > maxFrame {
			return fmt.Errorf("read from the machine's network card: a frame of %d bytes, more than %d", size, maxFrame)
		}
		view := buffer.NewViewSize(int(size))
		if _, err := io.ReadFull(br, view.AsSlice()); err != nil {
			view.Release()
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read from the machine's network card: %w", err)
		}
		n.handleFrame(view)
	}
}

// handleFrame consumes view.
func (n *Network) handleFrame(view *buffer.View) {
	switch judgeFrame(view.AsSlice()) {
	case deliver:
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(view)})
		n.link.InjectInbound(0, pkt) // the link reads the protocol from the frame
		pkt.DecRef()
	case forwardPing:
		n.flows.handlePing(header.IPv4(view.AsSlice()[header.EthernetMinimumSize:]))
		view.Release()
	default:
		view.Release()
	}
}

type verdict int

const (
	drop verdict = iota
	deliver
	forwardPing // an intact echo request to somewhere outside
)

// judgeFrame says what to do with a frame from the guest. As the stack acts
// for every address there is, it would answer pings and ARP for all of them:
// it gets neither unless they are for its own two.
func judgeFrame(frame []byte) verdict {
	if len(frame) < header.EthernetMinimumSize {
		return drop
	}
	payload := frame[header.EthernetMinimumSize:]
	switch header.Ethernet(frame).Type() {
	case header.ARPProtocolNumber:
		h := header.ARP(payload)
		if h.IsValid() && h.Op() == header.ARPRequest && isOwn(tcpip.AddrFrom4Slice(h.ProtocolAddressTarget())) {
			return deliver
		}
		return drop
	case header.IPv4ProtocolNumber:
		h := header.IPv4(payload)
		if !h.IsValid(len(payload)) || netipAddr(h.SourceAddress()) != guestAddr {
			return drop
		}
		dst := h.DestinationAddress()
		if header.IsV4MulticastAddress(dst) || dst == header.IPv4Broadcast {
			return drop
		}
		if h.TransportProtocol() != header.ICMPv4ProtocolNumber || isOwn(dst) {
			return deliver
		}
		// Fragments of pings aren't worth putting together.
		if h.More() || h.FragmentOffset() != 0 || h.PayloadLength() < header.ICMPv4MinimumSize {
			return drop
		}
		if header.ICMPv4(h.Payload()).Type() == header.ICMPv4Echo {
			return forwardPing
		}
		// Errors that the guest reports about packets it was sent.
		return deliver
	}
	return drop
}

func isOwn(a tcpip.Address) bool {
	addr := netipAddr(a)
	return addr == gatewayAddr || addr == hostAddr
}

// send writes the stack's packets to w until ctx is done or a write fails.
func (n *Network) send(ctx context.Context, w io.Writer) error {
	pkts := make([]*stack.PacketBuffer, 0, sendBatch)
	lengths := make([]byte, 4*sendBatch)
	var bufs net.Buffers
	for {
		pkt := n.link.ReadContext(ctx)
		if pkt == nil {
			return nil
		}
		pkts, bufs = pkts[:0], bufs[:0]
		for pkt != nil {
			length := lengths[4*len(pkts):][:4]
			binary.BigEndian.PutUint32(length, uint32(pkt.Size()))
			bufs = append(bufs, length)
			bufs = append(bufs, pkt.AsSlices()...)
			if pkts = append(pkts, pkt); len(pkts) == sendBatch {
				break
			}
			pkt = n.link.Read()
		}
		rest := bufs // WriteTo consumes its receiver
		_, err := rest.WriteTo(w)
		for _, p := range pkts {
			p.DecRef()
		}
		if err != nil {
			return fmt.Errorf("write to the machine's network card: %w", err)
		}
	}
}
