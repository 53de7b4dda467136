package sshd

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Of many thousands of attempts few are carried out, and little is logged and remembered. Others get in meanwhile, and
// the source itself when its time is over.
func TestManyAttempts(t *testing.T) {
	ts := newTestServer(t)
	start := time.Now()
	var in atomic.Int64
	ts.mustDial("box").Close()
	before := usageNow(t)
	wrong := memoryKey(t)
	attempt := func(n int) {
		for range n {
			c, err := ts.dial("box", wrong)
			if err == nil {
				in.Add(1)
				c.Close()
			}
		}
	}
	attempt(10)
	var attempts sync.WaitGroup
	for range 8 {
		attempts.Go(func() { attempt(500) })
	}
	attempts.Go(func() {
		for range 20 {
			config := clientConfig("box", ts.signer)
			conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).Dial("tcp", ts.addr)
			if err != nil {
				t.Error(err)
				return
			}
			c, channels, requests, err := ssh.NewClientConn(conn, ts.addr, config)
			if err != nil {
				t.Errorf("a good key from elsewhere: %v", err)
				conn.Close()
				return
			}
			ssh.NewClient(c, channels, requests).Close()
		}
	})
	attempts.Wait()
	if n := in.Load(); n != 0 {
		t.Errorf("%d were let in", n)
	}
	for { // the source is barred, unless its time has just passed
		c, err := ts.dial("box", ts.signer)
		if err != nil {
			break
		}
		c.Close()
		attempt(1)
	}
	awaitUsage(t, before)
	ts.checkLog()
	log := ts.logged.String()
	most := 150 + int(time.Since(start).Seconds())
	if n := strings.Count(log, "level=INFO") + strings.Count(log, "level=WARN"); n > most || !strings.Contains(log, "source=127.0.0.1/32") {
		t.Errorf("%d lines: %.10000s", n, log)
	}
	// Its penalties have passed.
	ts.gate.mu.Lock()
	if src := ts.gate.sources[sourceOf(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})]; src != nil {
		src.until = time.Now()
	}
	ts.gate.mu.Unlock()
	ts.mustDial("box")
}

// A thousand clients that connect and do nothing are in nobody's way, and end when their time is up.
func TestIdleStrangers(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.handshakeTimeout = time.Hour; s.gate.burst = time.Hour })
	ts.mustDial("box").Close()
	before := usageNow(t)
	for _, begun := range []string{"", "SSH-2", "SSH-2.0-x\r\n", "SSH-2.0-x\r\n\x00\x00\x01\x00\x08\x14"} {
		var conns []net.Conn
		for range 250 {
			conn, err := net.Dial("tcp", ts.addr)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
			io.WriteString(conn, begun)
		}
		c, err := ts.dial("box", ts.signer)
		if err != nil {
			t.Fatalf("%q: %v", begun, err)
		}
		c.Close()
		ts.gate.mu.Lock()
		if n := len(ts.gate.open); n > ts.gate.maxPerSource {
			t.Errorf("%d wait for one source", n)
		}
		ts.gate.mu.Unlock()
		for _, conn := range conns {
			conn.Close()
		}
		awaitUsage(t, before)
	}
}

// A server that has no file left for a connection goes on when there are some again.
func TestNoFilesLeft(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = time.Hour })
	ts.mustDial("box").Close()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = uint64(openFiles(t) + 20)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	var conns []net.Conn
	for {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			if !errors.Is(err, syscall.EMFILE) {
				t.Error(err)
			}
			break
		}
		conns = append(conns, conn)
	}
	for !strings.Contains(ts.logged.String(), "can't accept an SSH connection") {
		// The server has the last file, or it is free again: take it.
		if conn, err := net.Dial("tcp", ts.addr); err == nil {
			conns = append(conns, conn)
		}
		time.Sleep(time.Millisecond)
	}
	for _, conn := range conns {
		conn.Close()
	}
	// The server may take in those first, and have all the files that were theirs.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	c, err := ts.dial("box", ts.signer)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
