package sshconfig

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

// set is an Edit to these hosts.
func set(hosts ...Host) Edit {
	return func([]Host) ([]Host, error) { return hosts, nil }
}

// plus is an Edit that adds h.
func plus(h Host) Edit {
	return func(installed []Host) ([]Host, error) { return append(installed, h), nil }
}

func host(t testing.TB, server, name string) Host {
	t.Helper()
	h, err := NewHost(server, name, Address{Host: "127.0.0.1", Port: 2222, KnownHosts: "/home/me/.shed/known_hosts", Local: true})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func apply(t *testing.T, path string, edit Edit) Change {
	t.Helper()
	c, err := Apply(t.Context(), path, edit)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sshSays returns what ssh makes of the file at path for a host.
func sshSays(t *testing.T, path, host string) string {
	t.Helper()
	cmd := exec.Command("ssh", "-G", "-F", path, host)
	cmd.Stdin, cmd.Dir = nil, filepath.Dir(path)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ssh -G %s: %v: %s\n%s", host, err, &stderr, contents(t, path))
	}
	return string(out)
}

func hasLines(t *testing.T, text string, lines ...string) {
	t.Helper()
	all := strings.Split(text, "\n")
	for _, line := range lines {
		if !slices.Contains(all, line) {
			t.Errorf("no line %q in\n%s", line, text)
		}
	}
}

const printed = `
# shed api on home
Host shed-api
    HostName fe80::1%%eth0
    Port 22
    User api
    UserKnownHostsFile "/home/J. R. 100%%/known_hosts"
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    VerifyHostKeyDNS no
    CheckHostIP no
    CanonicalizeHostname no
    ServerAliveInterval 15
    ServerAliveCountMax 3

# shed web on here
Host shed-web
    HostName 127.0.0.1
    Port 2222
    User web
    UserKnownHostsFile /home/me/.shed/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    VerifyHostKeyDNS no
    CheckHostIP no
    CanonicalizeHostname no
    ServerAliveInterval 15
    ServerAliveCountMax 3
    ProxyCommand none
`

func TestRender(t *testing.T) {
	api, err := NewHost("home", "api", Address{Host: "fe80::1%eth0", Port: 22, KnownHosts: "/home/J. R. 100%/known_hosts"})
	if err != nil {
		t.Fatal(err)
	}
	web := host(t, "here", "web")
	if got := string(Render([]Host{web, api})); got != printed {
		t.Errorf("rendered\n%s", got)
	}
	// As users append it: also to a file without a newline at its end.
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, "Host other\n  User me"+string(Render([]Host{web, api})))
	hasLines(t, sshSays(t, path, "shed-api"), "hostname fe80::1%eth0", "port 22", "user api",
		"userknownhostsfile /home/J. R. 100%/known_hosts", "stricthostkeychecking true", "globalknownhostsfile /dev/null")
	hasLines(t, sshSays(t, path, "other"), "user me")

	var aliases []string
	for _, h := range Named([]Host{host(t, "b", "web"), host(t, "a", "web"), host(t, "b", "api")}) {
		aliases = append(aliases, h.Alias)
	}
	if got := strings.Join(aliases, " "); got != "shed-api shed-web.a shed-web.b" {
		t.Errorf("aliases %s", got)
	}
}

func TestHostileValues(t *testing.T) {
	good := Address{Host: "h", Port: 22, KnownHosts: "/k"}
	for _, bad := range []struct {
		server, name string
		at           Address
	}{
		{"a\nHost *", "web", good}, {"*", "web", good}, {"", "web", good}, {"a b", "web", good}, {"-a", "web", good},
		{"a", "w*b", good}, {"a", "web\nProxyCommand x", good}, {"a", "", good},
		{"a", "web", Address{"h\n ProxyCommand x", 22, "/k", false, nil}}, {"a", "web", Address{"-oProxyCommand=x", 22, "/k", false, nil}},
		{"a", "web", Address{"", 22, "/k", false, nil}}, {"a", "web", Address{"a b", 22, "/k", false, nil}},
		{"a", "web", Address{"h", 0, "/k", false, nil}}, {"a", "web", Address{"h", 65536, "/k", false, nil}},
		{"a", "web", Address{"h", 22, "k", false, nil}}, {"a", "web", Address{"h", 22, "/k\"x", false, nil}}, {"a", "web", Address{"h", 22, "/k\nx", false, nil}},
		{"a", "web", Address{"h", 22, "/${HOME}", false, nil}}, {"a", "web", Address{"h", 22, `/k\x`, false, nil}},
		{"a", "web", Address{"h", 22, "/k", false, []string{"ProxyJump x\nHost *"}}}, {"a", "web", Address{"h", 22, "/k", false, []string{"x"}}},
		{"a", "web", Address{"h", 22, "/k", false, []string{"# x"}}},
	} {
		if h, err := NewHost(bad.server, bad.name, bad.at); err == nil {
			t.Errorf("%+v was taken:\n%s", bad, Render([]Host{h}))
		}
	}
}

// What gets to a server's host gets to its sheds, and the server's key is the one that is pinned for that host.
func TestHostOptions(t *testing.T) {
	h, err := NewHost("home", "web", Address{Host: "box", Port: 2222, KnownHosts: "/k", Options: []string{
		"HostName 100.64.0.7", `IdentityFile "/keys/of me"`, "ProxyJump jump.example",
	}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, string(Render([]Host{h})))
	hasLines(t, sshSays(t, path, "shed-web"), "hostname 100.64.0.7", "hostkeyalias [box]:2222", "port 2222", "user web",
		"identityfile /keys/of me", "proxyjump jump.example")
}

// files are what users have; none has a block.
var files = map[string]string{
	"empty":            "",
	"newline":          "\n",
	"options first":    "User me\nCompression yes\n\nHost other\n  Port 23\nHost *\n  User no\n  ForwardAgent yes\n",
	"host first":       "# mine\nHost other\n\tPort 23\n\tUser you\n\nHost *\n\tUser me\n\tPort 99\n\tProxyJump bastion\n\tStrictHostKeyChecking no\n\tUserKnownHostsFile /x\n",
	"match first":      "Match originalhost other user root\n  Port 23\nMatch all\n  User me\n",
	"include":          "Include included\nPort 24\nHost elsewhere\n  User x\n",
	"no newline":       "Host other\n  User me\n  Port 23",
	"CRLF":             "User me\r\nHost other\r\n  Port 23\r\n",
	"CRLF, no newline": "Host other\r\n  Port 23\r\n  User me",
	"Latin-1":          "# caf\xe9 \x80\nUser me\nHost other\n Port 23\n",
	"only a comment":   "# BEGIN shed ssh-config, as they say",
	"keywords":         "user=me\nhost = other\n\"Port\" 23\n",
	"wide":             "Port 23\n# " + strings.Repeat("x", 3<<20) + "\nHost other\n User me\n",
	"canonical":        "Host shed-*\n  CanonicalizeHostname always\n  CanonicalDomains invalid\nMatch canonical host other\n  User me\n",
}

// TestOthersUnchanged has ssh itself say that a block changes nothing for other hosts, and wins for ours.
func TestOthersUnchanged(t *testing.T) {
	for name, text := range files {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "config")
			write(t, filepath.Join(dir, "included"), "User inc\nHost other\n  Port 25\n")
			text = strings.Replace(text, "Include included", "Include "+dir+"/included", 1)
			write(t, path, text)
			before := map[string]string{}
			for _, h := range []string{"other", "elsewhere", "shed"} {
				before[h] = sshSays(t, path, h)
			}
			web := host(t, "here", "web")
			c := apply(t, path, set(web))
			installed := contents(t, path)
			if !c.Changed() || string(c.After) != installed || !strings.HasSuffix(installed, text) || !strings.HasPrefix(installed, beginMark) {
				t.Errorf("installed:\n%.3000s", installed)
			}
			if strings.Contains(text, "\r\n") && strings.Count(installed, "\n") != strings.Count(installed, "\r\n") {
				t.Errorf("mixed line ends: %q", installed)
			}
			if wantIncluded := name == "include"; (c.Included != 0) != wantIncluded {
				t.Errorf("included at %d", c.Included)
			} else if wantIncluded && !strings.HasPrefix(strings.Split(installed, "\n")[c.Included-1], "Include") {
				t.Errorf("line %d is no Include", c.Included)
			}
			for h, want := range before {
				if got := sshSays(t, path, h); got != want {
					t.Errorf("ssh -G %s before:\n%s\nafter:\n%s", h, want, got)
				}
			}
			hasLines(t, sshSays(t, path, "shed-web"), "hostname 127.0.0.1", "port 2222", "user web", "stricthostkeychecking true",
				"userknownhostsfile /home/me/.shed/known_hosts", "globalknownhostsfile /dev/null", "updatehostkeys false",
				"checkhostip no", "canonicalizehostname false", "verifyhostkeydns false")
			if says := sshSays(t, path, "shed-web"); strings.Contains(says, "proxyjump") {
				t.Errorf("through a proxy:\n%s", says)
			}

			if c := apply(t, path, set(web)); c.Changed() {
				t.Errorf("a second install changes %s", c.Diff())
			}
			apply(t, path, plus(host(t, "here", "api")))
			hasLines(t, sshSays(t, path, "shed-api"), "user api")
			hasLines(t, sshSays(t, path, "shed-web"), "user web")
			if again := apply(t, path, set(web)); string(again.After) != installed {
				t.Errorf("there and back:\n%.3000s", again.After)
			}
			apply(t, path, set())
			if got := contents(t, path); got != text {
				t.Errorf("uninstalled: %.3000q", got)
			}
		})
	}
}

// TestInstalledHosts has what is known of hosts read back, and the rest of a block that is no longer as it was written.
func TestInstalledHosts(t *testing.T) {
	want := Named([]Host{host(t, "here", "web"), host(t, "home", "web"), host(t, "home", "api")})
	d := document{}
	d, err := parse("config", d.with(want))
	if err != nil || !slices.EqualFunc(Named(d.hosts), want, func(a, b Host) bool {
		return a.Alias == b.Alias && a.Server == b.Server && a.Shed == b.Shed && slices.Equal(a.options, b.options)
	}) {
		t.Errorf("%v\n%s", err, Render(d.hosts))
	}
	d, err = parse("config", []byte(beginMark+"\nUser x\n# shed web on here\nHost shed-web\n  User web\nhost *\n  User y\n# shed a/b on here\nHost b\n"+
		"# shed gone on here\n\nHost shed-gone\n# shed api on h*\nHost x\n# shed ok on home\nHost renamed\nPort 5\nMatch all\n Port 6\n"+endMark))
	got := string(Render(d.hosts))
	if err != nil || got != "\n# shed ok on home\nHost shed-ok\n    Port 5\n\n# shed web on here\nHost shed-web\n    User web\n" {
		t.Errorf("%v\n%s", err, got)
	}
}

func TestDamagedBlock(t *testing.T) {
	b, e := beginMark+"\n", endMark+"\n"
	for text, want := range map[string]string{
		"\n" + b:                   `"# BEGIN shed ssh-config" is on line 2 and there is no "# END shed ssh-config"`,
		"x y\n" + e:                `there is no "# BEGIN shed ssh-config" and "# END shed ssh-config" is on line 2`,
		e + "\n" + b:               `"# BEGIN shed ssh-config" is on line 3 and "# END shed ssh-config" is on line 1`,
		b + e + "Port 1\n" + b + e: `is on line 1, 4 and "# END shed ssh-config" is on line 2, 5`,
		b + b + e + e:              `is on line 1, 2 and`,
		b + "\r\n  " + b + e:       `is on line 1, 3 and`,
		b + e + "Port 1\n" + e:     `is on line 1 and "# END shed ssh-config" is on line 2, 4`,
	} {
		path := filepath.Join(t.TempDir(), "config")
		write(t, path, text)
		for _, edit := range []Edit{set(host(t, "a", "web")), set()} {
			_, err := Apply(t.Context(), path, edit)
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) || shed.ErrorHint(err) == "" {
				t.Errorf("%q: %v", text, err)
			}
		}
		if got := contents(t, path); got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
}

// TestMovedBlock keeps a block where the user has put it.
func TestMovedBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	block := string(document{}.with([]Host{host(t, "a", "web")}))
	write(t, path, "Port 1\n"+strings.TrimSuffix(block, "\n"))
	apply(t, path, plus(host(t, "a", "api")))
	want := "Port 1\n" + string(document{}.with([]Host{host(t, "a", "web"), host(t, "a", "api")}))
	if got := contents(t, path); got != want {
		t.Errorf("%s", got)
	}
	apply(t, path, set())
	if got := contents(t, path); got != "Port 1\n" {
		t.Errorf("%q", got)
	}
}

// FuzzUninstall has any file come back as it was.
func FuzzUninstall(f *testing.F) {
	for _, text := range files {
		if len(text) < 1000 {
			f.Add([]byte(text), true)
		}
	}
	f.Add(document{}.with([]Host{host(f, "a", "web")}), false)
	f.Add([]byte(beginMark+"\n# shed a on b\nHost x\nMatch all\n"+endMark), true)
	one := host(f, "home", "web")
	f.Fuzz(func(t *testing.T, text []byte, add bool) {
		d, err := parse("config", text)
		if err != nil {
			return
		}
		bare := d.with(nil)
		hosts := Named(d.hosts)
		if add {
			hosts = append(hosts, one)
		}
		installed, err := parse("config", d.with(hosts))
		if err != nil {
			t.Fatal(err)
		}
		if got := Render(installed.hosts); string(got) != string(Render(hosts)) {
			t.Fatalf("wrote hosts\n%s\nread hosts\n%s", Render(hosts), got)
		}
		if got := installed.with(nil); string(got) != string(bare) {
			t.Fatalf("%q came back as %q", bare, got)
		}
		include(text)
	})
}
