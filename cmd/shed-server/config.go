//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/engine"
	"github.com/charliek/shed/internal/strictyaml"
)

// config is the server's configuration file, server.yaml.
type config struct {
	Name           string        `yaml:"name"`
	HTTPPort       int           `yaml:"http_port"`
	SSHPort        int           `yaml:"ssh_port"`
	BindAddress    string        `yaml:"bind_address"`
	AllowInsecure  bool          `yaml:"allow_insecure_exposure"`
	Socket         string        `yaml:"socket"`
	StateDir       string        `yaml:"state_dir"`
	DefaultBackend string        `yaml:"default_backend"`
	EnvFile        string        `yaml:"env_file"`
	LogLevel       string        `yaml:"log_level"`
	Auth           authConfig    `yaml:"auth"`
	Network        networkConfig `yaml:"network"`
	QEMU           backendConfig `yaml:"qemu"`

	file string // that it was read from, "" for the defaults
}

type authConfig struct {
	AuthorizedKeys     []string `yaml:"authorized_keys"`
	AuthorizedKeysFile string   `yaml:"authorized_keys_file"`
}

type networkConfig struct {
	// AllowHostPorts are the ports of this machine's loopback that sheds reach as host.shed.internal.
	AllowHostPorts []int `yaml:"allow_host_ports"`
}

type backendConfig struct {
	DefaultImage    string            `yaml:"default_image"`
	ImageAliases    map[string]string `yaml:"image_aliases"`
	PullPolicy      engine.PullPolicy `yaml:"pull_policy"`
	ImagesDir       string            `yaml:"images_dir"`
	DefaultCPUs     int               `yaml:"default_cpus"`
	DefaultMemoryMB int               `yaml:"default_memory_mb"`
}

// backend is what the configuration says about a backend.
func (c backendConfig) backend() engine.Backend {
	return engine.Backend{
		Image: c.DefaultImage, Aliases: c.ImageAliases, Pull: c.PullPolicy,
		CPUs: c.DefaultCPUs, MemoryMB: c.DefaultMemoryMB,
	}
}

func defaultConfig() (config, error) {
	cfg := config{
		Name: "shed", HTTPPort: 8080, SSHPort: 2222, BindAddress: "127.0.0.1",
		Socket: api.DefaultSocket(), DefaultBackend: "detect", EnvFile: "~/.shed/env", LogLevel: "info",
		QEMU: backendConfig{DefaultImage: "base", PullPolicy: engine.PullMissing, DefaultCPUs: 2, DefaultMemoryMB: 4096},
	}
	if host, err := os.Hostname(); err == nil {
		cfg.Name, _, _ = strings.Cut(host, ".")
	}
	if os.Geteuid() == 0 {
		cfg.StateDir = "/var/lib/shed"
		return cfg, nil
	}
	data := os.Getenv("XDG_DATA_HOME")
	if data == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return cfg, err
		}
		data = filepath.Join(home, ".local", "share")
	}
	cfg.StateDir = filepath.Join(data, "shed")
	return cfg, nil
}

// loadConfig reads the named file, or the first of the usual ones that is there. With
// none, the defaults hold.
func loadConfig(file string) (config, error) {
	cfg, err := defaultConfig()
	if err != nil {
		return cfg, err
	}
	files := []string{"server.yaml", expandHome("~/.config/shed/server.yaml"), "/etc/shed/server.yaml"}
	if file != "" {
		files = []string{file}
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) && file == "" {
			continue
		}
		if err != nil {
			return cfg, shed.Errorf(shed.CodeInvalid, "the configuration can't be read: %w", err)
		}
		if err := strictyaml.Decode(f, b, &cfg); err != nil {
			return cfg, err
		}
		if err := cfg.check(); err != nil {
			return cfg, shed.Errorf(shed.CodeInvalid, "%s: %w", f, err)
		}
		cfg.file = f
		break
	}
	cfg.StateDir, cfg.Socket, cfg.EnvFile = expandHome(cfg.StateDir), expandHome(cfg.Socket), expandHome(cfg.EnvFile)
	cfg.QEMU.ImagesDir = expandHome(cfg.QEMU.ImagesDir)
	if cfg.QEMU.ImagesDir == "" {
		cfg.QEMU.ImagesDir = filepath.Join(cfg.StateDir, "images")
	}
	cfg.Auth.AuthorizedKeysFile = expandHome(cfg.Auth.AuthorizedKeysFile)
	return cfg, nil
}

// httpAddress returns the address of the HTTP API, which asks nobody who they are: others than this machine
// reach it only if the configuration says so.
func (c config) httpAddress() string {
	if ip := net.ParseIP(c.BindAddress); ip.IsLoopback() || c.AllowInsecure {
		return c.BindAddress
	}
	return "127.0.0.1"
}

func (c config) check() error {
	for key, port := range map[string]int{"http_port": c.HTTPPort, "ssh_port": c.SSHPort} {
		if port < 0 || port > 65535 {
			return fmt.Errorf("%s: %d is no port", key, port)
		}
	}
	if net.ParseIP(c.BindAddress) == nil {
		return fmt.Errorf("bind_address: %q is no IP address", c.BindAddress)
	}
	switch c.DefaultBackend {
	case "detect", "qemu":
	default:
		return fmt.Errorf("default_backend: %q is none that this server has: detect or qemu", c.DefaultBackend)
	}
	switch c.QEMU.PullPolicy {
	case engine.PullMissing, engine.PullAlways, engine.PullNever:
	default:
		return fmt.Errorf("qemu.pull_policy: %q is none of missing, always, never", c.QEMU.PullPolicy)
	}
	switch c.LogLevel {
	case "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log_level: %q is none of debug, info, warn, error", c.LogLevel)
	}
	return nil
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
