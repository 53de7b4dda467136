// Package tunnel forwards ports of this machine's loopback into sheds: the ports and the profiles that
// name them, the record of which process forwards what, and the forwarding.
package tunnel

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/charliek/shed"
)

const maxPort = 65535

// Port is a port of this machine and the one of a shed's own localhost that it leads to.
type Port struct {
	Local  int `json:"local" yaml:"local"` // 0 is any that is free
	Remote int `json:"remote" yaml:"remote"`
}

func (p Port) String() string { return fmt.Sprintf("%d:%d", p.Local, p.Remote) }

// ParsePort reads LOCAL[:REMOTE]. Without REMOTE it is the same as LOCAL.
func ParsePort(s string) (Port, error) {
	local, remote, both := strings.Cut(s, ":")
	if !both {
		remote = local
	}
	var p Port
	var err error
	if p.Local, err = parseNumber(local); err == nil {
		p.Remote, err = parseNumber(remote)
	}
	if err != nil {
		return Port{}, shed.Errorf(shed.CodeInvalid, "%.80q is no port to forward", s).
			WithHint("write LOCAL or LOCAL:REMOTE, such as 3000 or 8080:80")
	}
	return p, p.check()
}

func parseNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err
}

func (p Port) check() error {
	if p.Local < 0 || p.Local > maxPort {
		return shed.Errorf(shed.CodeInvalid, "there is no local port %d", p.Local).
			WithHint("ports go from 1 to %d; 0 is any that is free", maxPort)
	}
	if p.Remote < 1 || p.Remote > maxPort {
		return shed.Errorf(shed.CodeInvalid, "there is no port %d in a shed", p.Remote).
			WithHint("ports go from 1 to %d", maxPort)
	}
	return nil
}

// CheckPorts returns an Error with CodeInvalid unless ports can be forwarded by one tunnel.
func CheckPorts(ports []Port) error {
	seen := map[int]Port{}
	for _, p := range ports {
		if err := p.check(); err != nil {
			return err
		}
		if other, ok := seen[p.Local]; ok && p.Local != 0 {
			return shed.Errorf(shed.CodeInvalid, "the local port %d is there twice: as %v and as %v", p.Local, other, p).
				WithHint("give each its own local port")
		}
		seen[p.Local] = p
	}
	return nil
}

// Mode says where the process of a tunnel is.
type Mode string

const (
	Foreground Mode = "foreground" // in a terminal
	Background Mode = "background" // detached
)

// Record is what is kept of a tunnel: of one process that forwards ports to one shed.
type Record struct {
	PID    int       `json:"pid"`
	Shed   string    `json:"shed"`
	Server string    `json:"server"` // as the client calls it
	Ports  []Port    `json:"ports"`
	Mode   Mode      `json:"mode"`
	Log    string    `json:"log,omitempty"` // file with what the process says
	Since  time.Time `json:"since"`
}

// Forwards says for people what each port leads to: "localhost:3000 -> web:3000".
func (r Record) Forwards() []string {
	var forwards []string
	for _, p := range r.Ports {
		forwards = append(forwards, fmt.Sprintf("localhost:%d -> %s:%d", p.Local, r.Shed, p.Remote))
	}
	return forwards
}

// String names the tunnel for people.
func (r Record) String() string { return strings.Join(r.Forwards(), ", ") }

// does says whether the tunnel does all of what another one is to do.
func (r Record) does(other Record) bool {
	return r.Shed == other.Shed && r.Server == other.Server &&
		!slices.ContainsFunc(other.Ports, func(p Port) bool { return p.Local == 0 || !slices.Contains(r.Ports, p) })
}

// clash returns a local port that both tunnels need.
func (r Record) clash(other Record) (port int, ok bool) {
	for _, p := range other.Ports {
		if p.Local != 0 && slices.ContainsFunc(r.Ports, func(q Port) bool { return q.Local == p.Local }) {
			return p.Local, true
		}
	}
	return 0, false
}

// State says what becomes of a connection to a tunnel.
type State string

const (
	Up           State = "up"
	Reconnecting State = "reconnecting" // the server doesn't answer: a connection waits a while
	Refusing     State = "refusing"     // the shed is stopped, or isn't there: a connection is closed at once
	Silent       State = "silent"       // the tunnel's process doesn't say
)

// Status is how a tunnel is doing, as seen when it was asked.
type Status struct {
	State       State  `json:"status"`
	Reason      string `json:"reason,omitempty"` // unless it is up
	Connections []int  `json:"connections"`      // open ones, of each of the record's ports
}
