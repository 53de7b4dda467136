package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/strictyaml"
)

// config is the client's configuration file.
type config struct {
	DefaultServer string                  `yaml:"default_server"`
	Servers       map[string]serverConfig `yaml:"servers"`

	path string
}

// serverConfig says how a server is reached: Host is another machine, Socket is here.
type serverConfig struct {
	Host     string `yaml:"host"`
	HTTPPort int    `yaml:"http_port"`
	SSHPort  int    `yaml:"ssh_port"`
	Socket   string `yaml:"socket"`
}

// loadConfig reads the file called path, or the one in SHED_CONFIG, or
// ~/.shed/config.yaml, which alone need not be there.
func loadConfig(path string) (*config, error) {
	if path == "" {
		path = os.Getenv("SHED_CONFIG")
	}
	optional := path == ""
	if optional {
		home, err := os.UserHomeDir()
		if err != nil {
			return &config{}, nil
		}
		path = filepath.Join(home, ".shed", "config.yaml")
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return &config{}, nil
	}
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the configuration can't be read: %w", err)
	}
	cfg := &config{path: path}
	if err := strictyaml.Decode(path, text, cfg); err != nil {
		return nil, err
	}
	for name, s := range cfg.Servers {
		if (s.Host == "") == (s.Socket == "") {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: server %q needs either host: or socket:", path, name)
		}
	}
	if cfg.DefaultServer != "" {
		if _, err := cfg.find(cfg.DefaultServer); err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: default_server: %w", path, err).WithHint("%s", shed.ErrorHint(err))
		}
	}
	return cfg, nil
}

func (c *config) find(name string) (serverConfig, error) {
	s, ok := c.Servers[name]
	if ok {
		return s, nil
	}
	err := shed.Errorf(shed.CodeInvalid, "there is no server %q in the configuration", name)
	if len(c.Servers) > 0 {
		return s, err.WithHint("there are: %s", strings.Join(slices.Sorted(maps.Keys(c.Servers)), ", "))
	}
	return s, err
}

// socket returns where the server called name listens, and what to call it. ""
// means the default server, or the only one, or the local one if none is configured.
func (c *config) socket(name string) (path, label string, err error) {
	if name == "" {
		name = c.DefaultServer
	}
	if name == "" && len(c.Servers) == 1 {
		for name = range c.Servers {
		}
	}
	if name == "" {
		if len(c.Servers) > 0 {
			return "", "", shed.Errorf(shed.CodeInvalid, "%s has several servers and no default_server", c.path).
				WithHint("choose one with --server: %s", strings.Join(slices.Sorted(maps.Keys(c.Servers)), ", "))
		}
		path = api.DefaultSocket()
		return path, "the server at " + path, nil
	}
	s, err := c.find(name)
	if err != nil {
		return "", "", err
	}
	if s.Host != "" {
		return "", "", shed.Errorf(shed.CodeUnsupported, "server %q is on another machine (host: %s): only servers with socket: can be reached", name, s.Host).
			WithHint("run shed on %s itself", s.Host)
	}
	path = s.Socket
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", "", fmt.Errorf("server %q: %w", name, err)
		}
		path = filepath.Join(home, rest)
	}
	return path, fmt.Sprintf("server %q at %s", name, path), nil
}
