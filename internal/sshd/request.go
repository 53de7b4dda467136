package sshd

import (
	"errors"
	"fmt"
	"math"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// Requests come from whoever is connected: the functions below turn their payloads (RFC 4254, and
// OpenSSH's PROTOCOL) into values that are safe to use.

// Limits of the environment that a client can set.
const (
	maxEnv       = 128      // variables
	maxEnvLength = 32 << 10 // bytes, of NAME=VALUE
)

var (
	termRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

	envRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

	// harmlessRE matches the variables that tell of the client's language and terminal. Others
	// might make a command that a key is bound to do something else.
	harmlessRE = regexp.MustCompile(`^(LANG|LANGUAGE|LC_[A-Za-z0-9_]+|COLORTERM|NO_COLOR|TERM_PROGRAM|TERM_PROGRAM_VERSION)$`)
)

// signals are the names that RFC 4254 has for signals.
var signals = []string{"ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2"}

func parsePTY(payload []byte) (shed.TTY, error) {
	var m struct {
		Term                      string
		Cols, Rows, Width, Height uint32
		Modes                     string
	}
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.TTY{}, err
	}
	if m.Term == "" {
		m.Term = "dumb"
	}
	if !termRE.MatchString(m.Term) {
		return shed.TTY{}, fmt.Errorf("%.40q is no type of a terminal", m.Term)
	}
	return shed.TTY{Term: m.Term, Size: size(m.Rows, m.Cols)}, nil
}

func parseWindowChange(payload []byte) (shed.Size, error) {
	var m struct{ Cols, Rows, Width, Height uint32 }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.Size{}, err
	}
	return size(m.Rows, m.Cols), nil
}

func size(rows, cols uint32) shed.Size {
	return shed.Size{Rows: uint16(min(rows, math.MaxUint16)), Cols: uint16(min(cols, math.MaxUint16))}
}

// parseEnv returns NAME=VALUE. With harmless, not every name will do.
func parseEnv(payload []byte, harmless bool) (string, error) {
	var m struct{ Name, Value string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", err
	}
	if !envRE.MatchString(m.Name) || harmless && !harmlessRE.MatchString(m.Name) {
		return "", fmt.Errorf("the client can't set the variable %.40q", m.Name)
	}
	v := m.Name + "=" + m.Value
	if len(v) > maxEnvLength || strings.ContainsRune(v, 0) || !utf8.ValidString(v) {
		return "", fmt.Errorf("the value of %.40q is too long, has a NUL or is not UTF-8", m.Name)
	}
	return v, nil
}

func parseSignal(payload []byte) (string, error) {
	var m struct{ Name string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", err
	}
	if !slices.Contains(signals, m.Name) {
		return "", fmt.Errorf("%.40q is no signal", m.Name)
	}
	return m.Name, nil
}

func parseExec(payload []byte) (shed.Command, error) {
	var m struct{ Script string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.Command{}, err
	}
	if strings.ContainsRune(m.Script, 0) {
		return shed.Command{}, errors.New("the command has a NUL")
	}
	if m.Script == "" {
		// A shell runs this to the same effect: none. An empty Script would mean that there is no command.
		m.Script = " "
	}
	return shed.Command{Script: m.Script}, nil
}

// parseSubsystem accepts the subsystem that every shed has.
func parseSubsystem(payload []byte) (shed.Command, error) {
	var m struct{ Name string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.Command{}, err
	}
	if m.Name != shed.SubsystemSFTP {
		return shed.Command{}, fmt.Errorf("there is no subsystem %.40q", m.Name)
	}
	return shed.Command{Subsystem: m.Name}, nil
}

// hostPort is where a client wants to be connected, or to listen.
type hostPort struct {
	host string
	port uint32
}

// endpoint returns h as an address in a shed.
func (h hostPort) endpoint() shed.Endpoint {
	return shed.Endpoint{Network: "tcp", Address: net.JoinHostPort(h.host, strconv.FormatUint(uint64(h.port), 10))}
}

// parseHostPort is the reverse of endpoint.
func parseHostPort(address string) (hostPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return hostPort{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return hostPort{}, err
	}
	return hostPort{host, uint32(n)}, nil
}

// tcpChannel is the payload of channels of the types direct-tcpip and forwarded-tcpip.
type tcpChannel struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// parseDirectTCP returns where to connect for a channel of type direct-tcpip.
func parseDirectTCP(payload []byte) (hostPort, error) {
	var m tcpChannel
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return hostPort{}, err
	}
	if m.Host == "" || m.Port == 0 || m.Port > math.MaxUint16 {
		return hostPort{}, fmt.Errorf("%.80q, port %d, is no address", m.Host, m.Port)
	}
	h := hostPort{m.Host, m.Port}
	return h, h.endpoint().Validate()
}

// parseDirectUnix returns the socket to connect to for a channel of type direct-streamlocal@openssh.com.
func parseDirectUnix(payload []byte) (shed.Endpoint, error) {
	var m struct {
		Path      string
		Reserved1 string
		Reserved2 uint32
	}
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.Endpoint{}, err
	}
	return unixEndpoint(m.Path)
}

// parseListenTCP returns where to listen, or to listen no longer. The port can be 0.
func parseListenTCP(payload []byte) (hostPort, error) {
	var m struct {
		Host string
		Port uint32
	}
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return hostPort{}, err
	}
	if m.Port > math.MaxUint16 {
		return hostPort{}, fmt.Errorf("there is no port %d", m.Port)
	}
	h := hostPort{m.Host, m.Port}
	return h, h.endpoint().Validate()
}

// listenEndpoint returns h as an address to listen on.
func (h hostPort) listenEndpoint() shed.Endpoint {
	if h.host == "*" {
		h.host = ""
	}
	return h.endpoint()
}

// parseListenUnix returns the socket to listen on, or to listen on no longer.
func parseListenUnix(payload []byte) (shed.Endpoint, error) {
	var m struct{ Path string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return shed.Endpoint{}, err
	}
	return unixEndpoint(m.Path)
}

func unixEndpoint(path string) (shed.Endpoint, error) {
	e := shed.Endpoint{Network: "unix", Address: path}
	if path == "" {
		return e, errors.New("the path of a socket is missing")
	}
	return e, e.Validate()
}
