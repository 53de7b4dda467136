//go:build linux || darwin

package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
)

// Claim is a tunnel of this process, whose ports are open and nobody else's.
type Claim struct {
	Record Record

	registry  *Registry
	file      *os.File // the record, with its lock
	status    net.Listener
	listeners [][]net.Listener // of each of the ports
}

// Claim opens the local ports of a tunnel and makes it known. The record that it keeps has this process, and
// the ports that any free one was asked for. If a tunnel does already what rec is to do, it is returned instead;
// CodeConflict if a port is taken. With replace, tunnels in the way are ended first.
func (r *Registry) Claim(ctx context.Context, rec Record, replace bool) (*Claim, *Record, error) {
	if err := CheckPorts(rec.Ports); err != nil {
		return nil, nil, err
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	live, err := r.live()
	if err != nil {
		return nil, nil, err
	}
	if replace {
		_, err = r.end(ctx, slices.DeleteFunc(live, func(other Record) bool {
			_, clash := other.clash(rec)
			return !clash
		}))
	} else {
		var running *Record
		if running, err = conflict(live, rec); running != nil {
			return nil, running, nil
		}
	}
	if err != nil {
		return nil, nil, err
	}
	c := &Claim{Record: rec, registry: r}
	c.Record.PID, c.Record.Since = os.Getpid(), time.Now().Truncate(time.Second)
	c.Record.Ports = slices.Clone(rec.Ports)
	if err := c.open(); err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c, nil, nil
}

// open opens the ports and then has the record say so. The registry is locked.
func (c *Claim) open() error {
	for i, p := range c.Record.Ports {
		opened, port, err := listen(p.Local)
		if err != nil {
			return err
		}
		c.listeners = append(c.listeners, opened)
		c.Record.Ports[i].Local = port
	}
	socket := c.registry.socket(c.Record.PID)
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) { // an earlier process had this pid
		return err
	}
	var err error
	if c.status, err = net.Listen("unix", socket); err != nil {
		return fmt.Errorf("the tunnel's socket: %w", err)
	}
	return c.write()
}

// write puts the record where others find it, with the lock held already. It isn't synced: when the
// machine has gone down, no tunnel is left, whatever the record says.
func (c *Claim) write() error {
	text, err := json.MarshalIndent(c.Record, "", "  ")
	if err != nil {
		return err
	}
	if c.file, err = os.CreateTemp(c.registry.dir, tempPrefix+"*"); err != nil {
		return err
	}
	if err := unix.Flock(int(c.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("the lock of the tunnel's record: %w", err)
	}
	if _, err := c.file.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("the tunnel's record: %w", err)
	}
	return os.Rename(c.file.Name(), c.registry.record(c.Record.PID))
}

// Close closes the ports and removes what the registry has of the tunnel.
func (c *Claim) Close() error {
	c.closeListeners()
	var err error
	if c.status != nil {
		c.status.Close()
	}
	if c.file != nil {
		os.Remove(c.file.Name()) // where it hasn't got its name yet
		err = c.registry.remove(c.Record.PID, c.Record.Log)
		c.file.Close()
		c.file = nil
	}
	return err
}

func (c *Claim) closeListeners() {
	for _, opened := range c.listeners {
		for _, l := range opened {
			l.Close()
		}
	}
}

// anyTries is how often a port is looked for that is free for IPv4 and for IPv6.
const anyTries = 20

// listen listens on a port of this machine's loopback, or on any that is free if it is 0: for IPv4, and
// for IPv6 where there is that.
func listen(port int) (opened []net.Listener, actual int, err error) {
	for range anyTries {
		opened, actual, err = listenBoth(port)
		if err == nil || port != 0 || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	if err == nil {
		return opened, actual, nil
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, 0, shed.Errorf(shed.CodeConflict, "local port %d is taken by another program: %w", port, err).
			WithHint("end that program, or take another port: -t LOCAL:REMOTE; 0 is any that is free")
	case errors.Is(err, fs.ErrPermission):
		return nil, 0, shed.Errorf(shed.CodeInvalid, "local port %d can't be opened: %w", port, err).
			WithHint("ports below 1024 may be root's alone here: take another one, such as -t %d:REMOTE", Suggest(port).Local)
	}
	return nil, 0, fmt.Errorf("local port %d can't be opened: %w", port, err)
}

func listenBoth(port int) ([]net.Listener, int, error) {
	v4, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, 0, err
	}
	port = v4.Addr().(*net.TCPAddr).Port
	// Where "localhost" is tried as IPv6 first, whoever listens there would get the connections.
	v6, err := net.Listen("tcp6", net.JoinHostPort("::1", strconv.Itoa(port)))
	switch {
	case err == nil:
		return []net.Listener{v4, v6}, port, nil
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, fs.ErrPermission):
		v4.Close()
		return nil, 0, err
	}
	return []net.Listener{v4}, port, nil // there is no IPv6 here
}
