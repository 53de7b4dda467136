package main

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
)

// swallowing returns a port of 127.0.0.1 where nothing takes connections, nor refuses them.
func swallowing(t *testing.T) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	addr, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := addr.(*syscall.SockaddrInet4).Port
	for {
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 500*time.Millisecond)
		if timeout := (net.Error)(nil); errors.As(err, &timeout) && timeout.Timeout() {
			return port // its queue is full
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
	}
}

// A server that was silent the last time is waited for less, but not one that only takes long to answer.
func TestAbsent(t *testing.T) {
	slow, err := net.Listen("tcp", "127.0.0.1:0") // it takes the connection, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	t.Setenv("HOME", t.TempDir())
	t.Setenv("PATH", t.TempDir()) // with no ssh to be asked first
	a, _ := serveTwo(t, fmt.Sprintf("  off: {host: 127.0.0.1, ssh_port: %d}\n  slow: {host: 127.0.0.1, ssh_port: %d}\n",
		swallowing(t), slow.Addr().(*net.TCPAddr).Port))
	a.Add(shed.Shed{Name: "web"})
	list := func() string {
		t.Helper()
		code, stdout, stderr := shedCLI("list", "--all")
		if code != 0 || !strings.Contains(stdout, "\nweb ") || !strings.Contains(stderr, "slow is offline: no answer within 3s\n") {
			t.Errorf("%d, %s, %s", code, stdout, stderr)
		}
		return stderr
	}
	if said := list(); !strings.Contains(said, "off is offline: no answer within 3s\n") {
		t.Errorf("at first: %s", said)
	}
	const want = "off is offline: no connection within 1.5s, and no answer the last time either\n"
	for end := time.Now().Add(time.Minute); ; { // it isn't given up where the machine is too busy to begin in time
		said := list()
		if strings.Contains(said, want) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("then: %s", said)
		}
	}
}
