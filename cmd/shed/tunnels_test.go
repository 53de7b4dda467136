package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
	"github.com/charliek/shed/internal/porttest"
	"github.com/charliek/shed/internal/tunnel"
	"golang.org/x/sys/unix"
)

// serveTunnels starts a server with the sheds "web" and "db", whose localhost is this machine's, and returns the
// directory of the tunnels' records. At the end no tunnel may be left.
func serveTunnels(t *testing.T) (*apitest.Fake, string) {
	t.Helper()
	fake := &apitest.Fake{Connect: func(ctx context.Context, to shed.Endpoint) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, to.Network, to.Address)
	}}
	for _, name := range []string{"web", "db"} {
		fake.Add(shed.Shed{Name: name, Status: shed.StatusRunning})
	}
	serve(t, fake)
	t.Setenv("SHED_TEST_CLI", "1") // what runs in the background is this program
	dir := filepath.Join(filepath.Dir(os.Getenv("SHED_CONFIG")), "tunnels")
	t.Cleanup(func() {
		if _, err := os.Stat(dir); err != nil {
			return
		}
		if code, _, stderr := shedCLI("tunnels", "stop", "--all"); code != exitOK {
			t.Error(stderr)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	})
	return fake, dir
}

// echoServer sends back what it gets, and returns its port.
func echoServer(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// unusedPort returns a port that nobody listens on, another one each time.
func unusedPort(t *testing.T) int {
	t.Helper()
	port, err := porttest.Unused()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// echoes fails unless what is sent to a port comes back.
func echoes(t *testing.T, port int) {
	t.Helper()
	conn, err := net.Dial("tcp", net.JoinHostPort("localhost", strconv.Itoa(port)))
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, "hello")
	conn.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(conn); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func listTunnels(t *testing.T) []tunnel.Tunnel {
	t.Helper()
	code, stdout, stderr := shedCLI("tunnels", "list", "--json")
	var list []tunnel.Tunnel
	if err := json.Unmarshal([]byte(stdout), &list); code != exitOK || err != nil {
		t.Fatalf("%d, %v: %s%s", code, err, stdout, stderr)
	}
	return list
}

func TestTunnelsUsage(t *testing.T) {
	_, dir := serveTunnels(t)
	yaml := filepath.Join(filepath.Dir(dir), "tunnels.yaml")
	if err := os.WriteFile(yaml, []byte("profiles:\n  web: {ports: [{local: 3000}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"start":                       "needs NAME",
		"start web":                   "needs ports",
		"start web -t x":              `"x" is no port to forward`,
		"start web -t 3000:":          "is no port to forward",
		"start web -t 70000":          "there is no local port 70000",
		"start web -t 3000:70000":     "there is no port 70000 in a shed",
		"start web -t 3000 -t 3000":   "the local port 3000 is there twice",
		"start web -t 3000:1 -p web":  "the local port 3000 is there twice",
		"start web -p nothing":        "there is no profile \"nothing\" in " + yaml,
		"start Web -t 3000":           "can't be the name",
		"start elsewhere/web -t 3000": `no server "elsewhere"`,
		"start web db -t 3000":        "takes only NAME",
		"stop":                        "needs either NAME or --all",
		"stop web --all":              "needs either NAME or --all",
		"stop web db":                 "takes only NAME",
		"stop Web":                    "can't be the name",
		"stop /web":                   "does not name a shed",
		"list web":                    "takes no arguments",
		"config":                      "needs NAME",
		"config web db":               "takes only NAME",
		"strat":                       "did you mean start?",
	} {
		code, _, stderr := shedCLI(append([]string{"tunnels"}, strings.Fields(args)...)...)
		if code != exitUsage || !strings.Contains(stderr, want) {
			t.Errorf("shed tunnels %s: %d, %s", args, code, stderr)
		}
	}
	if err := os.WriteFile(yaml, []byte("profiles:\n  web: {prots: []}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	expect(t, "tunnels start web -p web", exitUsage, "", "shed: "+yaml+":2: unknown key \"prots\"\nhint: the keys there are: ports\n")
	if _, err := os.Stat(dir); err == nil {
		t.Error("what was refused has left something")
	}
	expect(t, "tunnels list", exitOK, "SHED   SERVER   LOCAL   REMOTE   MODE   STATUS   CONNECTIONS   SINCE\n",
		"There are no tunnels. Start one with: shed tunnels start NAME -t PORT\n")
	expect(t, "tunnels list --json", exitOK, "[]\n", "")
	expect(t, "tunnels stop web", exitNotFound, "", "shed: there is no tunnel to web\nhint: list them: shed tunnels list\n")
	expect(t, "tunnels stop --all", exitOK, "", "There are no tunnels.\n")
	expect(t, "tunnels stop --all --json", exitOK, "[]\n", "")
	expect(t, "tunnels start nobody -t 0:1", exitNotFound, "", "shed: there is no shed \"nobody\"\n")
}

func TestTunnelsForeground(t *testing.T) {
	_, _ = serveTunnels(t)
	remote, local := echoServer(t), unusedPort(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		cmd := exec.Command(os.Args[0], "tunnels", "start", "web", "-t", fmt.Sprintf("%d:%d", local, remote), "-t", fmt.Sprintf("0:%d", remote))
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		if line, err := lines.ReadString('\n'); line != fmt.Sprintf("localhost:%d -> web:%d\n", local, remote) {
			t.Errorf("%q, %v, %s", line, err, &stderr)
		}
		var free int
		if line, err := lines.ReadString('\n'); err != nil {
			t.Error(err)
		} else if _, err := fmt.Sscanf(line, "localhost:%d -> ", &free); err != nil || free == 0 {
			t.Errorf("%q, %v", line, err)
		}
		echoes(t, local)
		echoes(t, free)
		if list := listTunnels(t); len(list) != 1 || list[0].PID != cmd.Process.Pid || list[0].Mode != tunnel.Foreground || list[0].Server != "here" {
			t.Errorf("%+v", list)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || stderr.Len() > 0 {
			t.Errorf("%v: %v, %s", sig, err, &stderr)
		}
		expect(t, "tunnels list --json", exitOK, "[]\n", "")
	}
}

func TestTunnelsBackground(t *testing.T) {
	_, dir := serveTunnels(t)
	remote, local, second := echoServer(t), unusedPort(t), unusedPort(t)
	ports := fmt.Sprintf("%d:%d", local, remote)
	line := fmt.Sprintf("localhost:%d -> web:%d\n", local, remote)

	// It holds nothing that this process holds.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	expect(t, "tunnels start web -d -t "+ports, exitOK, line, "It runs in the background; end it with: shed tunnels stop web\n")
	w.Close()
	if n, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read %d bytes, %v", n, err)
	}
	echoes(t, local)
	list := listTunnels(t)
	if len(list) != 1 || list[0].Shed != "web" || list[0].Mode != tunnel.Background || list[0].State != tunnel.Up || filepath.Dir(list[0].Log) != dir {
		t.Fatalf("%+v", list)
	}
	if log, err := os.ReadFile(list[0].Log); err != nil || !strings.Contains(string(log), " forwarding "+strings.TrimSpace(line)) {
		t.Errorf("%q, %v", log, err)
	}
	for listTunnels(t)[0].Connections[0] > 0 { // the last one is about to end
		time.Sleep(time.Millisecond)
	}
	code, stdout, _ := shedCLI("tunnels", "list")
	if want := fmt.Sprintf("web here %d %d background up 0 ", local, remote); code != exitOK ||
		!strings.Contains(strings.Join(strings.Fields(stdout), " "), want) {
		t.Errorf("%d, %s", code, stdout)
	}

	// There is no second one.
	for _, again := range []string{"-d ", "", "-d -s here "} {
		code, stdout, stderr := shedCLI(strings.Fields("tunnels start web " + again + "-t " + ports)...)
		if code != exitOK || stdout != line || !strings.HasPrefix(stderr, "It runs already: in the background") {
			t.Errorf("%d, %q, %q", code, stdout, stderr)
		}
	}
	for _, other := range []string{"db -t " + ports, fmt.Sprintf("web -t %d:1", local), fmt.Sprintf("web -t %s -t %d:1", ports, second)} {
		for _, mode := range []string{"", "-d "} {
			code, _, stderr := shedCLI(strings.Fields("tunnels start " + mode + other)...)
			if code != exitConflict || !strings.Contains(stderr, "is taken by a tunnel: "+strings.TrimSpace(line)) || !strings.Contains(stderr, "--replace") {
				t.Errorf("%s: %d, %q", other, code, stderr)
			}
		}
	}
	if now := listTunnels(t); len(now) != 1 || now[0].PID != list[0].PID {
		t.Errorf("%+v", now)
	}

	// Another takes its place, but not that of another program.
	expect(t, fmt.Sprintf("tunnels start db -d --replace -t %s -t %d:%d", ports, second, remote), exitOK,
		fmt.Sprintf("localhost:%d -> db:%d\nlocalhost:%d -> db:%d\n", local, remote, second, remote),
		"It runs in the background; end it with: shed tunnels stop db\n")
	echoes(t, second)
	for _, mode := range []string{"", "-d "} {
		code, _, stderr := shedCLI(strings.Fields(fmt.Sprintf("tunnels start web %s--replace -t %d:1", mode, remote))...)
		if code != exitConflict || !strings.Contains(stderr, fmt.Sprintf("local port %d is taken by another program", remote)) || !strings.Contains(stderr, "hint: ") {
			t.Errorf("%d, %q", code, stderr)
		}
	}
	if now := listTunnels(t); len(now) != 1 || now[0].Shed != "db" {
		t.Errorf("%+v", now)
	}
	if logs, err := filepath.Glob(filepath.Join(dir, "*.log")); err != nil || len(logs) != 1 {
		t.Errorf("%v, %v", logs, err)
	}
	expect(t, "tunnels stop web", exitNotFound, "", "shed: there is no tunnel to web\nhint: list them: shed tunnels list\n")
	expect(t, "tunnels stop elsewhere/db", exitNotFound, "", "shed: there is no tunnel to db\nhint: list them: shed tunnels list\n")
	expect(t, "tunnels stop here/db", exitOK, fmt.Sprintf("localhost:%d -> db:%d, localhost:%d -> db:%d\n", local, remote, second, remote), "")
	expect(t, "tunnels list --json", exitOK, "[]\n", "")
}

// TestTunnelsServerAway can't start one, and leaves nothing.
func TestTunnelsServerAway(t *testing.T) {
	_, dir := serveTunnels(t)
	writeConfig(t, "servers: {here: {socket: "+filepath.Join(t.TempDir(), "none")+"}}\n")
	for _, mode := range []string{"", "-d "} {
		if code, _, stderr := shedCLI(strings.Fields("tunnels start web " + mode + "-t 0:1")...); code != exitUnreachable {
			t.Errorf("%d, %q", code, stderr)
		}
	}
	// The process in the background, where what came before it went well.
	c := &cli{in: strings.NewReader(""), out: io.Discard, err: io.Discard}
	defer c.close()
	registry := tunnel.NewRegistry(dir)
	rec := tunnel.Record{Shed: "web", Server: "here", Ports: []tunnel.Port{{Local: 0, Remote: 1}}}
	if err := c.startBackground(t.Context(), registry, rec, false); shed.ErrorCode(err) != shed.CodeUnreachable {
		t.Error(err)
	}
	t.Setenv("SHED_CONFIG", filepath.Join(t.TempDir(), "none.yaml"))
	c.configFile, rec.Server = os.Getenv("SHED_CONFIG"), "--bogus"
	if err := c.startBackground(t.Context(), registry, rec, false); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.*")); err != nil || len(left) > 0 {
		t.Error(left, err)
	}
}

func TestTunnelsStartShed(t *testing.T) {
	fake, _ := serveTunnels(t)
	if _, err := fake.Stop(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	remote, local := echoServer(t), unusedPort(t)
	code, stdout, stderr := shedCLI("tunnels", "start", "web", "-d", "--json", "-t", fmt.Sprintf("%d:%d", local, remote))
	var rec tunnel.Record
	if err := json.Unmarshal([]byte(stdout), &rec); err != nil || code != exitOK || rec.Shed != "web" || rec.Ports[0].Local != local {
		t.Errorf("%d, %v, %s", code, err, stdout)
	}
	if !strings.Contains(stderr, "web is stopped: starting it\n") {
		t.Error(stderr)
	}
	echoes(t, local)
	if _, err := fake.Stop(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(local)))
	if err == nil { // else it was reset at once
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it was not refused: %v", err)
	}
	if sh, err := fake.Get(t.Context(), "web"); err != nil || sh.Status != shed.StatusStopped {
		t.Errorf("%+v, %v", sh, err)
	}
	code, stdout, stderr = shedCLI("tunnels", "list")
	if want := fmt.Sprintf("localhost:%d -> web:%d is refusing: shed \"web\" is stopped\n", local, remote); code != exitOK || stderr != want || !strings.Contains(stdout, " refusing ") {
		t.Errorf("%d, %s, %q", code, stdout, stderr)
	}
}

func TestTunnelsSeveralServers(t *testing.T) {
	live := []tunnel.Record{{Shed: "web", Server: "a"}, {Shed: "db", Server: "a"}, {Shed: "web", Server: "b"}}
	for _, test := range []struct {
		server, name string
		want         int
		code         shed.Code
	}{
		{"", "", 3, ""}, {"a", "", 2, ""}, {"c", "", 0, ""}, {"", "db", 1, ""}, {"b", "web", 1, ""},
		{"", "web", 0, shed.CodeInvalid}, {"b", "db", 0, shed.CodeNotFound}, {"", "x", 0, shed.CodeNotFound},
	} {
		got, err := tunnelsOf(live, test.server, test.name)
		if len(got) != test.want || shed.ErrorCode(err) != test.code {
			t.Errorf("%q %q: %v, %v", test.server, test.name, got, err)
		}
	}
}

func TestTunnelsConfig(t *testing.T) {
	fake, _ := serveTunnels(t)
	procNet, status := "", shed.ExitStatus{}
	fake.Run = func(cmd shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus {
		if got := strings.Join(cmd.Args, " "); got != "cat /proc/net/tcp /proc/net/tcp6" {
			t.Error(got)
		}
		out.Write(agent.FrameStdout, []byte(procNet))
		out.Write(agent.FrameStderr, []byte("cat: /proc/net/tcp6: No such file or directory\n"))
		return status
	}
	const header = "  sl  local_address rem_address   st tx_queue\n"
	status.Code = 1
	procNet = header
	expect(t, "tunnels config web", exitOK, "", "Nothing listens on localhost in web.\n")
	for _, port := range []int{3000, 80, 8080, 8081} {
		procNet += fmt.Sprintf("   0: 0100007F:%04X 00000000:0000 0A 00000000:00000000\n", port)
	}
	const text = "profiles:\n  \"web\":\n    ports:\n      - {local: 8082, remote: 80}\n      - {local: 3000, remote: 3000}\n" +
		"      - {local: 8080, remote: 8080}\n      - {local: 8081, remote: 8081}\n"
	expect(t, "tunnels config web", exitOK, text, "")
	file := filepath.Join(t.TempDir(), "tunnels.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	profiles, err := tunnel.LoadProfiles(file)
	if err != nil {
		t.Fatal(err)
	}
	if ports, err := profiles.Ports("web"); err != nil || len(ports) != 4 || tunnel.CheckPorts(ports) != nil {
		t.Error(ports, err)
	}
	code, stdout, _ := shedCLI("tunnels", "config", "web", "--json")
	if want := `{"profiles":{"web":{"ports":[{"local":8082,"remote":80},`; code != exitOK || !strings.HasPrefix(strings.Join(strings.Fields(stdout), ""), want) {
		t.Error(stdout)
	}

	procNet, status = "", shed.ExitStatus{Code: 127, Error: "no program cat"}
	code, _, stderr := shedCLI("tunnels", "config", "web")
	if code != exitError || !strings.Contains(stderr, "no program cat") {
		t.Errorf("%d, %s", code, stderr)
	}
	if _, err := fake.Stop(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = shedCLI("tunnels", "config", "web")
	if code != exitConflict || !strings.Contains(stderr, "nothing listens in web: it is stopped") {
		t.Errorf("%d, %s", code, stderr)
	}
}
