package client

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeSSH makes a script the only OpenSSH that there is. It has the programs of /bin.
func fakeSSH(t *testing.T, script string) {
	t.Helper()
	path := filepath.Join(os.Getenv("HOME"), "bin", "ssh")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestSettings(t *testing.T) {
	dir, _ := home(t)
	t.Setenv("SSH_AUTH_SOCK", "/agent")
	t.Setenv("OTHER", "/other")
	t.Setenv("SHELL", "/bin/sh")
	for text, want := range map[string]settings{
		"":                             {agent: "/agent"},
		"hostname 10.0.0.1":            {hostName: "10.0.0.1", agent: "/agent"},
		"hostname -oProxyCommand=x":    {agent: "/agent"},
		"identityfile ~/.ssh/a":        {identities: []string{dir + "/.ssh/a"}, agent: "/agent"},
		"identityfile %d/%h %n\r":      {identities: []string{dir + "/h n"}, agent: "/agent"},
		"identityfile %T/x":            {agent: "/agent"},
		"identityfile x%":              {agent: "/agent"},
		"identityfile none":            {agent: "/agent"},
		"CertificateFile /c\nfoo\n\n ": {certificates: []string{"/c"}, agent: "/agent"},
		"identitiesonly yes":           {identitiesOnly: true, agent: "/agent"},
		"identityagent none":           {},
		"identityagent SSH_AUTH_SOCK":  {agent: "/agent"},
		"identityagent $OTHER":         {agent: "/other"},
		"identityagent ${OTHER}":       {agent: "/other"},
		"identityagent ~/a":            {agent: dir + "/a"},
		"identityagent %T":             {},
		"proxyjump none":               {agent: "/agent"},
		"proxycommand none":            {agent: "/agent"},
		"proxyjump me@j:7":             {agent: "/agent", proxy: []string{"ssh", "-W", "h:2222", "ssh://me@j:7"}},
		"proxyjump a,ssh://b":          {agent: "/agent", proxy: []string{"ssh", "-W", "h:2222", "-J", "a", "ssh://b"}},
		"proxyjump j\nhostname ::1":    {hostName: "::1", agent: "/agent", proxy: []string{"ssh", "-W", "[::1]:2222", "ssh://j"}},
		"proxycommand nc %h %p %%":     {agent: "/agent", proxy: []string{"/bin/sh", "-c", "exec nc h 2222 %"}},
		"proxycommand nc %z":           {agent: "/agent"},
	} {
		if want.hostName == "" {
			want.hostName = "h"
		}
		if strings.Contains(text, "%n") {
			want.identities = []string{dir + "/h h"}
		}
		if got := parseSettings([]byte(text), "h", 2222); !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\n%+v\nwant\n%+v", text, got, want)
		}
	}
}

func TestLoadSettings(t *testing.T) {
	dir, _ := home(t)
	if got, err := loadSettings(t.Context(), "h", 7); err != nil || !reflect.DeepEqual(got, defaultSettings("h")) {
		t.Errorf("without OpenSSH: %+v, %v", got, err)
	}
	fakeSSH(t, `[ "$*" = "-G -p 7 -l _api h" ] && echo hostname there`)
	if got, err := loadSettings(t.Context(), "h", 7); err != nil || got.hostName != "there" {
		t.Errorf("%+v, %v", got, err)
	}
	const waits = "sleep 100000 & echo $! >$HOME/pid; wait"
	for script, want := range map[string]string{
		"echo bad line >&2; exit 255": "bad line",
		"yes hostname x":              "too much output",
		waits:                         "no answer within",
	} {
		fakeSSH(t, script)
		got, err := loadSettings(t.Context(), "h", 7)
		if err == nil || !strings.Contains(err.Error(), want) || !reflect.DeepEqual(got, defaultSettings("h")) {
			t.Errorf("%s: %+v, %v", script, got, err)
		}
	}
	// What it had started has ended too.
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	for ; errors.Is(err, fs.ErrNotExist); pid, err = os.ReadFile(filepath.Join(dir, "pid")) {
		fakeSSH(t, waits) // a busy machine may have had no time for it
		loadSettings(t.Context(), "h", 7)
	}
	if err != nil {
		t.Fatal(err)
	}
	for {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// realSSH gives the test a home directory, and an OpenSSH that reads the file called config instead of the user's.
func realSSH(t *testing.T) (dir, config string) {
	t.Helper()
	real, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatalf("this test needs OpenSSH's client (package openssh-client): %v", err)
	}
	dir, _ = home(t)
	config = filepath.Join(dir, "config")
	fakeSSH(t, fmt.Sprintf("exec %s -F %s \"$@\"\n", real, config))
	return dir, config
}

// OpenSSH's own words are understood.
func TestRealSettings(t *testing.T) {
	dir, config := realSSH(t)
	write(t, config, "Host h\n  HostName there.example\n  IdentityFile ~/.ssh/mine\n  IdentitiesOnly yes\n  IdentityAgent none\n  ProxyJump j1,me@j2:7\n  Port 99\n")
	got, err := loadSettings(t.Context(), "h", 2222)
	want := settings{
		hostName: "there.example", identities: []string{dir + "/.ssh/mine"}, identitiesOnly: true,
		proxy: []string{"ssh", "-W", "there.example:2222", "-J", "j1", "ssh://me@j2:7"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	write(t, config, "")
	got, err = loadSettings(t.Context(), "h", 2222)
	if err != nil || got.hostName != "h" || got.proxy != nil || !strings.Contains(strings.Join(got.identities, " "), dir+"/.ssh/id_ed25519") {
		t.Errorf("%+v, %v", got, err)
	}
}

// A proxy is a command between the two, and what it says is told where it fails.
func TestProxy(t *testing.T) {
	dir, public := home(t)
	s := newServer(t, public)
	t.Setenv("SHELL", "/bin/sh")
	// This program is the proxy, as there is no other that is everywhere.
	t.Setenv("CLIENT_TEST_PROXY", s.addr)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	fakeSSH(t, "echo proxycommand "+self+"\necho identityfile ~/.ssh/id_ed25519\n")
	var mu sync.Mutex
	var notes []string
	_, client := s.connect(Options{Note: func(line string) {
		mu.Lock()
		defer mu.Unlock()
		notes = append(notes, line)
	}})
	if _, err := client.List(t.Context()); err != nil {
		t.Error(err)
	}
	if said := strings.Join(notes, "\n"); !strings.Contains(said, "through [\"/bin/sh\"") || !strings.Contains(said, "logged in") {
		t.Errorf("%q", said)
	}
	fakeSSH(t, "echo proxycommand sh -c \\'echo no route to the jump host \\>\\&2\\'\n")
	_, client = s.connect(Options{})
	t.Setenv("PATH", filepath.Join(dir, "bin")+":/usr/bin:/bin")
	_, err = client.List(t.Context())
	wantError(t, err, "no route to the jump host")
}

func FuzzSettings(f *testing.F) {
	f.Add("hostname h\nproxyjump a,b\nidentityfile %d/x\n")
	f.Add("proxycommand %")
	f.Fuzz(func(t *testing.T, text string) {
		s := parseSettings([]byte(text), "h", 1)
		if !isHost(s.hostName) {
			t.Errorf("the host %q", s.hostName)
		}
	})
}

// What the user's configuration says about a host, as real ssh reads it, and about no other is what its other names need too.
func TestHostOptions(t *testing.T) {
	dir, config := realSSH(t)
	write(t, config, `
Host home
  HostName 100.64.0.7
  IdentityFile "~/.ssh/home key"
  ProxyJump jump.example
Host plain
Host command
  ProxyCommand nc -X 5 %n %p
Host *
  IdentityFile ~/.ssh/everywhere
  ServerAliveInterval 7
`)
	ssh, err := os.ReadFile(filepath.Join(dir, "bin", "ssh"))
	if err != nil {
		t.Fatal(err)
	}
	fakeSSH(t, "echo \"$*\" >>$HOME/asked\n"+string(ssh))
	servers := open(t, Options{}, nil)
	for host, want := range map[string][]string{
		"home":    {"HostName 100.64.0.7", `IdentityFile "~/.ssh/home key"`, "IdentityFile ~/.ssh/everywhere", "ProxyJump jump.example"},
		"Plain":   nil,
		"command": {"ProxyCommand nc -X 5 command %p"},
		"other":   nil,
	} {
		got, err := servers.HostOptions(t.Context(), host, 2222)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v; want %q", host, got, err, want)
		}
	}
	asked, err := os.ReadFile(filepath.Join(dir, "asked"))
	if n := strings.Count(string(asked), anyHost); err != nil || n != 1 {
		t.Errorf("asked %d times about no host of the user's: %s%v", n, asked, err)
	}
}
