package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// hostPoll is how often a port without a host is looked at.
const hostPoll = 20 * time.Millisecond

// portPoll is how often a port that isn't there yet is looked for.
const portPoll = 2 * time.Millisecond

// OpenPort opens the virtio-serial port called name, which the guest's kernel may only be
// about to find: it looks for it until timeout has passed. The port is opened as ServePort wants it.
func OpenPort(name string, timeout time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(portPoll) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, file := range names {
			b, err := os.ReadFile(file)
			if err != nil || strings.TrimSpace(string(b)) != name {
				continue
			}
			// Non-blocking, so that the runtime polls it and deadlines work.
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR|syscall.O_NONBLOCK, 0)
			if err == nil {
				return f, nil
			}
		}
	}
	return nil, fmt.Errorf("no port named %q came up in %v", name, timeout)
}

// ServePort answers one host after the other on a guest's virtio-serial port, which was
// opened with O_NONBLOCK: it calls handle, in a goroutine of its own, with each stream that a host
// opens. It returns when the port fails or is closed.
func ServePort(file *os.File, handle func(*Stream)) error {
	p := serialPort{file}
	r := bufio.NewReaderSize(p, 64<<10)
	for {
		file.SetDeadline(time.Time{}) // where this fails, so does the first read
		session, err := accept(p, r)
		if err != nil {
			return fmt.Errorf("the link to the host: %w", err)
		}
		for {
			s, err := session.AcceptStream()
			if err != nil {
				break
			}
			go handle(s)
		}
		session.Close()
	}
}

// serialPort is a port as the connection that a session needs. Closing it only
// interrupts who uses it: the next session gets the same port.
type serialPort struct{ *os.File }

// Read waits where the port has no host. That is no end of a session, nor of a
// handshake: the kernel may say so of the last host when the next is being served already. A
// host that takes over ends the session of the one before.
func (p serialPort) Read(b []byte) (int, error) {
	for {
		n, err := p.File.Read(b)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		time.Sleep(hostPoll)
	}
}

func (p serialPort) Close() error         { return p.SetDeadline(time.Unix(1, 0)) }
func (p serialPort) LocalAddr() net.Addr  { return portAddr(p.Name()) }
func (p serialPort) RemoteAddr() net.Addr { return portAddr("host") }

type portAddr string

func (portAddr) Network() string  { return "virtio" }
func (a portAddr) String() string { return string(a) }
