// Package guest is what runs inside the machines that vmtest boots, and the
// words that the suite and it have for each other.
package guest

import "time"

// Request is the first message on a stream of the link, in the form of the agent's.
type Request struct {
	Op     string `json:"op"`
	Disk   string `json:"disk,omitempty"` // "vda"
	Offset int64  `json:"offset,omitempty"`
	Length int    `json:"length,omitempty"`
	Data   []byte `json:"data,omitempty"`
}

// What can be asked for. The machine ends after PowerOff, Reboot and Panic, most
// often before there is a reply.
const (
	Look     = "look"      // Facts
	Read     = "read"      // Length bytes of Disk from Offset on
	Write    = "write"     // Data to Disk at Offset, so that it is on the disk
	Echo     = "echo"      // after the reply, what comes on the stream goes back on it
	Frames   = "frames"    // from the reply on, frames of EtherType are answered with themselves
	Log      = "log"       // Data to the console
	Leave    = "leave"     // the guest's end of the link is closed, without a reply
	PowerOff = "power-off" //
	Reboot   = "reboot"    //
	Panic    = "panic"     // of the kernel
)

// EtherType is one of those set aside for experiments (IEEE Std 802).
const EtherType = 0x88b5

// Reply answers a Request.
type Reply struct {
	Error string `json:"error,omitempty"`
	Data  []byte `json:"data,omitempty"`
	Facts Facts  `json:"facts"`
}

// Facts is what the guest sees of its machine.
type Facts struct {
	BootID   string        `json:"boot_id"` // another one after every boot
	Clock    time.Duration `json:"clock"`   // that goes on steadily, from some time on
	CPUs     int           `json:"cpus"`
	MemoryMB int           `json:"memory_mb"` // without what the kernel itself takes
	MACs     []string      `json:"macs"`      // of all network cards
	Disks    []Disk        `json:"disks"`     // in the order of their names
}

// Disk is a block device.
type Disk struct {
	Name     string `json:"name"`
	Size     int64  `json:"size"` // bytes
	ReadOnly bool   `json:"read_only"`
}
