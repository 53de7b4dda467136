// Package vm is what shed asks of a machine monitor: a Driver turns a Spec
// into a running Machine. Images, exec, sessions and disks are nothing that a driver knows of.
package vm

import (
	"context"
	"errors"
	"net"
)

// Spec describes a machine: plain data, the same for every driver.
type Spec struct {
	CPUs     int    `json:"cpus"`
	MemoryMB int    `json:"memory_mb"`
	Kernel   string `json:"kernel"` // absolute path of an uncompressed kernel or a bzImage
	Initrd   string `json:"initrd"` // absolute path
	Disks    []Disk `json:"disks"`  // vda, vdb, ... in this order
	MAC      string `json:"mac"`    // of the only network card; "" means none
	Console  string `json:"console"`
}

// Disk is a raw image that becomes a block device.
type Disk struct {
	Path     string `json:"path"` // absolute
	ReadOnly bool   `json:"read_only,omitempty"`
}

// Features says how a driver's machines differ from those of others.
type Features struct {
	MaxDisks int // how many a machine can have
}

// Driver runs machines with one machine monitor. Each machine has a
// directory of its own, where the driver keeps its sockets and its records.
// A machine outlives the process that started it.
type Driver interface {
	Features() Features

	// Start starts a machine and returns when its devices can be connected to. An
	// error carries what the monitor said. dir exists. Where a machine runs in it already, that is an
	// error, and that one is left alone. A caller that is killed meanwhile leaves a
	// machine that Find finds, or none.
	//
	// An orderly shutdown of the host doesn't end the machine, but for the final SIGKILL: who started it
	// has the time to have the guest turn itself off.
	Start(ctx context.Context, dir string, spec Spec) (Machine, error)

	// Find returns the machine that runs in dir, or ErrNotRunning. It does not wait for a
	// monitor that doesn't answer: such a machine can be killed.
	Find(ctx context.Context, dir string) (Machine, error)

	// Running says whether a machine runs in dir, without connecting to it. An error says neither.
	Running(dir string) (bool, error)
}

// ErrNotRunning is returned by Driver.Find where no machine runs.
var ErrNotRunning = errors.New("no machine runs there")

// ErrLinkClosed is returned by Machine.DialLink where the guest has closed its end of the link, and not
// opened it again: its agent has ended.
var ErrLinkClosed = errors.New("the guest has closed its end of the link")

// Machine is a running machine. Its methods may be called concurrently.
type Machine interface {
	// DialLink connects to the stream that the guest's agent listens on. There is
	// one such stream: a new connection takes it over from one that is gone. It may be made
	// before the guest opens its end, and is closed when the guest closes that.
	DialLink(ctx context.Context) (net.Conn, error)

	// DialNetwork connects to the machine's network card. The connection carries Ethernet frames,
	// each after its length in 4 bytes, big-endian.
	DialNetwork(ctx context.Context) (net.Conn, error)

	// Wait returns when the machine has ended or ctx is done. It may be called again.
	Wait(ctx context.Context) (Exit, error)

	// Kill ends the machine at once, as a power cut does, and waits for its end. Killing
	// one that has ended is no error.
	Kill() error
}

// Cause is why a machine ended.
type Cause string

const (
	PowerOff Cause = "power-off" // the guest turned itself off
	Reboot   Cause = "reboot"    // the guest asked to be started again
	Panic    Cause = "panic"     // the guest's kernel gave up
	Killed   Cause = "killed"    // Kill, or a signal to the monitor
	Failed   Cause = "failed"    // the monitor ended by itself
)

// Exit is how a machine ended.
type Exit struct {
	Cause  Cause  `json:"cause"`
	Detail string `json:"detail,omitempty"` // what the monitor said, for Failed and Killed
}
