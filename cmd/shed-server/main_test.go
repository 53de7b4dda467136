//go:build linux

package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/state"
)

func TestUsage(t *testing.T) {
	for args, want := range map[string]string{
		"foo":         "unknown command \"foo\" for \"shed-server\"\nhint: there are: doctor, pull-images, serve, version  (see: shed-server --help)",
		"foo --bar":   `unknown command "foo" for "shed-server"`,
		"help foo":    `unknown command "foo" for "shed-server"`,
		"--bar":       "unknown flag: --bar\nhint: see: shed-server --help",
		"serve --bar": "unknown flag: --bar\nhint: see: shed-server serve --help",
		"serve x":     `shed-server serve takes no arguments, got "x"`,
		"doctor x y":  `shed-server doctor takes no arguments, got "x"`,
		"keep":        "shed-server keep takes 1 argument, got 0\nhint: usage: shed-server keep DIR",
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(args), &stdout, &stderr)
		if code != exitUsage || stdout.Len() > 0 || !strings.HasPrefix(stderr.String(), "shed-server: "+want) {
			t.Errorf("shed-server %s: %d, %q, %q; want %q", args, code, stdout.String(), stderr.String(), want)
		}
	}
	for args, want := range map[string]string{"": "Usage:", "--help": "Usage:", "serve -h": "Usage:", "help serve": "Usage:", "version": "shed-server " + version} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(args), &stdout, &stderr)
		if code != 0 || stderr.Len() > 0 || !strings.Contains(stdout.String(), want) {
			t.Errorf("shed-server %s: %d, %q, %q; want %q", args, code, stdout.String(), stderr.String(), want)
		}
	}
}

func TestConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for text, want := range map[string][2]string{
		"name: x\nstat_dir: /y\n":                       {":2: unknown key \"stat_dir\"", "the keys there are: name, http_port, "},
		"qemu:\n  default_image: base\n  cpus: 2\n":     {":3: unknown key \"cpus\"", "the keys there are: default_image, image_aliases, pull_policy, images_dir, default_cpus, default_memory_mb"},
		"network: {allow_host_port: [1]}\n":             {":1: unknown key \"allow_host_port\"", "the keys there are: allow_host_ports"},
		"http_port: many\n":                             {":1: http_port: this must be a whole number", ""},
		"allow_insecure_exposure: 7\n":                  {":1: allow_insecure_exposure: this must be true or false", ""},
		"network:\n  allow_host_ports: 80\n":            {":2: allow_host_ports: int was used where sequence is expected", ""},
		"name: x\nname: y\n":                            {":2: mapping key \"name\" already defined", ""},
		"- x\n":                                         {":1: ", ""},
		"http_port: 70000\n":                            {": http_port: 70000 is no port", ""},
		"bind_address: everywhere\n":                    {": bind_address: \"everywhere\" is no IP address", ""},
		"qemu: {image_aliases: {a: b}}\nlog_level: x\n": {": log_level: \"x\"", ""},
	} {
		write(text)
		_, err := loadConfig(file)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.HasPrefix(err.Error(), file+want[0]) ||
			!strings.HasPrefix(shed.ErrorHint(err), want[1]) || (want[1] == "") != (shed.ErrorHint(err) == "") {
			t.Errorf("%q: %v (hint %q); want %q", text, err, shed.ErrorHint(err), want)
		}
	}
	want, err := defaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "# nothing\n", "---\n", "null\n", "qemu:\n", "qemu:\n  # default_image: x\n", "qemu: {}\nauth: {}\n"} {
		write(text)
		if cfg, err := loadConfig(file); err != nil || cfg.HTTPPort != want.HTTPPort || cfg.QEMU.DefaultImage != "base" {
			t.Errorf("%q: %+v, %v; want the defaults", text, cfg, err)
		}
	}
	write("name: n\nhttp_port: 1\nauth: {authorized_keys: [k]}\nqemu: {image_aliases: {a: b}}\n")
	if cfg, err := loadConfig(file); err != nil || cfg.Name != "n" || cfg.HTTPPort != 1 || cfg.SSHPort != want.SSHPort ||
		cfg.Auth.AuthorizedKeys[0] != "k" || cfg.QEMU.ImageAliases["a"] != "b" {
		t.Errorf("%+v, %v", cfg, err)
	}
}

// A server that can't have the state directory leaves the socket to the one that has it, which may be about to listen there.
func TestSecondServer(t *testing.T) {
	dir := t.TempDir()
	first, err := state.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	socket := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close() // as one that was killed leaves it
	before, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	err = serve(t.Context(), config{BindAddress: "127.0.0.1", Socket: socket, StateDir: dir, LogLevel: "info"})
	if shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("%v", err)
	}
	if after, err := os.Stat(socket); err != nil || !os.SameFile(before, after) {
		t.Errorf("the socket was replaced: %v", err)
	}
}

// Who is asked for no key is on this machine, unless the configuration says otherwise.
func TestHTTPAddress(t *testing.T) {
	for _, c := range []struct {
		bind     string
		insecure bool
		want     string
	}{
		{"127.0.0.1", false, "127.0.0.1"}, {"127.0.0.7", false, "127.0.0.7"}, {"::1", false, "::1"}, {"127.0.0.1", true, "127.0.0.1"},
		{"0.0.0.0", false, "127.0.0.1"}, {"::", false, "127.0.0.1"}, {"192.168.1.7", false, "127.0.0.1"}, {"::ffff:10.0.0.1", false, "127.0.0.1"},
		{"0.0.0.0", true, "0.0.0.0"}, {"192.168.1.7", true, "192.168.1.7"},
	} {
		if got := (config{BindAddress: c.bind, AllowInsecure: c.insecure}).httpAddress(); got != c.want {
			t.Errorf("bind_address %s, allow_insecure_exposure %v: HTTP on %s, want %s", c.bind, c.insecure, got, c.want)
		}
	}
}
