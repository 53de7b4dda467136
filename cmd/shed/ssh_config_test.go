package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/api/apitest"
)

const (
	sshKeyA = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAi3gcoPrsnJqX/d0HCt4EhDwDjsBVEGfjSeIN1ttkw"
	sshKeyB = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAGfcSmmcRzIUN6ayYkJCtpsrFWKGfJaN67TC6RmOS4x"
)

// serveSSH starts a server with these sheds that says that it listens for SSH at addr. It returns its socket, and
// a function that ends it.
func serveSSH(t *testing.T, addr, key string, sheds ...string) (socket string, stop func()) {
	t.Helper()
	fake := &apitest.Fake{}
	for _, name := range sheds {
		fake.Add(shed.Shed{Name: name, Status: shed.StatusRunning})
	}
	socket = filepath.Join(t.TempDir(), "s")
	return socket, serveOn(t, socket, fake, api.Config{Info: shed.Info{SSH: addr}, HostKey: shed.HostKey{Key: key}})
}

// sshHome makes a home directory with an SSH configuration of the user's.
func sshHome(t *testing.T) (config string) {
	t.Helper()
	home, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", home)
	config = filepath.Join(home, ".ssh", "config")
	if err := os.Mkdir(filepath.Dir(config), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte(userSSH), 0o600); err != nil {
		t.Fatal(err)
	}
	return config
}

const userSSH = "Host *\n  User me\n"

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

func TestSSHConfigPrint(t *testing.T) {
	config := sshHome(t)
	a, _ := serveSSH(t, "0.0.0.0:2222", sshKeyA, "web", "api")
	b, _ := serveSSH(t, "[::1]:2223", sshKeyB, "web")
	path := writeConfig(t, "default_server: a\nservers:\n  a: {socket: "+a+"}\n  b: {socket: "+b+"}\n")
	known := filepath.Join(filepath.Dir(path), "known_hosts")

	if code, stdout, stderr := shedCLI("ssh-config", "--dry-run"); code != 0 || stderr != "" || strings.Count(stdout, "\nHost ") != 2 ||
		!strings.Contains(stdout, "\n\n# shed web on a\nHost shed-web\n    HostName 127.0.0.1\n    Port 2222\n    User web\n    UserKnownHostsFile "+known+"\n") {
		t.Errorf("%d, %s\n%s", code, stderr, stdout)
	}
	if got := readFile(t, known); got != "" {
		t.Errorf("--dry-run pinned %s", got)
	}
	if code, stdout, _ := shedCLI("ssh-config", "api"); code != 0 || strings.Count(stdout, "Host ") != 1 || !strings.Contains(stdout, "User api\n") {
		t.Errorf("of one: %d\n%s", code, stdout)
	}
	pinA, pinB := "[127.0.0.1]:2222 "+sshKeyA+"\n", "[::1]:2223 "+sshKeyB+"\n"
	if got := readFile(t, known); got != pinA {
		t.Errorf("pinned %s", got)
	}
	code, stdout, stderr := shedCLI("ssh-config", "--all")
	if code != 0 || stderr != "Several servers have a shed \"web\": the hosts are shed-web.a, shed-web.b\n" ||
		!strings.Contains(stdout, "Host shed-api\n") || !strings.Contains(stdout, "Host shed-web.a\n    HostName 127.0.0.1\n") ||
		!strings.Contains(stdout, "Host shed-web.b\n    HostName ::1\n    Port 2223\n    User web\n") {
		t.Errorf("--all: %d, %s\n%s", code, stderr, stdout)
	}
	if got := readFile(t, known); got != pinA+pinB {
		t.Errorf("pinned %s", got)
	}
	var doc sshAnswer
	if _, stdout, _ := shedCLI("ssh-config", "--all", "--json"); json.Unmarshal([]byte(stdout), &doc) != nil || len(doc.Hosts) != 3 ||
		doc.Hosts[1] != (sshHost{"shed-web.a", "web", "a"}) || strings.Count(doc.Config, "Host ") != 3 || !strings.Contains(stdout, `"offline": []`) {
		t.Errorf("--json: %s", stdout)
	}
	if got := readFile(t, config); got != userSSH {
		t.Errorf("printing changed the user's file: %s", got)
	}
	// Another server of this name at this address, which its socket vouches for.
	again, _ := serveSSH(t, "127.0.0.1:2222", sshKeyB, "web")
	writeTo(t, path, "servers: {a: {socket: "+again+"}}\n")
	if code, _, stderr := shedCLI("ssh-config"); code != 0 || !strings.HasPrefix(stderr, `The host key of server "a" is another one now: SHA256:`) {
		t.Errorf("%d, %s", code, stderr)
	}
	if got := readFile(t, known); got != pinB+"[127.0.0.1]:2222 "+sshKeyB+"\n" {
		t.Errorf("pinned %s", got)
	}
	// It doesn't vouch for another machine.
	writeTo(t, path, "servers: {a: {socket: "+a+"}, other: {host: 127.0.0.1}}\n")
	if code, stdout, stderr := shedCLI("ssh-config", "-s", "a"); code != 0 || stderr != "" || !strings.Contains(stdout, "Host shed-web") {
		t.Errorf("%d, %s", code, stderr)
	}
	if got := readFile(t, known); got != pinB+"[127.0.0.1]:2222 "+sshKeyB+"\n" {
		t.Errorf("pinned %s", got)
	}
}

func writeTo(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// installedHosts returns the aliases in a file.
func installedHosts(t *testing.T, config string) string {
	t.Helper()
	var hosts []string
	for line := range strings.Lines(readFile(t, config)) {
		if alias, ok := strings.CutPrefix(line, "Host shed-"); ok {
			hosts = append(hosts, strings.TrimSpace(alias))
		}
	}
	return strings.Join(hosts, " ")
}

func TestSSHConfigInstall(t *testing.T) {
	config := sshHome(t)
	a, stopA := serveSSH(t, "127.0.0.1:2222", sshKeyA, "web", "api")
	b, stopB := serveSSH(t, "127.0.0.1:2223", sshKeyB, "web", "db")
	path := writeConfig(t, "default_server: a\nservers:\n  a: {socket: "+a+"}\n  b: {socket: "+b+"}\n")

	code, stdout, stderr := shedCLI("ssh-config", "--install", "--dry-run")
	if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "--- "+config+"\n+++ "+config+"\n@@ -0,0 +1,") || !strings.Contains(stdout, "\n+Host shed-web\n") {
		t.Errorf("--dry-run: %d, %s\n%s", code, stderr, stdout)
	}
	if got := readFile(t, config); got != userSSH {
		t.Errorf("--dry-run changed the file: %s", got)
	}
	expect(t, "ssh-config --install", 0, "shed-api\nshed-web\n", config+" is changed\n")
	expect(t, "ssh-config --install", 0, "shed-api\nshed-web\n", config+" is up to date\n")
	expect(t, "ssh-config --install b/db", 0, "shed-db\n", config+" is changed\n")
	if got := installedHosts(t, config); got != "api db web" {
		t.Errorf("installed: %s", got)
	}
	several := "Several servers have a shed \"web\": the hosts are shed-web.a, shed-web.b\n"
	expect(t, "ssh-config --install -s b", 0, "shed-db\nshed-web.b\n", several+config+" is changed\n")
	expect(t, "ssh-config --install", 0, "shed-api\nshed-web.a\n", several+config+" is up to date\n")
	all := readFile(t, config)
	expect(t, "ssh-config --uninstall b/web", 0, "", config+" is changed\n")
	if got := installedHosts(t, config); got != "api db web" {
		t.Errorf("after --uninstall b/web: %s", got)
	}
	expect(t, "ssh-config --install --all", 0, "shed-api\nshed-db\nshed-web.a\nshed-web.b\n", several+config+" is changed\n")
	if got := readFile(t, config); got != all {
		t.Errorf("--all:\n%s", got)
	}

	// A server that doesn't answer keeps its hosts; one that isn't configured any more doesn't.
	stopB()
	code, stdout, stderr = shedCLI("ssh-config", "--install", "--all")
	if code != 0 || stdout != "shed-api\nshed-web.a\n" || !strings.HasPrefix(stderr, "b is offline: ") ||
		!strings.HasSuffix(stderr, "What "+config+" has of b stays as it was\n"+config+" is up to date\n") || readFile(t, config) != all {
		t.Errorf("one is dead: %d, %s%s", code, stdout, stderr)
	}
	var doc sshAnswer
	if _, stdout, stderr := shedCLI("ssh-config", "--install", "--all", "--json"); json.Unmarshal([]byte(stdout), &doc) != nil || doc.Changed ||
		len(doc.Offline) != 1 || doc.Offline[0].Server != "b" || doc.File != config || len(doc.Hosts) != 2 || stderr != "" {
		t.Errorf("--json: %s%s", stdout, stderr)
	}
	if code, stdout, _ := shedCLI("ssh-config", "--install", "-s", "b"); code != 5 || stdout != "" || readFile(t, config) != all {
		t.Errorf("the one is dead: %d", code)
	}
	writeTo(t, path, "servers: {a: {socket: "+a+"}}\n")
	expect(t, "ssh-config --install", 0, "shed-api\nshed-web.a\n", several+config+" is up to date\n")
	expect(t, "ssh-config --install --all", 0, "shed-api\nshed-web\n", config+" is changed\n")
	if code, _, _ := shedCLI("ssh-config", "--install", "none"); code != 3 || installedHosts(t, config) != "api web" {
		t.Errorf("a shed that isn't there: %d", code)
	}
	stopA()
	if code, stdout, stderr := shedCLI("ssh-config", "--all"); code != 5 || stdout != "" || strings.Count(stderr, "does not answer") != 1 {
		t.Errorf("all are dead: %d, %s%s", code, stdout, stderr)
	}

	// Uninstalling needs no server, and no configuration.
	writeTo(t, path, "servers: {a: [}\n")
	code, stdout, _ = shedCLI("ssh-config", "--uninstall", "--dry-run")
	if code != 0 || !strings.Contains(stdout, "\n-Host shed-web\n") || strings.Contains(stdout, "\n+H") {
		t.Errorf("--dry-run: %d, %s", code, stdout)
	}
	expect(t, "ssh-config --uninstall -s b", 0, "", "There is nothing of that in "+config+"\n")
	expect(t, "ssh-config --uninstall", 0, "", config+" is changed\n")
	expect(t, "ssh-config --uninstall", 0, "", "There is nothing of that in "+config+"\n")
	if got := readFile(t, config); got != userSSH {
		t.Errorf("uninstalled: %s", got)
	}
}

func TestSSHConfigNotes(t *testing.T) {
	config := sshHome(t)
	a, _ := serveSSH(t, "127.0.0.1:2222", sshKeyA, "web")
	none, _ := serveSSH(t, "127.0.0.1:2223", sshKeyA)
	old, _ := serveSSH(t, "", sshKeyA, "web")
	writeConfig(t, "default_server: a\nservers: {a: {socket: "+a+"}, none: {socket: "+none+"}, old: {socket: "+old+"}, a b: {socket: "+a+"}}\n")
	writeTo(t, config, "Include *.conf\n")
	if err := os.Link(config, config+"2"); err != nil {
		t.Fatal(err)
	}
	expect(t, "ssh-config --install -s none", 0, "", noSheds+"\n")
	if got := readFile(t, config); got != "Include *.conf\n" {
		t.Errorf("without sheds: %s", got)
	}
	code, _, stderr := shedCLI("ssh-config", "--install")
	lines := strings.Split(readFile(t, config), "\n")
	if code != 0 || !strings.Contains(stderr, "hard links") || !strings.Contains(stderr, "VS Code and Cursor") || lines[len(lines)-2] != "Include *.conf" ||
		!strings.Contains(stderr, "on line "+strconv.Itoa(len(lines)-1)+" of "+config) {
		t.Errorf("%d, %s", code, stderr)
	}
	expect(t, "ssh-config -s none", 0, "", noSheds+"\n")
	expect(t, "ssh-config -s old", 1, "", "shed: server \"old\" does not say where it listens for SSH (\"\")\n"+
		"hint: is it of the same version as this program? see: shed version\n")
	if code, stdout, stderr := shedCLI("ssh-config", "-s", "a b"); code != 2 || stdout != "" || !strings.Contains(stderr, `"a b" can't be part of the name of a host`) {
		t.Errorf("%d, %s%s", code, stdout, stderr)
	}
}

func TestSSHConfigUsage(t *testing.T) {
	config := sshHome(t)
	writeConfig(t, "servers: {here: {socket: /none}}\n")
	for args, want := range map[string]string{
		"ssh-config a b":                             `takes only NAME, got "b"`,
		"ssh-config --install --uninstall":           "--install and --uninstall are one too many",
		"ssh-config --all web":                       `--all means all sheds, and "web" one of them`,
		"ssh-config --all -s here":                   "--all means all servers, and --server one of them",
		"ssh-config --uninstall A":                   "can't be the name of a shed",
		"ssh-config --uninstall other/web -s here":   `does not name a shed on the server "here"`,
		"ssh-config --install --dry-run /web":        "does not name a shed",
		"ssh-config --install A":                     "can't be the name of a shed",
		"ssh-config --uninstall --dry-run /web":      "does not name a shed",
		"ssh-config --uninstall here/":               "can't be the name of a shed",
		"ssh-config --install -s nowhere --dry-run ": `no server "nowhere"`,
	} {
		if code, stdout, stderr := shedCLI(strings.Fields(args)...); code != exitUsage || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("shed %s: %d, %s%s", args, code, stdout, stderr)
		}
	}
	if got := readFile(t, config); got != userSSH {
		t.Errorf("it changed: %s", got)
	}
}
