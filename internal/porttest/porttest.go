// Package porttest has ports for tests that don't listen on them at once.
package porttest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
)

// The ports that Unused takes from. The kernel gives none of them to whoever asks for any, nor to outgoing
// connections, so that a port stays free until the test listens on it.
const (
	first = 10_000
	last  = 32_767
)

var (
	base = rand.Uint32() // of this process: others take theirs at the same time
	seen atomic.Uint32
)

// Unused returns a port of localhost that nobody listens on, another one each time.
func Unused() (int, error) {
	for range last - first {
		port := first + int((base+seen.Add(1))%(last-first+1))
		free, err := unused(port)
		if err != nil {
			return 0, err
		}
		if free {
			return port, nil
		}
	}
	return 0, fmt.Errorf("none of the ports from %d to %d is free", first, last)
}

func unused(port int) (bool, error) {
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if errors.Is(err, syscall.EADDRINUSE) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer l.Close()
	l, err = net.Listen("tcp6", net.JoinHostPort("::1", strconv.Itoa(port)))
	if err == nil {
		defer l.Close()
	}
	return !errors.Is(err, syscall.EADDRINUSE), nil // any other error: there is no IPv6 here
}
