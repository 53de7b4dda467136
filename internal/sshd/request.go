package sshd

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

// Requests on a session channel come from whoever is connected: the functions
// below turn their payloads (RFC 4254, section 6) into values that are safe to use.

// Limits of the environment that a client can set.
const (
	maxEnv       = 64   // variables
	maxEnvLength = 4096 // bytes, of NAME=VALUE
)

var (
	termRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

	// envRE matches the variables that tell of the client's language and terminal.
	envRE = regexp.MustCompile(`^(LANG|LANGUAGE|LC_[A-Za-z0-9_]+|COLORTERM|NO_COLOR|TERM_PROGRAM|TERM_PROGRAM_VERSION)$`)
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

// parseEnv returns NAME=VALUE.
func parseEnv(payload []byte) (string, error) {
	var m struct{ Name, Value string }
	if err := ssh.Unmarshal(payload, &m); err != nil {
		return "", err
	}
	if !envRE.MatchString(m.Name) {
		return "", fmt.Errorf("clients can't set the variable %.40q", m.Name)
	}
	v := m.Name + "=" + m.Value
	if len(v) > maxEnvLength || strings.ContainsRune(v, 0) {
		return "", fmt.Errorf("the value of %.40q is too long or has a NUL", m.Name)
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
