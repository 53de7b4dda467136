// Package sshconfig writes the hosts by which OpenSSH and what is built on it reach sheds, and keeps
// them in a marked block of the user's configuration file, whose other bytes it leaves as they are.
//
// It edits text: nothing that the file includes or asks to be run is looked at.
package sshconfig

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/charliek/shed"
)

// Host is a shed as ssh gets to it.
type Host struct {
	Server string // what the client's configuration calls it
	Shed   string
	Alias  string // what ssh calls the shed: see Named

	options []string // lines: a keyword and its arguments
}

// Address says how ssh reaches the SSH server of a shed's server.
type Address struct {
	Host       string // name or IP address
	Port       int
	KnownHosts string // absolute path of the file that has the server's key
	Local      bool   // the server is on this machine
	// Options are lines that take precedence over those that Host alone would give.
	Options []string
}

var (
	serverRE  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	addressRE = regexp.MustCompile(`^[A-Za-z0-9:_][A-Za-z0-9:._%-]*$`)
	keywordRE = regexp.MustCompile(`^[A-Za-z]+$`)
	plainRE   = regexp.MustCompile(`^[A-Za-z0-9/._@+-]+$`)
)

// NewHost returns the host for a shed. CodeInvalid if something in it can't be written so that ssh reads it.
func NewHost(server, name string, at Address) (Host, error) {
	if err := shed.ValidateName(name); err != nil {
		return Host{}, err
	}
	if !serverRE.MatchString(server) {
		return Host{}, shed.Errorf(shed.CodeInvalid, "the name of the server %.80q can't be part of the name of a host", server).
			WithHint("rename it in the configuration: use letters, digits, '.', '_' and '-'")
	}
	if !addressRE.MatchString(at.Host) || at.Port < 1 || at.Port > 65535 {
		return Host{}, shed.Errorf(shed.CodeInvalid, "%.80q with port %d is no address that ssh can connect to", at.Host, at.Port)
	}
	known, err := quotePath(at.KnownHosts)
	if err != nil {
		return Host{}, err
	}
	h := Host{Server: server, Shed: name}
	for _, option := range at.Options {
		keyword, _, ok := strings.Cut(option, " ")
		if !ok || !keywordRE.MatchString(keyword) || strings.ContainsFunc(option, isControl) {
			return Host{}, shed.Errorf(shed.CodeInvalid, "%.80q is no option of ssh", option)
		}
		h.options = append(h.options, option)
		if strings.EqualFold(keyword, "HostName") {
			h.options = append(h.options, "HostKeyAlias "+hostKeyAlias(at))
		}
	}
	h.options = append(h.options,
		"HostName "+strings.ReplaceAll(at.Host, "%", "%%"), // unless an option has said another
		"Port "+strconv.Itoa(at.Port),
		"User "+name,
		// The pinned key is all that counts, whatever else the user's configuration trusts.
		"UserKnownHostsFile "+known,
		"GlobalKnownHostsFile /dev/null",
		"StrictHostKeyChecking yes",
		"UpdateHostKeys no",
		"VerifyHostKeyDNS no",
		"CheckHostIP no",
		"CanonicalizeHostname no", // the key is pinned for this name
		"ServerAliveInterval 15",
		"ServerAliveCountMax 3",
	)
	if at.Local {
		h.options = append(h.options, "ProxyCommand none") // this machine is not this machine elsewhere
	}
	return h, nil
}

// hostKeyAlias is what the key of the server is pinned as.
func hostKeyAlias(at Address) string {
	return knownhosts.Normalize(net.JoinHostPort(at.Host, strconv.Itoa(at.Port)))
}

// quotePath writes path as an argument of a keyword that knows percent tokens.
func quotePath(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("the file of known hosts %q has no absolute path", path)
	}
	// There is no way to write these that all versions of ssh read.
	if strings.ContainsAny(path, "\"\\") || strings.Contains(path, "${") || strings.ContainsFunc(path, isControl) {
		return "", shed.Errorf(shed.CodeInvalid, "ssh can't be told of a file called %q", path).
			WithHint("keep the configuration of shed (--config, SHED_CONFIG) below another directory")
	}
	if plainRE.MatchString(path) {
		return path, nil
	}
	return `"` + strings.ReplaceAll(path, "%", "%%") + `"`, nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// Named returns hosts, sorted, with their aliases: shed-NAME, or shed-NAME.SERVER where several
// servers have a shed of that name.
func Named(hosts []Host) []Host {
	count := map[string]int{}
	for _, h := range hosts {
		count[h.Shed]++
	}
	named := slices.SortedStableFunc(slices.Values(hosts), func(a, b Host) int {
		return cmp.Or(strings.Compare(a.Shed, b.Shed), strings.Compare(a.Server, b.Server))
	})
	for i, h := range named {
		named[i].Alias = "shed-" + h.Shed
		if count[h.Shed] > 1 {
			named[i].Alias += "." + h.Server
		}
	}
	return named
}

// Render returns the text for hosts. It begins with an empty line, so that it can be appended to a
// file that has no newline at its end.
func Render(hosts []Host) []byte {
	var b bytes.Buffer
	for _, h := range Named(hosts) {
		fmt.Fprintf(&b, "\n# shed %s on %s\nHost %s\n", h.Shed, h.Server, h.Alias)
		for _, option := range h.options {
			fmt.Fprintf(&b, "    %s\n", option)
		}
	}
	return b.Bytes()
}
