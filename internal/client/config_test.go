package client

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
)

func TestNoConfig(t *testing.T) {
	dir, _ := home(t)
	cfg, err := LoadConfig("")
	if err != nil || cfg.Dir() != filepath.Join(dir, ".shed") || cfg.KnownHosts() != filepath.Join(dir, ".shed", "known_hosts") {
		t.Fatalf("%+v, %v", cfg, err)
	}
	name, err := cfg.Default()
	s, serr := cfg.Server(name)
	if err != nil || serr != nil || name != Local || s.Address() != api.DefaultSocket() || cfg.label(name, s) != "the server at "+api.DefaultSocket() {
		t.Errorf("%q, %+v, %v, %v", name, s, err, serr)
	}
	write(t, cfg.Path(), "")
	if cfg, err := LoadConfig(""); err != nil || len(cfg.Servers) != 0 {
		t.Errorf("an empty file: %+v, %v", cfg, err)
	}
	if _, err := LoadConfig(filepath.Join(dir, "none")); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("a file that is named and isn't there: %v", err)
	}
	t.Setenv("HOME", "")
	if cfg, err := LoadConfig(""); err != nil {
		t.Error(err)
	} else if err := cfg.Add(t.Context(), "a", Server{Host: "a"}); err == nil {
		t.Error("added to no file")
	}
}

func TestDefault(t *testing.T) {
	home(t)
	path := filepath.Join(t.TempDir(), "c.yaml")
	for text, want := range map[string]string{
		"servers: {a: {host: x}}": "a",
		"servers: {a: {host: x}, b: {socket: /x}}\ndefault_server: b\n": "b",
		"servers: {a: {host: x}, b: {socket: /x}}\n":                    "",
	} {
		write(t, path, text)
		cfg, err := LoadConfig(path)
		if err != nil {
			t.Fatal(err)
		}
		if name, err := cfg.Default(); name != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, name, err)
		}
	}
	for _, text := range []string{
		"servers: {a: {}}", "servers: {a: {host: x, socket: /y}}", "servers: {a/b: {host: x}}", "servers: {a: {host: x, ssh_port: 65536}}",
		"servers: {a: {host: '-x'}}", "servers: {a: {host: 'a b'}}", "default_server: a", "servers: {a: {host: x}, a: {host: y}}",
	} {
		write(t, path, text)
		if _, err := LoadConfig(path); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestParseHost(t *testing.T) {
	home(t)
	for host, want := range map[string]Server{
		"home": {Host: "home"}, "Home.Local": {Host: "Home.Local"}, "10.0.0.1": {Host: "10.0.0.1"}, "::1": {Host: "::1"}, "[::1]": {Host: "::1"},
		"fe80::1%eth0": {Host: "fe80::1%eth0"}, "a_b": {Host: "a_b"}, "home.": {Host: "home."},
		"/run/s": {Socket: "/run/s"}, "unix:/run/s": {Socket: "/run/s"}, "~/s": {Socket: "~/s"},
	} {
		if got, err := ParseHost(host); err != nil || got != want {
			t.Errorf("%q: %+v, %v", host, got, err)
		}
	}
	for host, hint := range map[string]string{
		"": "empty", "-oProxyCommand=x": "no machine", "a b": "no machine", "ssh://a": "URL", "me@a": "user names", "a:2222": "--ssh-port 2222",
		"[a]": "IPv6", "[::1": "IPv6", "[::1]:22": "IPv6", "unix:s": "whole path", "a\nb": "no machine", "a/b": "no machine", "a;b": "no machine",
		"::g": "no machine", "::1%-x": "no machine", strings.Repeat("a", 254): "no machine",
	} {
		got, err := ParseHost(host)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error()+shed.ErrorHint(err), hint) {
			t.Errorf("%q: %+v, %v; %s", host, got, err, shed.ErrorHint(err))
		}
	}
	for addr, s := range map[string]Server{
		"home.local:2222": {Host: "Home.Local"}, "[::1]:7": {Host: "::1", SSHPort: 7}, "/s": {Socket: "/s"}, os.Getenv("HOME") + "/s": {Socket: "~/s"},
	} {
		if s.Address() != addr {
			t.Errorf("%+v: %s", s, s.Address())
		}
	}
}

// What a change leaves of the text.
func TestEdit(t *testing.T) {
	home(t)
	add := func(name string, s Server) func(*Config) error {
		return func(c *Config) error { return c.Add(t.Context(), name, s) }
	}
	remove := func(name string) func(*Config) error {
		return func(c *Config) error { return c.Remove(t.Context(), name) }
	}
	standard := func(name string) func(*Config) error {
		return func(c *Config) error { return c.SetDefault(t.Context(), name) }
	}
	x := Server{Host: "x.local", SSHPort: 2222, HTTPPort: 8080}
	const entry = "    host: x.local\n    http_port: 8080\n    ssh_port: 2222\n"
	const commented = "# mine\n\nservers:\n  # the first\n  a: # is a\n    host: a # there\n\n  b: {socket: /b}\n# end\n"
	for _, c := range []struct {
		what, text string
		change     func(*Config) error
		want       string
	}{
		{"add to nothing", "", add("x", x), "default_server: x\nservers:\n  x:\n" + entry},
		{"add to a comment", "# mine", add("x", x), "# mine\ndefault_server: x\nservers:\n  x:\n" + entry},
		{"add to a null", "servers:\n", add("x", x), "servers:\n  x:\n" + entry + "default_server: x\n"},
		{"add to none", "servers: {}\n", add("x", x), "servers:\n  x:\n" + entry + "default_server: x\n"},
		{"add", "servers:\n  a:\n    host: a\n", add("x", x), "servers:\n  a:\n    host: a\n  x:\n" + entry + "default_server: a\n"},
		{"add with a comment", commented, add("x", Server{Socket: "/x"}), strings.Replace(commented, "  b: {socket: /b}\n", "  b: {socket: /b}\n  x:\n    socket: /x\n", 1)},
		{"add before the default", "servers:\n    a:\n        host: a\ndefault_server: a # yes\n", add("x", Server{Socket: "/x"}), "servers:\n    a:\n        host: a\n    x:\n      socket: /x\ndefault_server: a # yes\n"},
		{"add in a line", "servers: {a: {host: a}}\n", add("x", Server{Socket: "/x"}), "servers: {a: {host: a}, x: {socket: /x}}\ndefault_server: a\n"},
		{"set", commented, standard("b"), commented + "default_server: b\n"},
		{"set anew", "default_server: a # yes\nservers: {a: {host: a}, b: {host: b}}\n", standard("b"), "default_server: b # yes\nservers: {a: {host: a}, b: {host: b}}\n"},
		{"remove", commented, remove("b"), "# mine\n\nservers:\n  # the first\n  a: # is a\n    host: a # there\n# end\n"},
		{"remove the default", "default_server: a\nservers:\n  a:\n    host: a\n  b:\n    host: b\n", remove("a"), "servers:\n  b:\n    host: b\n"},
		{"remove the last", "# mine\nservers:\n  a:\n    host: a\n", remove("a"), "# mine\nservers: {}\n"},
		{"remove one of a line", "servers: {a: {host: a}, b: {host: b}}\n", remove("a"), "servers: {b: {host: b}}\n"},
	} {
		path := filepath.Join(t.TempDir(), "c.yaml")
		write(t, path, c.text)
		cfg, err := LoadConfig(path)
		if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if err := c.change(cfg); err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != c.want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.what, got, c.want)
		}
		again, err := LoadConfig(path)
		if err != nil || again.DefaultServer != cfg.DefaultServer || !maps.Equal(again.Servers, cfg.Servers) {
			t.Errorf("%s: %+v, %v; in memory %+v", c.what, again, err, cfg)
		}
	}
}

func TestEditRefused(t *testing.T) {
	home(t)
	path := filepath.Join(t.TempDir(), "c.yaml")
	const text = "servers:\n  a: &a\n    host: a\n  b: {host: b}\n"
	write(t, path, text)
	cfg, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		err  error
		code shed.Code
	}{
		"a name that is taken":       {cfg.Add(t.Context(), "a", Server{Host: "c"}), shed.CodeConflict},
		"an address that is taken":   {cfg.Add(t.Context(), "c", Server{Host: "A", SSHPort: 2222}), shed.CodeConflict},
		"a name that can't be one":   {cfg.Add(t.Context(), "c/d", Server{Host: "c"}), shed.CodeInvalid},
		"a server that isn't one":    {cfg.Add(t.Context(), "c", Server{}), ""},
		"none of that name":          {cfg.Remove(t.Context(), "c"), shed.CodeInvalid},
		"none that could be default": {cfg.SetDefault(t.Context(), "c"), shed.CodeInvalid},
	} {
		if c.err == nil || c.code != "" && shed.ErrorCode(c.err) != c.code {
			t.Errorf("%s: %v", what, c.err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != text {
		t.Errorf("%q, %v", got, err)
	}
	// Somebody else's change is seen.
	write(t, path, "servers: {c: {host: c}}\n")
	if err := cfg.Add(t.Context(), "c", Server{Host: "d"}); shed.ErrorCode(err) != shed.CodeConflict {
		t.Error(err)
	}
	if err := cfg.Add(t.Context(), "d", Server{Host: "d"}); err != nil || len(cfg.Servers) != 2 {
		t.Errorf("%+v, %v", cfg, err)
	}
}

func TestPins(t *testing.T) {
	home(t)
	file := filepath.Join(t.TempDir(), "sub", "known_hosts")
	pinned := func(addr string) int {
		t.Helper()
		keys, err := PinnedKeys(file, addr)
		if err != nil {
			t.Fatal(err)
		}
		return len(keys)
	}
	if n := pinned("a:22"); n != 0 {
		t.Errorf("%d in no file", n)
	}
	if err := UnpinKey(t.Context(), file, "a:22"); err != nil {
		t.Error(err)
	}
	k1, k2 := signerOf(t, newKey(t)).PublicKey(), signerOf(t, newKey(t)).PublicKey()
	for _, addr := range []string{"A:2222", "b:22", "[::1]:2222"} {
		if err := PinKey(t.Context(), file, addr, k1); err != nil {
			t.Fatal(err)
		}
		if n := pinned(addr); n != 1 {
			t.Errorf("%s: %d", addr, n)
		}
	}
	if n := pinned("a:22") + pinned("b:2222") + pinned("[::1]:22"); n != 0 {
		t.Errorf("%d of other ports", n)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	line := string(ssh.MarshalAuthorizedKey(k2))
	const comment = "# a comment\n\n"
	write(t, file, comment+"c,[a]:2222,d "+line+string(text)+"@revoked x "+strings.TrimSpace(line))
	if n := pinned("a:2222"); n != 2 {
		t.Errorf("%d", n)
	}
	if err := PinKey(t.Context(), file, "a:2222", k2); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(got), comment+"c,d "+line+"b ") || !strings.HasSuffix(string(got), "\n[a]:2222 "+line) {
		t.Errorf("%s", got)
	}
	if err := UnpinKey(t.Context(), file, "a:2222"); err != nil || pinned("a:2222") != 0 || pinned("b:22") != 1 {
		t.Error(err)
	}
	write(t, file, "a garbage\n")
	if _, err := PinnedKeys(file, "a:22"); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), file) {
		t.Error(err)
	}
}

func FuzzEdit(f *testing.F) {
	for _, text := range []string{"", "servers:\n  a:\n    host: a\n", "# c\ndefault_server: a\nservers: {a: {host: b}}", "---\nservers:\n", "servers: &x\n  a: {socket: /x}\n"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "c.yaml")
		write(t, path, text)
		cfg, err := LoadConfig(path)
		if err != nil {
			return
		}
		// Either it is as wanted, or nothing was changed.
		before := len(cfg.Servers)
		if err := cfg.Add(t.Context(), "new", Server{Host: "new.example"}); err != nil {
			if got, rerr := os.ReadFile(path); rerr != nil || string(got) != text {
				t.Errorf("%v, but now %q", err, got)
			}
			return
		}
		again, err := LoadConfig(path)
		if err != nil || len(again.Servers) != before+1 || again.Servers["new"].Host != "new.example" {
			t.Errorf("%+v, %v", again, err)
		}
	})
}

func FuzzPins(f *testing.F) {
	f.Add("a ssh-ed25519 AAAA\n# x\n[a]:2222,b ssh-rsa AAAA\n", "a:2222")
	f.Add("@cert-authority * x\n\n a b", "::1")
	f.Fuzz(func(t *testing.T, text, addr string) {
		once := withoutPins([]byte(text), addr)
		if twice := withoutPins(once, addr); string(twice) != string(once) {
			t.Errorf("%q, then %q", once, twice)
		}
		if len(once) > len(text) {
			t.Errorf("it grew: %q", once)
		}
	})
}
