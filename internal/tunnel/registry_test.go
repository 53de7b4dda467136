//go:build linux || darwin

package tunnel

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/porttest"
)

// claimEnv has the arguments of claimInProcess where this program is to be that.
const claimEnv = "SHED_TEST_CLAIM"

type claimArgs struct {
	Dir      string
	Record   Record
	Replace  bool
	Stubborn bool // doesn't end on SIGTERM
}

func TestMain(m *testing.M) {
	if text := os.Getenv(claimEnv); text != "" {
		claimInProcess(text)
		return
	}
	os.Exit(m.Run())
}

// claimInProcess claims a tunnel, says how that went, and serves it until SIGTERM.
func claimInProcess(text string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var args claimArgs
	if err := json.Unmarshal([]byte(text), &args); err != nil {
		panic(err)
	}
	if args.Stubborn {
		ctx = context.Background()
	}
	c, running, err := NewRegistry(args.Dir).Claim(ctx, args.Record, args.Replace)
	switch {
	case err != nil:
		fmt.Println(shed.ErrorCode(err), err)
		return
	case running != nil:
		fmt.Println("running", running)
		return
	}
	fmt.Println("claimed", c.Record.Ports[0].Local)
	c.Serve(ctx, noSheds{}, func(string, ...any) {})
	if err := c.Close(); err != nil {
		panic(err)
	}
}

// noSheds is a server that can't be reached.
type noSheds struct{}

var errNoServer = shed.Errorf(shed.CodeUnreachable, "nobody is there")

func (noSheds) Get(context.Context, string) (*shed.Shed, error) { return nil, errNoServer }
func (noSheds) Dial(context.Context, string, shed.Endpoint) (net.Conn, error) {
	return nil, errNoServer
}

// process is another process with a tunnel.
type process struct {
	*exec.Cmd
	said string // how its claim went
}

func start(t *testing.T, args claimArgs) *process {
	t.Helper()
	p, err := startErr(t, args)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func startErr(t *testing.T, args claimArgs) (*process, error) {
	text, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), claimEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	said, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("the process said %q: %w", said, err)
	}
	return &process{cmd, strings.TrimSpace(said)}, nil
}

func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.Wait()
}

// freePort returns a port that nobody listens on, another one each time.
func freePort(t *testing.T) int {
	t.Helper()
	port, err := porttest.Unused()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func free(t *testing.T, port int) {
	t.Helper()
	opened, _, err := listen(port)
	if err != nil {
		t.Errorf("port %d: %v", port, err)
	}
	for _, l := range opened {
		l.Close()
	}
}

// all chooses all tunnels.
func all(live []Record) ([]Record, error) { return live, nil }

// left returns the files in a registry's directory.
func left(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestListAndStop(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tunnels")
	r := NewRegistry(dir)
	if list, err := r.List(t.Context()); err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	if ended, err := r.Stop(t.Context(), all); err != nil || len(ended) != 0 {
		t.Fatal(ended, err)
	}
	log, err := r.CreateLog("web")
	if err != nil {
		t.Fatal(err)
	}
	log.Close()
	web := start(t, claimArgs{Dir: dir, Record: Record{Shed: "web", Server: "here", Ports: []Port{{0, 3000}, {0, 80}}, Mode: Background, Log: log.Name()}})
	db := start(t, claimArgs{Dir: dir, Record: Record{Shed: "db", Server: "here", Ports: []Port{{0, 5432}}, Mode: Foreground}})
	var list []Tunnel
	eventually(func() bool { // until they have found out about their server
		if list, err = r.List(t.Context()); err != nil || len(list) != 2 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0].State == Reconnecting && list[1].State == Reconnecting
	})
	i := slices.IndexFunc(list, func(t Tunnel) bool { return t.Shed == "web" })
	got := list[i]
	if got.PID != web.Process.Pid || got.Mode != Background || got.Reason != "nobody is there" || len(got.Connections) != 2 ||
		got.Ports[0].Local == 0 || got.Ports[1].Local == 0 || got.Since.IsZero() || got.Log != log.Name() {
		t.Errorf("%+v", got)
	}

	ended, err := r.Stop(t.Context(), func(live []Record) ([]Record, error) {
		return slices.DeleteFunc(live, func(rec Record) bool { return rec.Shed != "web" }), nil
	})
	if err != nil || len(ended) != 1 || ended[0].PID != web.Process.Pid {
		t.Fatal(ended, err)
	}
	if err := web.Wait(); err != nil {
		t.Error(err)
	}
	for _, p := range got.Ports {
		free(t, p.Local)
	}
	if list, err = r.List(t.Context()); err != nil || len(list) != 1 || list[0].PID != db.Process.Pid {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := r.Stop(t.Context(), all); err != nil {
		t.Error(err)
	}
	if files := left(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

func TestKilled(t *testing.T) {
	dir := t.TempDir()
	r := NewRegistry(dir)
	log, err := r.CreateLog("web")
	if err != nil {
		t.Fatal(err)
	}
	log.Close()
	port := freePort(t)
	rec := Record{Shed: "web", Server: "here", Ports: []Port{{port, 3000}}, Log: log.Name()}
	start(t, claimArgs{Dir: dir, Record: rec}).kill(t)
	free(t, port)
	if files := left(t, dir); len(files) != 3 {
		t.Errorf("a killed process left %v", files)
	}
	if err := os.WriteFile(filepath.Join(dir, tempPrefix+"1"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err := r.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if files := left(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

// TestForgedRecords has records that nobody holds, of processes that run: they are removed, and nobody is harmed.
func TestForgedRecords(t *testing.T) {
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bystander := exec.Command("sleep", "1000")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		bystander.Process.Kill()
		bystander.Wait()
	})
	for pid, text := range map[int]string{
		bystander.Process.Pid: fmt.Sprintf(`{"pid": %d, "shed": "web", "log": %q}`, bystander.Process.Pid, other),
		1:                     "", 2: "{", 3: `"x"`,
	} {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(pid)+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := NewRegistry(dir)
	ended, err := r.Stop(t.Context(), all)
	if err != nil || len(ended) > 0 {
		t.Error(ended, err)
	}
	if files := left(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	if err := bystander.Process.Signal(syscall.Signal(0)); err != nil {
		t.Error("another process was ended:", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}

// TestStubborn stops a process that doesn't end when it is asked to, and doesn't say how it is doing.
func TestStubborn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := start(t, claimArgs{Dir: dir, Record: Record{Shed: "web", Ports: []Port{{0, 3000}}}, Stubborn: true})
	if err := p.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r := NewRegistry(dir)
	r.endPatience = time.Second
	var list []Tunnel
	eventually(func() bool { // it may say how it is doing before it stops
		var err error
		if list, err = r.List(t.Context()); err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0].State == Silent
	})
	if _, err := r.Stop(t.Context(), all); err != nil {
		t.Error(err)
	}
	if files := left(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	free(t, list[0].Ports[0].Local)
}

func TestClaimConflicts(t *testing.T) {
	dir := t.TempDir()
	port, second := freePort(t), freePort(t)
	rec := func(name, server string, ports ...Port) Record {
		return Record{Shed: name, Server: server, Ports: ports, Mode: Background}
	}
	first := start(t, claimArgs{Dir: dir, Record: rec("web", "here", Port{port, 3000}, Port{second, 80})})
	if first.said != "claimed "+strconv.Itoa(port) {
		t.Fatal(first.said)
	}
	r := NewRegistry(dir)
	for _, same := range []Record{
		rec("web", "here", Port{port, 3000}, Port{second, 80}), rec("web", "here", Port{second, 80}, Port{port, 3000}), rec("web", "here", Port{port, 3000}),
	} {
		for _, f := range []func() (*Record, error){
			func() (*Record, error) { return r.Check(t.Context(), same, false) },
			func() (*Record, error) { _, running, err := r.Claim(t.Context(), same, false); return running, err },
		} {
			if running, err := f(); err != nil || running == nil || running.PID != first.Process.Pid {
				t.Errorf("%v: %v, %v", same, running, err)
			}
		}
	}
	for _, other := range []Record{
		rec("db", "here", Port{port, 3000}), rec("web", "there", Port{port, 3000}), rec("web", "here", Port{port, 3001}),
		rec("web", "here", Port{port, 3000}, Port{freePort(t), 5}),
	} {
		for _, f := range []func() (*Record, error){
			func() (*Record, error) { return r.Check(t.Context(), other, false) },
			func() (*Record, error) { _, running, err := r.Claim(t.Context(), other, false); return running, err },
		} {
			running, err := f()
			if running != nil || shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), fmt.Sprintf("localhost:%d -> web:3000", port)) {
				t.Errorf("%v: %v, %v", other, running, err)
			}
		}
		if running, err := r.Check(t.Context(), other, true); running != nil || err != nil {
			t.Errorf("%v: %v, %v", other, running, err)
		}
	}
	if err := first.Process.Signal(syscall.Signal(0)); err != nil {
		t.Fatal(err)
	}

	// Another takes its place, and those that aren't in the way stay.
	third := start(t, claimArgs{Dir: dir, Record: rec("web", "here", Port{0, 3000})})
	next := start(t, claimArgs{Dir: dir, Record: rec("db", "here", Port{port, 5432}), Replace: true})
	if next.said != "claimed "+strconv.Itoa(port) {
		t.Fatal(next.said)
	}
	if err := first.Wait(); err != nil {
		t.Error(err)
	}
	free(t, second)
	list, err := r.List(t.Context())
	if err != nil || len(list) != 2 || list[0].PID != third.Process.Pid && list[1].PID != third.Process.Pid {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestPortOfAnotherProgram(t *testing.T) {
	dir := t.TempDir()
	for network, host := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		l, err := net.Listen(network, host)
		if err != nil {
			if network == "tcp6" {
				continue // this machine has no IPv6
			}
			t.Fatal(err)
		}
		defer l.Close()
		ports := []Port{{0, 1}, {l.Addr().(*net.TCPAddr).Port, 3000}}
		for _, replace := range []bool{false, true} {
			_, running, err := NewRegistry(dir).Claim(t.Context(), Record{Shed: "web", Ports: ports}, replace)
			if running != nil || shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), "another program") {
				t.Errorf("%s: %v, %v", network, running, err)
			}
		}
	}
	if files := left(t, dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

// TestConcurrentClaims has many processes start at once: of those for one port one wins, whatever they replace.
func TestConcurrentClaims(t *testing.T) {
	dir := t.TempDir()
	port := freePort(t)
	said := make([]string, 12)
	var parts sync.WaitGroup
	for i := range said {
		parts.Go(func() {
			rec := Record{Shed: []string{"web", "db"}[i%2], Ports: []Port{{port, 3000}}}
			p, err := startErr(t, claimArgs{Dir: dir, Record: rec})
			if err != nil {
				t.Error(err)
				return
			}
			said[i] = p.said
		})
	}
	parts.Wait()
	counts := map[string]int{}
	for _, s := range said {
		what, _, _ := strings.Cut(s, " ")
		counts[what]++
	}
	if counts["claimed"] != 1 || counts["running"] != 5 || counts[string(shed.CodeConflict)] != 6 {
		t.Errorf("%v: %q", counts, said)
	}
	if list, err := NewRegistry(dir).List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestLockWaitEnds(t *testing.T) {
	r := NewRegistry(t.TempDir())
	unlock, err := r.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Stop(ctx, all); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, _, err := r.Claim(ctx, Record{Shed: "web", Ports: []Port{{0, 1}}}, false); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	unlock()
	c, _, err := r.Claim(t.Context(), Record{Shed: "web", Ports: []Port{{0, 1}}}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
