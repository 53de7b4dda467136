// Package client is what a program needs to use servers from elsewhere: the configuration that names
// them, the keys they are known by, the connections to them, and which of them has a shed.
package client

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/strictyaml"
)

const (
	// Local is the name of the only server where none is configured: the one on this machine.
	Local = "local"

	DefaultSSHPort  = 2222
	DefaultHTTPPort = 8080
)

// Config is the client's configuration file.
type Config struct {
	DefaultServer string            `yaml:"default_server,omitempty"`
	Servers       map[string]Server `yaml:"servers"`

	path string
}

// Server says how a server is reached: Host is another machine, by SSH, and Socket is on this one.
type Server struct {
	Host     string `yaml:"host,omitempty"`
	HTTPPort int    `yaml:"http_port,omitempty"` // noted for other programs
	SSHPort  int    `yaml:"ssh_port,omitempty"`
	Socket   string `yaml:"socket,omitempty"`
}

// Address returns the HOST:PORT of the server's SSH server, or the path of its socket.
func (s Server) Address() string {
	if s.Host == "" {
		return expandHome(s.Socket)
	}
	return net.JoinHostPort(strings.ToLower(s.Host), strconv.Itoa(s.sshPort()))
}

func (s Server) sshPort() int { return cmp.Or(s.SSHPort, DefaultSSHPort) }

// check returns what is wrong with a server, or nil.
func (s Server) check() error {
	if (s.Host == "") == (s.Socket == "") {
		return errors.New("needs either a host or a socket")
	}
	if s.Host != "" && !isHost(s.Host) {
		return fmt.Errorf("host: %q is no name or IP address", s.Host)
	}
	for _, port := range []int{s.SSHPort, s.HTTPPort} {
		if port < 0 || port > 65535 {
			return fmt.Errorf("%d is no port", port)
		}
	}
	return nil
}

// LoadConfig reads the file called path, or the one in SHED_CONFIG, or
// ~/.shed/config.yaml, which alone need not be there.
func LoadConfig(path string) (*Config, error) { return loadConfig(path, false) }

// NewConfig is LoadConfig for who is about to write the file: it need not be there.
func NewConfig(path string) (*Config, error) { return loadConfig(path, true) }

// loadConfig is LoadConfig where no file need be there if optional is true.
func loadConfig(path string, optional bool) (*Config, error) {
	path = cmp.Or(path, os.Getenv("SHED_CONFIG"))
	if path == "" {
		optional = true
		home, err := os.UserHomeDir()
		if err != nil {
			return &Config{}, nil
		}
		path = filepath.Join(home, ".shed", "config.yaml")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return &Config{path: path}, nil
	}
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the configuration can't be read: %w", err)
	}
	return parseConfig(path, text)
}

func parseConfig(path string, text []byte) (*Config, error) {
	cfg := &Config{path: path}
	if err := strictyaml.Decode(path, text, cfg); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Servers)) {
		if name == "" || strings.Contains(name, "/") {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: a server can't be called %q", path, name)
		}
		if err := cfg.Servers[name].check(); err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: server %q %w", path, name, err)
		}
	}
	if cfg.DefaultServer != "" {
		if _, err := cfg.Server(cfg.DefaultServer); err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: default_server: %w", path, err).WithHint("%s", shed.ErrorHint(err))
		}
	}
	return cfg, nil
}

// Path returns the path of the file, which need not be there. It is "" where there is no home directory.
func (c *Config) Path() string { return c.path }

// Dir returns the directory for all that a client keeps. It need not be there.
func (c *Config) Dir() string { return filepath.Dir(c.path) }

// KnownHosts returns the path of the file with the host keys of servers, in OpenSSH's format. It need not be there.
func (c *Config) KnownHosts() string { return filepath.Join(c.Dir(), "known_hosts") }

// Names returns the names of all servers, sorted. There is at least one: Local if none is configured.
func (c *Config) Names() []string {
	if len(c.Servers) == 0 {
		return []string{Local}
	}
	return slices.Sorted(maps.Keys(c.Servers))
}

// Server returns the server called name.
func (c *Config) Server(name string) (Server, error) {
	if s, ok := c.Servers[name]; ok {
		return s, nil
	}
	if name == Local && len(c.Servers) == 0 {
		return Server{Socket: api.DefaultSocket()}, nil
	}
	err := shed.Errorf(shed.CodeInvalid, "there is no server %q in the configuration", name)
	if len(c.Servers) == 0 {
		return Server{}, err.WithHint("add it with: shed server add HOST")
	}
	return Server{}, err.WithHint("there are: %s", strings.Join(c.Names(), ", "))
}

// Default returns the name of the default server: the one that is named so, or else the only one.
func (c *Config) Default() (string, error) {
	if c.DefaultServer != "" {
		return c.DefaultServer, nil
	}
	names := c.Names()
	if len(names) == 1 {
		return names[0], nil
	}
	return "", shed.Errorf(shed.CodeInvalid, "%s has several servers and no default_server", c.path).
		WithHint("choose one with --server: %s", strings.Join(names, ", "))
}

// label is what messages call a server.
func (c *Config) label(name string, s Server) string {
	if len(c.Servers) == 0 {
		return "the server at " + s.Address()
	}
	return fmt.Sprintf("server %q at %s", name, s.Address())
}

var (
	nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	hostRE = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9._])?$`)
)

// ValidateName returns an Error with CodeInvalid unless name can name a server.
func ValidateName(name string) error {
	if nameRE.MatchString(name) {
		return nil
	}
	return shed.Errorf(shed.CodeInvalid, "%.80q can't be the name of a server", name).
		WithHint("use 1 to 63 letters, digits, '.', '_' and '-', with a letter or digit in front")
}

func isHost(host string) bool {
	if len(host) > 253 {
		return false
	}
	if addr, zone, _ := strings.Cut(host, "%"); strings.Contains(addr, ":") {
		return net.ParseIP(addr) != nil && (zone == "" || hostRE.MatchString(zone))
	}
	return hostRE.MatchString(host)
}

// ParseHost returns the server that a user means by host: a name, an IP address, in brackets or not, or
// the path of a socket on this machine.
func ParseHost(host string) (Server, error) {
	fail := func(why string) (Server, error) {
		return Server{}, shed.Errorf(shed.CodeInvalid, "%.200q is no host: %s", host, why).
			WithHint("write a name or an IP address, such as home.local, or the path of a socket; ports have their flags")
	}
	if socket, ok := strings.CutPrefix(host, "unix:"); ok || strings.HasPrefix(host, "/") || strings.HasPrefix(host, "~/") {
		if !ok {
			socket = host
		}
		if path := expandHome(socket); !filepath.IsAbs(path) {
			return fail("a socket needs its whole path")
		}
		return Server{Socket: socket}, nil
	}
	bare := host
	if inner, ok := strings.CutPrefix(host, "["); ok {
		if inner, ok = strings.CutSuffix(inner, "]"); !ok || !strings.Contains(inner, ":") {
			return fail("brackets are for an IPv6 address alone")
		}
		bare = inner
	}
	switch {
	case bare == "":
		return fail("it is empty")
	case strings.Contains(bare, "://"):
		return fail("it is a URL")
	case strings.Contains(bare, "@"):
		return fail("a server has no user names")
	case isHost(bare):
		return Server{Host: bare}, nil
	}
	if name, port, ok := strings.Cut(bare, ":"); ok && isHost(name) {
		if _, err := strconv.ParseUint(port, 10, 16); err == nil {
			return Server{}, shed.Errorf(shed.CodeInvalid, "%.200q has a port in it", host).WithHint("write: %s --ssh-port %s", name, port)
		}
	}
	return fail("no machine can be called that")
}

func expandHome(path string) string {
	rest, ok := strings.CutPrefix(path, "~/")
	if !ok {
		return path
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return path
	}
	return filepath.Join(home, rest)
}
