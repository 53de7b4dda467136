package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/api/apitest"
)

// TestMain makes this program the CLI where a test runs it as one.
func TestMain(m *testing.M) {
	if os.Getenv("SHED_TEST_CLI") != "" {
		os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// serve starts a server of fake and makes it the default of the CLI.
func serve(t *testing.T, fake *apitest.Fake) {
	t.Helper()
	writeConfig(t, "servers:\n  here:\n    socket: "+serveSocket(t, fake)+"\n")
}

// serveSocket starts a server of fake and returns its socket.
func serveSocket(t *testing.T, fake *apitest.Fake) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	info := shed.Info{Name: "test", Version: "v7", Backend: "qemu", Backends: []string{"qemu"}, Accel: "tcg"}
	serveOn(t, socket, fake, api.Config{Info: info})
	return socket
}

// serveOn serves fake on a socket until stop is called, or the test ends.
func serveOn(t *testing.T, socket string, fake *apitest.Fake, cfg api.Config) (stop func()) {
	t.Helper()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Sheds, cfg.Images, cfg.Log = fake, fake, slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, ln, api.NewServer(cfg), cfg.Log) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		fake.WaitCommands()
	})
	t.Cleanup(stop)
	return stop
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SHED_CONFIG", path)
	return path
}

// shedCLI runs a command line without stdin.
func shedCLI(args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = run(args, strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

func expect(t *testing.T, args string, code int, stdout, stderr string) {
	t.Helper()
	gotCode, gotOut, gotErr := shedCLI(strings.Fields(args)...)
	if gotCode != code || gotOut != stdout || gotErr != stderr {
		t.Errorf("shed %s\nexit code %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q", args, gotCode, code, gotOut, stdout, gotErr, stderr)
	}
}

func TestUsage(t *testing.T) {
	serve(t, &apitest.Fake{})
	for args, want := range map[string]string{
		"strat web":                       `hint: did you mean start?`,
		"strat web --force":               `hint: did you mean start?`,
		"image bild base":                 `hint: did you mean build?`,
		"xyzzy":                           `unknown command "xyzzy" for "shed"`,
		"help xyzzy":                      `unknown command "xyzzy" for "shed"`,
		"help image bild":                 `hint: did you mean build?`,
		"list --bogus":                    `unknown flag: --bogus`,
		"list x":                          `shed list takes no arguments, got "x"`,
		"start":                           `shed start needs NAME`,
		"create":                          `shed create needs NAME`,
		"create a b":                      `shed create takes only NAME, got "b"`,
		"create a --timeout 5":            `"--timeout" flag: "5" is no time: use a number with a unit, like 10m`,
		"create a --timeout 0s":           `"0s" is no time`,
		"create a --timeout -1m":          `"-1m" is no time`,
		"create a --memory lots":          `"lots" is no size: use a number like 2048 (in MB) or 4G`,
		"create a --memory 100K":          `no size`,
		"create a --upper-size -1G":       `no size`,
		"create a --cpus x":               `invalid argument "x" for "--cpus" flag: invalid syntax`,
		"create A":                        `can't be the name of a shed`,
		"exec":                            `shed exec needs NAME and CMD`,
		"exec web":                        `needs CMD`,
		"exec web --":                     `needs CMD`,
		"exec web --workdir /tmp pwd":     `flags for shed come before NAME`,
		"exec -e novalue web true":        `not of the form K=V`,
		"exec --json web true":            `no --json`,
		"console web":                     `hint: run a command with: shed exec web CMD`,
		"delete web":                      `needs --force`,
		"reset web":                       `needs --force`,
		"delete --json web":               `needs --force`,
		"-s nowhere list":                 `no server "nowhere"`,
		"-s here list -c /does/not/exist": `no such file`,
		"-s here start other/web":         `does not name a shed`,
		"logs --json -f web":              `no --json`,
		"completion tcsh":                 `bash, zsh, fish, powershell`,
	} {
		code, stdout, stderr := shedCLI(strings.Fields(args)...)
		if code != exitUsage {
			t.Errorf("shed %s: exit code %d", args, code)
		}
		said := stderr
		if strings.Contains(args, "--json") {
			var body struct{ Error shed.Error }
			if err := json.Unmarshal([]byte(stdout), &body); err != nil || body.Error.Code != shed.CodeInvalid {
				t.Errorf("shed %s: stdout %q", args, stdout)
			}
			said = body.Error.Message
			stdout = ""
		} else if !strings.HasPrefix(stderr, "shed: ") || !strings.Contains(stderr, "\nhint: ") && !strings.Contains(args, "-c /does") {
			t.Errorf("shed %s: stderr %q", args, stderr)
		}
		if stdout != "" || !strings.Contains(said, want) {
			t.Errorf("shed %s: stdout %q, stderr %q", args, stdout, stderr)
		}
	}
	if code, stdout, _ := shedCLI("list", "--bogus", "--json"); code != exitUsage || !json.Valid([]byte(stdout)) {
		t.Errorf("a usage error before --json: %d, %q", code, stdout)
	}
	for _, args := range []string{"", "-h", "image", "create --help", "exec -h", "help", "help create", "help image pull"} {
		if code, stdout, stderr := shedCLI(strings.Fields(args)...); code != 0 || !strings.Contains(stdout, "Usage:") || stderr != "" {
			t.Errorf("shed %s: %d, %q, %q", args, code, stdout, stderr)
		}
	}
}

func TestExitCodes(t *testing.T) {
	fake := &apitest.Fake{}
	fake.Add(shed.Shed{Name: "web"})
	serve(t, fake)
	for code, want := range map[shed.Code]int{
		shed.CodeInvalid: 2, shed.CodeNotFound: 3, shed.CodeNoImage: 3, shed.CodeExists: 4, shed.CodeConflict: 4,
		shed.CodeUnreachable: 5, shed.CodeCommand: 1, shed.CodeNoSpace: 1, shed.CodeBoot: 1, shed.CodeUnsupported: 1, shed.CodeInternal: 1,
	} {
		fake.Before = func(context.Context, string, string, shed.Progress) error {
			return shed.Errorf(code, "no good\x1b[2J").WithHint("try again")
		}
		expect(t, "start web", want, "", "shed: no good\uFFFD[2J\nhint: try again\n")
		expect(t, "start web --json", want, "{\n  \"error\": {\n    \"code\": \""+string(code)+"\",\n    \"message\": \"no good\\u001b[2J\",\n    \"hint\": \"try again\"\n  }\n}\n", "")
		expect(t, "exec web true", 255, "", "shed: no good\uFFFD[2J\nhint: try again\n")
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	writeConfig(t, "servers: {here: {socket: "+dir+"/none}}")
	want := "shed: server \"here\" at " + dir + "/none does not answer: dial unix " + dir + "/none: connect: no such file or directory\n" +
		"hint: is shed-server running? start it with: shed-server serve\n"
	expect(t, "list", 5, "", want)
	expect(t, "exec web true", 255, "", want)
	code, stdout, stderr := shedCLI("version")
	if code != 0 || !strings.HasPrefix(stdout, "client: ") || strings.Contains(stdout, "server") || !strings.Contains(stderr, "does not answer") {
		t.Errorf("version: %d, %q, %q", code, stdout, stderr)
	}
}

func TestConfig(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	for text, want := range map[string]string{
		"default_server: a\nservers:\n  a:\n    sockt: /x\n": ":4: unknown key \"sockt\"\nhint: the keys there are: host, http_port, ssh_port, socket\n",
		"servers: {a: {socket: /x}, b: {sockt: /x}}\n":       ":1: unknown key \"sockt\"\nhint: the keys there are: host, http_port, ssh_port, socket\n",
		"default_servers: a\n":                               ":1: unknown key \"default_servers\"\nhint: the keys there are: default_server, servers\n",
		"servers:\n  a:\n    http_port: many\n":              ":3: http_port: this must be a whole number\n",
		"servers:\n  a: {socket: [x]}\n":                     ":2: socket: this must be text\n",
		"servers:\n  a: {host: x\n":                          ":2: could not find flow mapping end token '}'\n",
	} {
		path := writeConfig(t, text)
		expect(t, "list", 2, "", "shed: "+path+want)
	}
	path := writeConfig(t, "servers:\n  a: {host: x, socket: /y}\n")
	expect(t, "list", 2, "", "shed: "+path+": server \"a\" needs either a host or a socket\n")
	path = writeConfig(t, "default_server: b\nservers:\n  a: {socket: /y}\n")
	expect(t, "list", 2, "", "shed: "+path+": default_server: there is no server \"b\" in the configuration\nhint: there are: a\n")
	path = writeConfig(t, "servers:\n  a: {socket: /x}\n  b: {socket: /y}\n")
	expect(t, "list", 2, "", "shed: "+path+" has several servers and no default_server\nhint: choose one with --server: a, b\n")
	path = writeConfig(t, "servers:\n  a: {host: -oProxyCommand=x}\n")
	expect(t, "list", 2, "", "shed: "+path+": server \"a\" host: \"-oProxyCommand=x\" is no name or IP address\n")
}

func TestLifecycle(t *testing.T) {
	fake := &apitest.Fake{}
	serve(t, fake)
	expect(t, "list", 0, "NAME   BACKEND   STATUS   IMAGE   CPU/MEM   DISK   CREATED\n", "There are no sheds. Create one with: shed create NAME\n")
	expect(t, "list --json", 0, "[]\n", "")
	expect(t, "create web -i base --backend qemu --cpus 2 --memory 4G --upper-size 2G -r a/b --no-provision", 0,
		"web\n", "web is running; open a shell in it with: shed console web\n")
	sh, err := fake.Get(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	want := shed.Shed{Name: "web", Backend: "qemu", Status: shed.StatusRunning, Image: "base", CPUs: 2, MemoryMB: 4096, UpperSize: 2 << 30,
		DiskUsed: 3 << 20, Repo: "a/b", Workspace: "/home/shed", CreatedAt: apitest.Created}
	if *sh != want {
		t.Errorf("created %+v", sh)
	}
	expect(t, "create web", 4, "", "shed: there is a shed \"web\" already\nhint: delete it, or take another name\n")
	expect(t, "create small --memory 512 -i base --backend qemu", 0, "small\n", "small is running; open a shell in it with: shed console small\n")
	expect(t, "stop web here/small", 0, "web\nsmall\n", "")
	for _, verb := range []string{"start", "stop", "reset --force", "delete --force"} {
		expect(t, verb+" none web alsonone", 3, "", "shed: there is no shed \"none\"\nshed: there is no shed \"alsonone\"\n")
		if sh, err := fake.Get(t.Context(), "web"); err != nil || sh.Status != shed.StatusStopped {
			t.Errorf("after %s of one that isn't there: %+v, %v", verb, sh, err)
		}
	}
	expect(t, "start web web", 0, "web\n", "")
	expect(t, "reset --force web", 4, "", "shed: web is running\nhint: stop it first: shed stop web\n")
	fake.Add(shed.Shed{Name: "broken", Status: shed.StatusStopped, Backend: "qemu", MemoryMB: 1500, Reason: "the machine ended\x1b[31m", CreatedAt: time.Now()})
	code, stdout, stderr := shedCLI("ls")
	if code != 0 || stderr != "broken is stopped: the machine ended\uFFFD[31m\n" {
		t.Errorf("ls: %d, %q", code, stderr)
	}
	lines := strings.Split(stdout, "\n")
	if len(lines) != 5 || lines[0] != "NAME     BACKEND   STATUS    IMAGE   CPU/MEM   DISK      CREATED" ||
		lines[1] != "broken   qemu      stopped   -       0/1500M   0 B       now" ||
		!strings.HasPrefix(lines[3], "web      qemu      running   base    2/4G      3.0 MiB   ") {
		t.Errorf("ls:\n%s", stdout)
	}
	var list []shed.Shed
	if _, stdout, _ := shedCLI("ls", "--json"); json.Unmarshal([]byte(stdout), &list) != nil || len(list) != 3 || list[2].UpperSize != 2<<30 {
		t.Errorf("ls --json: %s", stdout)
	}
	if _, stdout, _ := shedCLI("stop", "--json", "web", "small"); json.Unmarshal([]byte(stdout), &list) != nil || len(list) != 2 || list[0].Status != shed.StatusStopped {
		t.Errorf("stop --json: %s", stdout)
	}
	expect(t, "delete --force web", 0, "web\n", "")
	expect(t, "delete --force --json small broken", 0, "{\n  \"deleted\": [\n    \"small\",\n    \"broken\"\n  ]\n}\n", "")
	expect(t, "delete --force web", 3, "", "shed: there is no shed \"web\"\n")
}

func TestProgressLines(t *testing.T) {
	fake := &apitest.Fake{Before: func(_ context.Context, _, _ string, p shed.Progress) error {
		p.Report(shed.Event{Phase: "pull", Message: "pulling\n debian:12\x07"})
		p.Report(shed.Event{Phase: "pull", Message: "unpacking"})
		p.Report(shed.Event{Phase: "pull", Item: "layer", Current: 7, Unit: "bytes", Done: true})
		p.Report(shed.Event{Phase: "pull", Current: 5, Total: 10, Unit: "bytes"})
		p.Report(shed.Event{Phase: "pull", Done: true, Elapsed: 1250 * time.Millisecond})
		p.Phase("boot", "")
		p.Report(shed.Event{Phase: "boot", Done: true, Elapsed: 83 * time.Second})
		return nil
	}}
	serve(t, fake)
	fake.Add(shed.Shed{Name: "web"})
	code, stdout, stderr := shedCLI("start", "web")
	want := regexp.MustCompile("^start web: layer  7 B \\.\\.\\. [0-9.]+s\nstart web: pulling debian:12\uFFFD \\.\\.\\. 1\\.2s\nstart web: boot \\.\\.\\. 1m23s\n$")
	if code != 0 || stdout != "web\n" || !want.MatchString(stderr) {
		t.Errorf("start: %d, %q, %q", code, stdout, stderr)
	}
	code, stdout, stderr = shedCLI("start", "web", "-vv", "--json")
	if code != 0 || !json.Valid([]byte(stdout)) || !strings.Contains(stderr, "start web: pulling debian:12\uFFFD: unpacking 5 B/10 B\n") || !strings.Contains(stderr, "POST /api/sheds/web/start: 200 OK after ") {
		t.Errorf("start -vv --json: %d, %q, %q", code, stdout, stderr)
	}
}

// slowCreate is a Before that creates until nobody asks for it any more, and then takes a while to undo it.
func slowCreate(fake *apitest.Fake, creating func()) {
	fake.Before = func(ctx context.Context, op, name string, _ shed.Progress) error {
		if op != "create" {
			return nil
		}
		fake.Add(shed.Shed{Name: name, Status: shed.StatusCreating})
		creating()
		<-ctx.Done()
		time.Sleep(3 * undoPoll)
		fake.Delete(context.Background(), name, nil)
		return ctx.Err()
	}
}

func TestCreateTimeout(t *testing.T) {
	fake := &apitest.Fake{}
	slowCreate(fake, func() {})
	serve(t, fake)
	expect(t, "create web --timeout 2s", 1, "", "shed: create web: not done after 2s, so it was undone: nothing of it is left\nhint: allow more with --timeout\n")
	if list, err := fake.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("it said so before it was so: %+v, %v", list, err)
	}
}

// The server may read the request only after it was given up.
func TestCreateReadLate(t *testing.T) {
	gets := 0
	fake := &apitest.Fake{}
	fake.Before = func(ctx context.Context, op, name string, _ shed.Progress) error {
		switch op {
		case "create":
			<-ctx.Done()
			return ctx.Err()
		case "get":
			switch gets++; gets {
			case 2:
				fake.Add(shed.Shed{Name: name, Status: shed.StatusCreating})
			case 4:
				fake.Delete(context.Background(), name, nil)
			}
		}
		return nil
	}
	serve(t, fake)
	expect(t, "create web --timeout 1ms", 1, "", "shed: create web: not done after 1ms, so it was undone: nothing of it is left\nhint: allow more with --timeout\n")
	if gets != 4 {
		t.Errorf("it asked %d times", gets)
	}
}

func TestCreateInterrupted(t *testing.T) {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	fake := &apitest.Fake{}
	slowCreate(fake, func() { self.Signal(os.Interrupt) })
	serve(t, fake)
	expect(t, "create web", 1, "", "shed: create web: interrupted, so it was undone: nothing of it is left\n")
	if list, err := fake.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("it said so before it was so: %+v, %v", list, err)
	}
	// It may have been there before the interrupt came.
	fake.Before = func(ctx context.Context, op, _ string, _ shed.Progress) error {
		if op != "create" {
			return nil
		}
		self.Signal(os.Interrupt)
		<-ctx.Done()
		return ctx.Err()
	}
	fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	expect(t, "create web", 1, "", "shed: create web: interrupted; there is a shed of that name, which is running\nhint: shed delete web removes it\n")
}

func TestTimeLimit(t *testing.T) {
	for value, want := range map[string]string{"90s": "1m30s", "10m": "10m", "1h": "1h0m", "1h30m": "1h30m", "50ms": "50ms"} {
		var l timeLimit
		if err := l.Set(value); err != nil || l.String() != want {
			t.Errorf("%s: %s, %v", value, l.String(), err)
		}
	}
}

func TestLogs(t *testing.T) {
	fake := &apitest.Fake{Log: func(context.Context, bool) io.ReadCloser { return io.NopCloser(strings.NewReader("a\x00b\n")) }}
	fake.Add(shed.Shed{Name: "web"})
	serve(t, fake)
	expect(t, "logs web", 0, "a\x00b\n", "")
	expect(t, "logs -f here/web", 0, "a\x00b\n", "")
	expect(t, "logs web --json", 0, "{\n  \"name\": \"web\",\n  \"logs\": \"a\\u0000b\\n\"\n}\n", "")
	expect(t, "logs none", 3, "", "shed: there is no shed \"none\"\n")
}

func TestVersion(t *testing.T) {
	serve(t, &apitest.Fake{})
	if code, stdout, _ := shedCLI("version"); code != 0 || !strings.Contains(stdout, "\nserver: v7 (test, qemu with tcg)\n") {
		t.Errorf("version: %d, %q", code, stdout)
	}
	var answer struct {
		Client clientInfo
		Server shed.Info
	}
	if code, stdout, _ := shedCLI("version", "--json"); code != 0 || json.Unmarshal([]byte(stdout), &answer) != nil || answer.Server.Version != "v7" || answer.Client.Version == "" {
		t.Errorf("version --json: %d, %q", code, stdout)
	}
}

func TestCompletion(t *testing.T) {
	fake := &apitest.Fake{}
	fake.Add(shed.Shed{Name: "web"})
	serve(t, fake)
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, stdout, stderr := shedCLI("completion", shell); code != 0 || !strings.Contains(stdout, "shed") || stderr != "" {
			t.Errorf("completion %s: %d, %q", shell, code, stderr)
		}
	}
	if _, stdout, _ := shedCLI("__complete", "start", ""); !strings.HasPrefix(stdout, "web\n") {
		t.Errorf("completion of names: %q", stdout)
	}
}

func TestSizes(t *testing.T) {
	for value, want := range map[string]int64{"512": 512, "4G": 4096, "4gb": 4096, "4GiB": 4096, "1T": 1 << 20, "2048M": 2048, "2048K": 2} {
		s := binarySize{unit: 1 << 20}
		if err := s.Set(value); err != nil || s.n != want {
			t.Errorf("%s: %d, %v", value, s.n, err)
		}
	}
	for _, value := range []string{"", "G", "0", "-1", "1.5G", "4GG", "4X", "99999999999999T", "1K"} {
		s := binarySize{unit: 1 << 20}
		if err := s.Set(value); err == nil {
			t.Errorf("%q was taken for %d", value, s.n)
		}
	}
}
