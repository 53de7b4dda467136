package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

var testNonce = bytes.Repeat([]byte("n"), nonceLen)

func TestConnect(t *testing.T) {
	host, guest := socketPair(t)
	serveGuest(t, guest, echo)
	c := connectTo(t, host, false)
	checkEcho(t, c, []byte("hello"))
	checkEcho(t, c, nil)
	select {
	case <-c.Done():
		t.Error("Done is closed while the link is up")
	default:
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	<-c.Done()
	if _, err := c.Open(t.Context()); err == nil {
		t.Error("a closed link opens streams")
	}
}

// garbage is what an earlier session may have left in a port.
var garbage = map[string]string{
	"nothing":                "",
	"text":                   "some words\n",
	"the first byte":         "\xff",
	"many of them":           strings.Repeat("\xff", 100),
	"padding":                strings.Repeat("\xfe", resyncLen),
	"half a hello":           helloMagic + "1234",
	"half an ack":            ackMagic + "12345678901234",
	"half a start":           startMagic,
	"a hello of another":     string(message(helloMagic, testNonce)),
	"an ack of another":      string(message(ackMagic, testNonce)),
	"a start of another":     string(message(startMagic, testNonce)),
	"a whole handshake":      string(message(helloMagic, testNonce)) + string(message(startMagic, testNonce)),
	"a message cut off last": string(message(ackMagic, testNonce)[:messageLen-1]),
}

func TestConnectSkipsGarbage(t *testing.T) {
	for name, g := range garbage {
		for _, resync := range []bool{false, true} {
			if name == "a whole handshake" && !resync {
				continue // it begins a session, which only a resynchronisation ends
			}
			t.Run(fmt.Sprintf("%s/resync=%v", name, resync), func(t *testing.T) {
				host, guest := socketPair(t)
				var wg sync.WaitGroup
				wg.Go(func() { io.WriteString(host, g) })
				wg.Go(func() { io.WriteString(guest, g) })
				if len(g) < 1<<10 {
					wg.Wait() // it is all there before the handshake begins
				}
				serveGuest(t, guest, echo)
				wg.Wait()
				checkEcho(t, connectTo(t, host, resync), []byte("hello"))
			})
		}
	}
}

// A host waits for a guest that boots, and its many greetings are answered once.
func TestConnectWaitsForALateAgent(t *testing.T) {
	host, guest := socketPair(t)
	connected := make(chan *Client, 1)
	go func() {
		c, err := Connect(context.Background(), host, false)
		if err != nil {
			t.Error(err)
		}
		connected <- c
	}()
	hellos := make([]byte, 5*messageLen)
	if _, err := io.ReadFull(guest, hellos); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 5; i++ {
		if !bytes.Equal(hellos[:messageLen], hellos[i*messageLen:(i+1)*messageLen]) {
			t.Fatalf("greeting %d is not the first one again", i)
		}
	}
	serveGuest(t, guest, echo)
	c := <-connected
	if c == nil {
		t.FailNow()
	}
	defer c.Close()
	checkEcho(t, c, []byte("hello"))
}

func TestConnectEndsWithItsContext(t *testing.T) {
	for _, resync := range []bool{false, true} {
		host, guest := net.Pipe()
		defer guest.Close()
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error, 1)
		go func() {
			_, err := Connect(ctx, host, resync)
			got <- err
		}()
		if _, err := guest.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want context.Canceled", err)
		}
		if _, err := host.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("writing to the connection: %v, want it to be closed", err)
		}
	}
}

func TestConnectSaysThatTheConnectionBroke(t *testing.T) {
	host, guest := socketPair(t)
	guest.Close()
	if _, err := Connect(t.Context(), host, false); err == nil || !strings.Contains(err.Error(), "the link to the agent") {
		t.Errorf("error %v", err)
	}
}

func TestConnectRefusesVersionZero(t *testing.T) {
	host, guest := socketPair(t)
	go func() {
		r := bufio.NewReader(guest)
		_, nonce, _, err := readMessage(r, helloMagic)
		if err != nil {
			return
		}
		ack := message(ackMagic, nonce)
		binary.BigEndian.PutUint32(ack[magicLen+nonceLen:], 0)
		guest.Write(ack)
		io.Copy(io.Discard, r)
	}()
	if _, err := Connect(t.Context(), host, false); err == nil || !strings.Contains(err.Error(), "version 0") {
		t.Errorf("error %v", err)
	}
}

func TestAcceptAcknowledgesANonceOnce(t *testing.T) {
	host, guest := socketPair(t)
	serveGuest(t, guest, echo)
	other := bytes.Repeat([]byte("o"), nonceLen)
	for _, m := range [][]byte{
		message(startMagic, testNonce), // of nobody that was greeted
		message(helloMagic, testNonce), message(helloMagic, testNonce), message(helloMagic, testNonce),
		message(helloMagic, other), message(helloMagic, other),
		message(startMagic, testNonce), // of a host that has been replaced
		message(startMagic, other),
	} {
		if _, err := host.Write(m); err != nil {
			t.Fatal(err)
		}
	}
	r := bufio.NewReader(host)
	for _, want := range [][]byte{message(ackMagic, testNonce), message(ackMagic, other)} {
		got := make([]byte, messageLen)
		if _, err := io.ReadFull(r, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	s, err := yamux.Client(&port{Conn: host, r: r}, sessionConfig(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &Client{session: s}
	defer c.Close()
	checkEcho(t, c, []byte("hello"))
}

// A guest that still writes to a host that is gone doesn't read: the next host has
// to read while it writes.
func TestResyncReadsWhileItWrites(t *testing.T) {
	host, guest := net.Pipe() // no buffer at all
	serveGuest(t, guest, echo)
	w := wire{host}
	if _, err := w.attach().Write(message(helloMagic, testNonce)); err != nil {
		t.Fatal(err)
	}
	c := connectTo(t, w.attach(), true)
	checkEcho(t, c, bytes.Repeat([]byte("hello"), 100_000))
}

// A host may go away at any byte of what it sends.
func TestResyncAtEveryPlaceInAFrame(t *testing.T) {
	host, guest := socketPair(t)
	serveGuest(t, guest, echo)
	w := wire{host}
	// A data frame of the greatest length for stream 1, which it opens: yamux's
	// version, type, flags, stream, length.
	frame := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 1, 0, 0, 0, 1}, maxMessage-sessionHeader)
	frame = append(frame, bytes.Repeat([]byte("x"), maxMessage-sessionHeader)...)
	for _, cut := range []int{0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 1000, len(frame) - 1, len(frame)} {
		end := w.attach()
		r := bufio.NewReader(end)
		if err := connect(end, r, true); err != nil {
			t.Fatal(err)
		}
		if _, err := end.Write(frame[:cut]); err != nil {
			t.Fatal(err)
		}
		end.Close()
	}
	checkEcho(t, connectTo(t, w.attach(), true), []byte("hello"))
}

// Hosts are replaced while data goes both ways.
func TestResyncUnderLoad(t *testing.T) {
	host, guest := socketPair(t)
	var active atomic.Int64
	serveGuest(t, guest, func(s *Stream) {
		active.Add(1)
		defer active.Add(-1)
		echo(s)
	})
	w := wire{host}
	const rounds, streams = 20, 8
	data := bytes.Repeat([]byte("\xffshed\xfe"), 50_000)
	for round := range rounds {
		end := w.attach()
		c := connectTo(t, end, round > 0)
		checkEcho(t, c, data)
		var wg sync.WaitGroup
		for range streams {
			s := open(t, c)
			wg.Go(func() {
				for {
					if _, err := s.Write(data); err != nil {
						return
					}
				}
			})
			wg.Go(func() {
				// Not all are read: the guest's writes get stuck.
				io.CopyN(io.Discard, s, rand.Int64N(1<<20))
			})
		}
		time.Sleep(time.Duration(rand.IntN(5_000)) * time.Microsecond)
		end.Close()
		c.Close()
		wg.Wait()
	}
	c := connectTo(t, w.attach(), true)
	checkEcho(t, c, data)
	for active.Load() != 0 { // the streams of hosts that are gone
		time.Sleep(time.Millisecond)
	}
}

// A guest that opens streams itself is refused, and the host's go on.
func TestGuestOpensNoStreams(t *testing.T) {
	host, guest := socketPair(t)
	sessions := make(chan *yamux.Session, 1)
	go func() {
		s, err := accept(guest, bufio.NewReader(guest))
		if err != nil {
			t.Error(err)
		}
		sessions <- s
	}()
	c := connectTo(t, host, false)
	session := <-sessions
	if session == nil {
		t.FailNow()
	}
	defer session.Close()
	for range 3 {
		s, err := session.OpenStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n, err := s.Write(make([]byte, 64<<20)); !errors.Is(err, yamux.ErrStreamReset) {
			t.Errorf("the host took %d bytes: %v", n, err)
		}
	}
	go func() {
		if s, err := session.AcceptStream(); err == nil {
			echo(s)
		}
	}()
	checkEcho(t, c, []byte("hello"))
}

func TestManyStreams(t *testing.T) {
	host, guest := socketPair(t)
	serveGuest(t, guest, echo)
	c := connectTo(t, host, false)
	const streams = 1000
	errs := make(chan error, streams)
	for i := range streams {
		go func() {
			errs <- tryEcho(c, bytes.Repeat(fmt.Appendf(nil, "stream %d ", i), 1000))
		}()
	}
	for range streams {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// One stream that nobody reads doesn't hold up the others.
func TestStreamsDoNotWaitForEachOther(t *testing.T) {
	host, guest := socketPair(t)
	release := make(chan struct{})
	serveGuest(t, guest, func(s *Stream) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(s, first); err != nil {
			return
		}
		if first[0] == 'w' {
			<-release
		}
		echo(s)
	})
	c := connectTo(t, host, false)
	stuck := open(t, c)
	written := make(chan error, 1)
	data := bytes.Repeat([]byte("w"), 4<<20)
	go func() {
		_, err := stuck.Write(data)
		written <- err
	}()
	s := open(t, c)
	if _, err := s.Write([]byte("rest")); err != nil {
		t.Fatal(err)
	}
	s.CloseWrite()
	if got, err := io.ReadAll(s); err != nil || string(got) != "est" {
		t.Fatalf("%q, %v", got, err)
	}
	select {
	case err := <-written:
		t.Fatalf("4 MiB were written to a stream that nobody reads: %v", err)
	default:
	}
	close(release)
	if n, err := io.CopyN(io.Discard, stuck, int64(len(data)-1)); err != nil {
		t.Fatalf("after %d bytes: %v", n, err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

// FuzzReadMessage checks that no garbage hides the message after it, however it arrives.
func FuzzReadMessage(f *testing.F) {
	for _, g := range garbage {
		if len(g) < 1<<10 {
			f.Add([]byte(g))
		}
	}
	f.Fuzz(func(t *testing.T, prefix []byte) {
		nonce := bytes.Repeat([]byte{0x7f}, nonceLen)
		stream := append(bytes.Clone(prefix), message(ackMagic, nonce)...)
		for _, r := range []io.Reader{bytes.NewReader(stream), iotest.OneByteReader(bytes.NewReader(stream))} {
			br := bufio.NewReader(r)
			var last []byte
			for {
				magic, n, _, err := readMessage(br, helloMagic, ackMagic, startMagic)
				if err != nil {
					if !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
					break
				}
				last = append([]byte(magic), n...)
				if !bytes.Contains(stream, last) {
					t.Fatalf("%q was never sent", last)
				}
			}
			if want := message(ackMagic, nonce)[:magicLen+nonceLen]; !bytes.Equal(last, want) {
				t.Fatalf("the last message is %q, want %q", last, want)
			}
		}
	})
}
