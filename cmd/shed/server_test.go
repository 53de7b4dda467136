package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/charliek/shed/internal/sshconfig"
)

// serveTwo starts the servers a and b, and makes the configuration name them, with a the default, and those in extra.
func serveTwo(t *testing.T, extra string) (a, b *apitest.Fake) {
	t.Helper()
	a, b = &apitest.Fake{}, &apitest.Fake{}
	writeConfig(t, fmt.Sprintf("default_server: a\nservers:\n  a: {socket: %s}\n  b: {socket: %s}\n%s", serveSocket(t, a), serveSocket(t, b), extra))
	return a, b
}

func TestSeveralServers(t *testing.T) {
	a, b := serveTwo(t, "")
	a.Add(shed.Shed{Name: "web"})
	b.Add(shed.Shed{Name: "db"})
	a.Add(shed.Shed{Name: "both"})
	b.Add(shed.Shed{Name: "both"})
	expect(t, "start web db", 0, "web\ndb\n", "")
	expect(t, "start a/both b/both a/both", 0, "both\nboth\n", "")
	expect(t, "start both", 4, "", "shed: there is a shed \"both\" on several servers: a/both, b/both\nhint: say which: a/both, or --server a\n")
	expect(t, "start -s b both db", 0, "both\ndb\n", "")
	expect(t, "start -s a db", 3, "", "shed: there is no shed \"db\"\n")
	expect(t, "start none", 3, "", "shed: there is no shed \"none\" on any server\n")
	expect(t, "start none web alsonone", 3, "", "shed: there is no shed \"none\" on any server\nshed: there is no shed \"alsonone\" on any server\n")
	expect(t, "start No", 2, "", "shed: \"No\" can't be the name of a shed\nhint: use 1 to 63 characters: a-z, 0-9 and '-', with no '-' at either end\n")
	expect(t, "start c/web", 2, "", "shed: there is no server \"c\" in the configuration\nhint: there are: a, b\n")

	expect(t, "create new", 0, "new\n", "new is running on a; open a shell in it with: shed console a/new\n")
	expect(t, "create b/other", 0, "other\n", "other is running on b; open a shell in it with: shed console b/other\n")
	if _, err := b.Get(t.Context(), "other"); err != nil {
		t.Error(err)
	}
	for typed, want := range map[string]string{
		"": "a/both\nnew\nweb\nb/both\ndb\nother\n", "b/": "b/both\nb/db\nb/other\n", "x/": "",
	} {
		if _, stdout, _ := shedCLI("__complete", "start", typed); !strings.HasPrefix(stdout, want+":") {
			t.Errorf("completion of %q: %q", typed, stdout)
		}
	}
	if _, stdout, _ := shedCLI("__complete", "-s", "b", "start", ""); !strings.HasPrefix(stdout, "both\ndb\nother\n:") {
		t.Errorf("completion with a server: %q", stdout)
	}
	if _, stdout, _ := shedCLI("__complete", "server", "remove", ""); !strings.HasPrefix(stdout, "a\nb\n:") {
		t.Errorf("completion of servers: %q", stdout)
	}
}

func TestListAll(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	a, b := serveTwo(t, "  dead: {socket: "+none+"}\n")
	gone := "server \"dead\" at " + none + " does not answer: dial unix " + none + ": connect: no such file or directory"
	const hint = "is shed-server running? start it with: shed-server serve"
	expect(t, "list --all", 0, "NAME   SERVER   BACKEND   STATUS    IMAGE   CPU/MEM   DISK   CREATED\n"+
		"-      dead     -         offline   -       -         -      -\n",
		"There are no sheds. Create one with: shed create NAME\ndead is offline: "+gone+"\nhint: "+hint+"\n")
	a.Add(shed.Shed{Name: "web", Status: shed.StatusStopped, Reason: "tired"})
	b.Add(shed.Shed{Name: "db", Status: shed.StatusRunning})
	b.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	code, stdout, stderr := shedCLI("ls", "-a")
	var cells [][]string
	for line := range strings.Lines(stdout) {
		cells = append(cells, strings.Fields(line)[:4])
	}
	if got := fmt.Sprint(cells); code != 0 || got != "[[NAME SERVER BACKEND STATUS] [db b - running] [web a - stopped] [web b - running] [- dead - offline]]" {
		t.Errorf("%d, %s", code, got)
	}
	if !strings.HasPrefix(stderr, "a/web is stopped: tired\ndead is offline: ") {
		t.Errorf("%q", stderr)
	}
	var doc struct {
		Sheds []struct {
			Server string
			Name   string
		}
		Offline []struct {
			Server string
			Error  shed.Error
		}
	}
	code, stdout, stderr = shedCLI("list", "--all", "--json")
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil || code != 0 || stderr != "" {
		t.Fatalf("%d, %s, %s, %v", code, stdout, stderr, err)
	}
	if got := fmt.Sprint(doc.Sheds); got != "[{a web} {b db} {b web}]" {
		t.Error(got)
	}
	if len(doc.Offline) != 1 || doc.Offline[0].Server != "dead" || doc.Offline[0].Error.Code != shed.CodeUnreachable ||
		doc.Offline[0].Error.Message != gone || doc.Offline[0].Error.Hint != hint {
		t.Errorf("%+v", doc.Offline)
	}
	expect(t, "list --all -s a", 2, "", "shed: --all means all servers, and --server one of them\nhint: usage: shed list  (see: shed list --help)\n")
	// What is dead is in nobody's way.
	expect(t, "start db", 0, "db\n", "")

	expect(t, "server list", 0, "NAME   ADDRESS"+strings.Repeat(" ", len(none)-len("ADDRESS"))+"   DEFAULT   STATUS    VERSION   SHEDS\n"+
		serverRows(t, "a", "yes", "1")+serverRows(t, "b", "-", "2")+"dead   "+none+"   -         offline   -         -\n",
		"dead is offline: "+gone+"\nhint: "+hint+"\n")
	var states []serverState
	code, stdout, _ = shedCLI("server", "ls", "--json")
	if err := json.Unmarshal([]byte(stdout), &states); err != nil || code != 0 || len(states) != 3 {
		t.Fatalf("%d, %s, %v", code, stdout, err)
	}
	if st := states[1]; st.Name != "b" || st.Status != statusOnline || st.Version != "v7" || *st.Sheds != 2 || st.Default || st.Error != nil {
		t.Errorf("%+v", st)
	}
	if st := states[2]; st.Status != statusOffline || st.Error == nil || st.Error.Message != gone {
		t.Errorf("%+v", st)
	}
}

// serverRows returns the row of `server list` for one of serveTwo.
func serverRows(t *testing.T, name, standard, sheds string) string {
	t.Helper()
	text, err := os.ReadFile(os.Getenv("SHED_CONFIG"))
	if err != nil {
		t.Fatal(err)
	}
	var socket, dead string
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": {socket: ")
		switch value = strings.TrimSuffix(value, "}"); key {
		case name:
			socket = value
		case "dead":
			dead = value
		}
	}
	return fmt.Sprintf("%-4s   %-*s   %-7s   online    v7        %s\n", name, max(len(socket), len(dead)), socket, standard, sheds)
}

func TestServerCommands(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	fake := &apitest.Fake{}
	socket := serveSocket(t, fake)
	path := filepath.Join(t.TempDir(), "new", "config.yaml")
	t.Setenv("SHED_CONFIG", path)
	expect(t, "server remove test", 2, "", "shed: there is no server \"test\" in the configuration: it has none\n")
	expect(t, "server set-default test", 2, "", "shed: there is no server \"test\" in the configuration: it has none\nhint: add it with: shed server add HOST\n")
	expect(t, "server add "+socket+"x", 5, "", "shed: the server at "+socket+"x does not answer: dial unix "+socket+"x: connect: no such file or directory\n"+
		"hint: is shed-server running? start it with: shed-server serve\n")
	if _, err := os.Stat(path); err == nil {
		t.Error("there is a configuration")
	}
	expect(t, "server add "+socket, 0, "test\n", "Added server test at "+socket+", the default.\n")
	expect(t, "server add unix:"+socket+" --name again", 4, "", "shed: the server at "+socket+" is there already, as \"test\"\n"+
		"hint: to give it another name, remove it first: shed server remove test\n")
	other := serveSocket(t, fake)
	expect(t, "server add "+other, 4, "", "shed: there is a server \"test\" already, at "+socket+"\n"+
		"hint: give this one another name with --name, or remove that one: shed server remove test\n")
	expect(t, "server add "+other+" --name other --json", 0, "{\n  \"name\": \"other\",\n  \"address\": \""+other+"\",\n  \"default\": false,\n"+
		"  \"status\": \"online\",\n  \"version\": \"v7\"\n}\n", "")
	expect(t, "server set-default other", 0, "other\n", "")
	expect(t, "server set-default third", 2, "", "shed: there is no server \"third\" in the configuration\nhint: there are: other, test\n")
	text, err := os.ReadFile(path)
	if err != nil || string(text) != "default_server: other\nservers:\n  test:\n    socket: "+socket+"\n  other:\n    socket: "+other+"\n" {
		t.Errorf("%s, %v", text, err)
	}
	sshConfig := filepath.Join(os.Getenv("HOME"), ".ssh", "config")
	if _, err := sshconfig.Apply(t.Context(), sshConfig, func([]sshconfig.Host) (hosts []sshconfig.Host, err error) {
		for _, server := range []string{"test", "other"} {
			h, err := sshconfig.NewHost(server, "on-"+server, sshconfig.Address{Host: "127.0.0.1", Port: 1, KnownHosts: "/known"})
			if err != nil {
				return nil, err
			}
			hosts = append(hosts, h)
		}
		return hosts, nil
	}); err != nil {
		t.Fatal(err)
	}
	expect(t, "server remove other --json", 0, "{\n  \"removed\": \"other\"\n}\n", "")
	if text, err := os.ReadFile(sshConfig); err != nil || !strings.Contains(string(text), "on-test") || strings.Contains(string(text), "on-other") {
		t.Errorf("the hosts of the server that was removed: %s, %v", text, err)
	}
	expect(t, "server rm test", 0, "test\n", "")
	for args, want := range map[string]string{
		"server add":                              "needs HOST",
		"server add a b":                          "takes only HOST",
		"server add -- -a":                        "is no host",
		"server add a:2222":                       "a --ssh-port 2222",
		"server add a --name x/y":                 "can't be the name of a server",
		"server add a --ssh-port 0":               "--ssh-port 0 is no port",
		"server add a --http-port 65536":          "--http-port 65536 is no port",
		"server add a --fingerprint MD5:aa":       "--fingerprint \"MD5:aa\" is none",
		"server add " + socket + " --ssh-port 22": "a server with a socket has no ports",
		"server list x":                           "takes no arguments",
		"server remove":                           "needs NAME",
		"server bogus":                            "unknown command \"bogus\" for \"shed server\"",
	} {
		if code, stdout, stderr := shedCLI(strings.Fields(args)...); code != exitUsage || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("shed %s: %d, %q, %q", args, code, stdout, stderr)
		}
	}
}

// A server that has what is asked for is not held up by one that never answers.
func TestSilentServer(t *testing.T) {
	a, b := serveTwo(t, "")
	a.Add(shed.Shed{Name: "web"})
	b.Before = func(ctx context.Context, _, _ string, _ shed.Progress) error {
		<-ctx.Done()
		return ctx.Err()
	}
	expect(t, "start web", 0, "web\n", "")
	expect(t, "start web", 0, "web\n", "")
	text, err := os.ReadFile(filepath.Join(filepath.Dir(os.Getenv("SHED_CONFIG")), "lookup.json"))
	if err != nil || !strings.Contains(string(text), `"silent": true`) {
		t.Errorf("%s, %v", text, err)
	}
	if code, stdout, stderr := shedCLI("list", "--all"); code != 0 || !strings.Contains(stdout, "web") || !strings.HasPrefix(stderr, "b is offline: no answer within 3s\n") {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
}
