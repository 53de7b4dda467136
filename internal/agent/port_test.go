//go:build linux

package agent

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A FIFO without a writer is at its end, as a port without a host is, until the next one comes.
func TestSerialPortWaitsForTheNextHost(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "port")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p := serialPort{file}
	type read struct {
		data string
		err  error
	}
	got := make(chan read)
	go func() {
		defer close(got)
		for {
			b := make([]byte, 10)
			n, err := p.Read(b)
			got <- read{string(b[:n]), err}
			if err != nil {
				return
			}
		}
	}()
	for _, host := range []string{"one", "two"} {
		time.Sleep(2 * hostPoll) // it is read while there is no host
		w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, host); err != nil {
			t.Fatal(err)
		}
		if r := <-got; r.data != host || r.err != nil {
			t.Errorf("read %q, %v; want %q", r.data, r.err, host)
		}
		w.Close()
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if r := <-got; !errors.Is(r.err, os.ErrDeadlineExceeded) {
		t.Errorf("after Close: %q, %v", r.data, r.err)
	}
}

func TestServePort(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	guest, host := os.NewFile(uintptr(fds[0]), "guest"), os.NewFile(uintptr(fds[1]), "host")
	defer host.Close()
	served := make(chan error, 1)
	go func() { served <- ServePort(guest, echo) }()
	for i := range 5 {
		// The host's end takes the place of one that has gone, too.
		if err := host.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		c := connectTo(t, serialPort{host}, i > 0)
		checkEcho(t, c, make([]byte, 1<<20))
		c.Close()
	}
	guest.Close()
	if err := <-served; !errors.Is(err, os.ErrClosed) {
		t.Errorf("ServePort: %v", err)
	}
}
