package sshd

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// rights is what a connection may do: what sshd(8) says of the options in a file of authorized keys.
type rights struct {
	noPTY        bool
	noForwarding bool // of connections
	noAgent      bool
	open, listen []permit // nil: any
	command      string   // runs in place of what the client asks for
	env          []string // K=V
}

// permit is an address that may be dialled or listened on.
type permit struct{ host, port string } // either may be "*"

// authorizedKey is one line of a file of authorized keys.
type authorizedKey struct {
	where   string // FILE:LINE
	key     []byte // in wire format
	refused string // why the key can't be used, or ""
	from    sources
	expires time.Time // zero: never

	// ca says that not the key itself may log in but one with a certificate of it, for one of
	// the principals. Where the line has none, that is the name of the shed.
	ca         bool
	principals []string

	rights
}

// flags are the options without a value.
var flags = map[string]func(*authorizedKey){
	"restrict":            func(e *authorizedKey) { e.noPTY, e.noForwarding, e.noAgent = true, true, true },
	"pty":                 func(e *authorizedKey) { e.noPTY = false },
	"no-pty":              func(e *authorizedKey) { e.noPTY = true },
	"port-forwarding":     func(e *authorizedKey) { e.noForwarding = false },
	"no-port-forwarding":  func(e *authorizedKey) { e.noForwarding = true },
	"agent-forwarding":    func(e *authorizedKey) { e.noAgent = false },
	"no-agent-forwarding": func(e *authorizedKey) { e.noAgent = true },
	"cert-authority":      func(e *authorizedKey) { e.ca = true },
	// No key can do any of these here.
	"x11-forwarding":    func(*authorizedKey) {},
	"no-x11-forwarding": func(*authorizedKey) {},
	"user-rc":           func(*authorizedKey) {},
	"no-user-rc":        func(*authorizedKey) {},
}

// apply makes e obey an option of its line. One that isn't understood might
// restrict the key in a way that goes unheeded, so it is an error.
//
// The option environment counts: unlike on a server of many users, nobody gains by it
// what they don't have.
func (e *authorizedKey) apply(option string) error {
	name, value, hasValue := strings.Cut(option, "=")
	name = strings.ToLower(name)
	if set, ok := flags[name]; ok && !hasValue {
		set(e)
		return nil
	}
	set, ok := map[string]func(string) error{
		"from":         e.setFrom,
		"expiry-time":  e.setExpiry,
		"command":      e.setCommand,
		"environment":  e.addEnv,
		"permitopen":   e.addOpen,
		"permitlisten": e.addListen,
		"principals":   e.setPrincipals,
	}[name]
	if !ok || !hasValue {
		return fmt.Errorf("the option %.40q is not supported", option)
	}
	if len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
		return fmt.Errorf("the option %s needs a quoted value", name)
	}
	value = strings.ReplaceAll(value[1:len(value)-1], `\"`, `"`)
	if err := set(value); err != nil {
		return fmt.Errorf("the option %s: %w", name, err)
	}
	return nil
}

var errTwice = errors.New("it is there twice")

func (e *authorizedKey) setFrom(value string) (err error) {
	if e.from != nil {
		return errTwice
	}
	e.from, err = parseSources(value)
	return err
}

func (e *authorizedKey) setExpiry(value string) error {
	if !e.expires.IsZero() {
		return errTwice
	}
	location := time.Local
	digits, utc := strings.CutSuffix(value, "Z")
	if utc {
		location = time.UTC
	}
	for _, layout := range []string{"20060102", "200601021504", "20060102150405"} {
		if t, err := time.ParseInLocation(layout, digits, location); err == nil && len(layout) == len(digits) {
			e.expires = t
			return nil
		}
	}
	return fmt.Errorf("%.40q is no time; write YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with a Z for UTC", value)
}

func (e *authorizedKey) setCommand(value string) error {
	switch {
	case e.command != "":
		return errTwice
	case value == "" || strings.ContainsRune(value, 0):
		return errors.New("there is no command")
	}
	e.command = value
	return nil
}

func (e *authorizedKey) addEnv(value string) error {
	name, _, ok := strings.Cut(value, "=")
	if !ok || !envRE.MatchString(name) || strings.ContainsRune(value, 0) {
		return fmt.Errorf("%.40q is not NAME=VALUE", value)
	}
	e.env = append(e.env, value)
	return nil
}

func (e *authorizedKey) addOpen(value string) error {
	p, err := parsePermit(value)
	e.open = append(e.open, p)
	return err
}

func (e *authorizedKey) addListen(value string) error {
	if !strings.Contains(value, ":") {
		value = "*:" + value
	}
	p, err := parsePermit(value)
	e.listen = append(e.listen, p)
	return err
}

func (e *authorizedKey) setPrincipals(value string) error {
	if e.principals != nil {
		return errTwice
	}
	e.principals = strings.Split(value, ",")
	if slices.Contains(e.principals, "") {
		return errors.New("there is an empty one")
	}
	return nil
}

var hostPatternRE = regexp.MustCompile(`^[A-Za-z0-9.:_*?-]+$`)

func parsePermit(value string) (permit, error) {
	host, port, err := net.SplitHostPort(value)
	if err == nil && port != "*" {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil || !hostPatternRE.MatchString(host) {
		return permit{}, fmt.Errorf("%.80q is not HOST:PORT", value)
	}
	return permit{host, port}, nil
}

// mayOpen reports whether the rights let a client dial an address in the shed.
func (r rights) mayOpen(host string, port uint32) bool {
	return !r.noForwarding && (r.open == nil || slices.ContainsFunc(r.open, func(p permit) bool {
		return (p.host == "*" || strings.EqualFold(p.host, host)) && p.hasPort(port)
	}))
}

// mayListen is mayOpen for listening, where a host can be a pattern.
func (r rights) mayListen(host string, port uint32) bool {
	return !r.noForwarding && (r.listen == nil || slices.ContainsFunc(r.listen, func(p permit) bool {
		return matches(p.host, host) && p.hasPort(port)
	}))
}

func (p permit) hasPort(port uint32) bool {
	return p.port == "*" || p.port == strconv.FormatUint(uint64(port), 10)
}

// matches reports whether s matches a pattern of * and ?.
func matches(pattern, s string) bool {
	if pattern == "*" {
		return true
	}
	ok, err := path.Match(pattern, s)
	return ok && err == nil
}

// usable returns why nobody can log in by the line now, or nil.
func (e authorizedKey) usable() error {
	switch {
	case e.refused != "":
		return errors.New(e.refused)
	case !e.expires.IsZero() && !time.Now().Before(e.expires):
		return fmt.Errorf("the key has expired, at %s", e.expires.Format(time.DateTime))
	case !e.ca && e.principals != nil:
		return errors.New("the option principals is for certificates: cert-authority is missing")
	}
	return nil
}

// grant returns what the line lets a key do, which it is for: for the user called
// so, from remote, with cert if the line is for certificates. The error says why the key may not log in.
func (e authorizedKey) grant(user string, remote net.Addr, cert *ssh.Certificate) (rights, error) {
	if err := e.usable(); err != nil {
		return rights{}, err
	}
	if !e.from.contain(remote) {
		return rights{}, errors.New("the key may not be used from this address")
	}
	if e.ca {
		return e.grantCertificate(user, remote, cert)
	}
	return e.rights, nil
}

const (
	forceCommand  = "force-command"
	sourceAddress = "source-address"
)

func (e authorizedKey) grantCertificate(user string, remote net.Addr, cert *ssh.Certificate) (rights, error) {
	if cert.CertType != ssh.UserCert {
		return rights{}, errors.New("the certificate is not a user's")
	}
	names := e.principals
	if names == nil {
		names = []string{user}
	}
	i := slices.IndexFunc(names, func(name string) bool { return slices.Contains(cert.ValidPrincipals, name) })
	if i < 0 {
		return rights{}, fmt.Errorf("the certificate is for %.200q, and one of %.200q is needed", cert.ValidPrincipals, names)
	}
	checker := ssh.CertChecker{
		IsUserAuthority:          func(ca ssh.PublicKey) bool { return bytes.Equal(ca.Marshal(), e.key) },
		SupportedCriticalOptions: []string{forceCommand, sourceAddress},
	}
	if err := checker.CheckCert(names[i], cert); err != nil {
		return rights{}, err
	}
	if list, ok := cert.CriticalOptions[sourceAddress]; ok {
		from, err := parseSources(list)
		if err != nil {
			return rights{}, fmt.Errorf("the certificate's %s: %w", sourceAddress, err)
		}
		if !from.contain(remote) {
			return rights{}, errors.New("the certificate may not be used from this address")
		}
	}
	r := e.rights
	if command, ok := cert.CriticalOptions[forceCommand]; ok {
		if command == "" || r.command != "" && r.command != command {
			return rights{}, errors.New("the certificate and the line force different commands")
		}
		r.command = command
	}
	may := func(extension string) bool {
		_, ok := cert.Extensions[extension]
		return ok
	}
	r.noPTY = r.noPTY || !may("permit-pty")
	r.noForwarding = r.noForwarding || !may("permit-port-forwarding")
	r.noAgent = r.noAgent || !may("permit-agent-forwarding")
	return r, nil
}

// sources is a list of addresses. A nil one has all.
type sources []sourceEntry

type sourceEntry struct {
	contains func(netip.Addr) bool
	not      bool // the addresses are excluded
}

var addressPatternRE = regexp.MustCompile(`^[0-9A-Fa-f.:*?]*[*?][0-9A-Fa-f.:*?]*$`)

// parseSources parses a list of addresses, CIDR blocks, and patterns of addresses, any of which can
// be negated. Names would need the DNS, which is no authority for who a client is.
func parseSources(list string) (sources, error) {
	var s sources
	for entry := range strings.SplitSeq(list, ",") {
		text, not := strings.CutPrefix(entry, "!")
		if addressPatternRE.MatchString(text) {
			pattern := strings.ToLower(text)
			s = append(s, sourceEntry{func(addr netip.Addr) bool { return matches(pattern, addr.String()) }, not})
			continue
		}
		p, err := netip.ParsePrefix(text)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(text); err == nil {
				addr = addr.Unmap()
				p = netip.PrefixFrom(addr, addr.BitLen())
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%.40q is no address or CIDR block; nothing else is supported there", entry)
		}
		s = append(s, sourceEntry{p.Contains, not})
	}
	return s, nil
}

// contain reports whether remote is in the list and nothing of the list excludes it.
func (s sources) contain(remote net.Addr) bool {
	if s == nil {
		return true
	}
	addr, err := ipOf(remote)
	if err != nil {
		return false
	}
	found := false
	for _, e := range s {
		if e.contains(addr) {
			if e.not {
				return false
			}
			found = true
		}
	}
	return found
}
