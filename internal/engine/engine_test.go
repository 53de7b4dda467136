//go:build linux

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/image"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/kernel"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
)

// fakeDriver knows of machines that a test makes up, by their directory.
type fakeDriver struct {
	mu       sync.Mutex
	machines map[string]*fakeMachine
	asked    int   // calls of Running
	findErr  error // of a machine whose directory has the file "broken"
	runErr   error // of Running
}

func (d *fakeDriver) Features() vm.Features { return vm.Features{MaxDisks: 4} }
func (d *fakeDriver) Start(context.Context, string, vm.Spec) (vm.Machine, error) {
	return nil, errors.New("these tests start no machines")
}

func (d *fakeDriver) Find(_ context.Context, dir string) (vm.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m, ok := d.machines[dir]; ok {
		return m, nil
	}
	if _, err := os.Stat(filepath.Join(dir, "broken")); err == nil && d.findErr != nil {
		return nil, d.findErr
	}
	return nil, vm.ErrNotRunning
}

func (d *fakeDriver) Running(dir string) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	_, ok := d.machines[dir]
	return ok, d.runErr
}

func (d *fakeDriver) run(dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.machines == nil {
		d.machines = map[string]*fakeMachine{}
	}
	d.machines[dir] = &fakeMachine{driver: d, dir: dir}
}

type fakeMachine struct {
	driver *fakeDriver
	dir    string
}

func (m *fakeMachine) DialLink(context.Context) (net.Conn, error) { return nil, errors.ErrUnsupported }
func (m *fakeMachine) DialNetwork(context.Context) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}
func (m *fakeMachine) Wait(context.Context) (vm.Exit, error) { return vm.Exit{}, errors.ErrUnsupported }
func (m *fakeMachine) Kill() error {
	m.driver.mu.Lock()
	defer m.driver.mu.Unlock()
	delete(m.driver.machines, m.dir)
	return nil
}

// fixture is a server's state without a server.
type fixture struct {
	Config
	driver *fakeDriver
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	dir := t.TempDir()
	st, err := state.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	layers, err := rootfs.OpenLayers(st.Path("layers"))
	if err != nil {
		t.Fatal(err)
	}
	images, err := image.Open(st.Path("images"), layers)
	if err != nil {
		t.Fatal(err)
	}
	kernels, err := kernel.Open(st.Path("kernels"))
	if err != nil {
		t.Fatal(err)
	}
	driver := &fakeDriver{}
	return &fixture{driver: driver, Config: Config{
		State: st, Images: images, Kernels: kernels,
		Backends:       map[string]Backend{"fake": {Driver: driver, Image: "base", Pull: PullNever, CPUs: 1, MemoryMB: 512}},
		DefaultBackend: "fake", Program: "/bin/false", AgentBinary: "/nonexistent", ServerName: "here",
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}}
}

// engine starts an Engine on what is there.
func (f *fixture) engine(t *testing.T) *Engine {
	t.Helper()
	e, err := New(t.Context(), f.Config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

// shed makes what a shed has on disk.
func (f *fixture) shed(t *testing.T, name string, phase state.Phase) string {
	t.Helper()
	err := f.State.Create(state.Record{
		Phase: phase, Name: name, Backend: "fake", Image: "base", ImageDigest: "sha256:abc", Kernel: "k",
		CPUs: 1, MemoryMB: 512, UpperSize: 1 << 30, Workspace: home,
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := f.State.Shed(name)
	write(t, dir+"/upper.img", "precious")
	return dir
}

func (f *fixture) runDir(t *testing.T, dir string) string {
	t.Helper()
	run := filepath.Join(dir, keeper.RunDir)
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	return run
}

func get(t *testing.T, e *Engine, name string) *shed.Shed {
	t.Helper()
	s, err := e.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// What was cut off is undone or finished, with the machine that may still run for it.
func TestReconcileRemovesWhatWasCutOff(t *testing.T) {
	for _, phase := range []state.Phase{state.Creating, state.Deleting} {
		t.Run(string(phase), func(t *testing.T) {
			f := newFixture(t)
			dir := f.shed(t, "half", phase)
			run := f.runDir(t, dir)
			f.driver.run(run)
			f.shed(t, "whole", state.Ready)
			e := f.engine(t)
			if exists(t, dir) {
				t.Error("its files are still there")
			}
			if runs, err := f.driver.Running(run); runs || err != nil {
				t.Error("its machine still runs")
			}
			list, err := e.List(t.Context())
			if err != nil || len(list) != 1 || list[0].Name != "whole" {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}

// A shed that can't be removed keeps no other from being served, and isn't forgotten.
func TestReconcileServesBesideWhatCannotBeRemoved(t *testing.T) {
	for _, phase := range []state.Phase{state.Creating, state.Deleting} {
		t.Run(string(phase), func(t *testing.T) {
			f := newFixture(t)
			dir := f.shed(t, "half", phase)
			write(t, f.runDir(t, dir)+"/broken", "")
			f.driver.findErr = errors.New("nobody knows whether it runs")
			f.shed(t, "whole", state.Ready)
			e := f.engine(t)
			if s := get(t, e, "whole"); s.Status != shed.StatusStopped {
				t.Errorf("the other one is %s", s.Status)
			}
			for verb, do := range map[string]func() error{
				"start": func() error { _, err := e.Start(t.Context(), "half", nil); return err },
				"stop":  func() error { _, err := e.Stop(t.Context(), "half", nil); return err },
				"reset": func() error { _, err := e.Reset(t.Context(), "half"); return err },
				"exec":  func() error { _, err := e.Exec(t.Context(), "half", shed.Command{Login: true}); return err },
			} {
				if err := do(); shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(shed.ErrorHint(err), "shed delete half") {
					t.Errorf("%s: %v (hint %q)", verb, err, shed.ErrorHint(err))
				}
			}
			if err := e.Delete(t.Context(), "half", nil); !errors.Is(err, f.driver.findErr) {
				t.Errorf("a delete that can't: %v", err)
			}
			if s := get(t, e, "half"); s.Status != shed.StatusDeleting || !strings.Contains(s.Reason, "nobody knows") {
				t.Errorf("%s, %q", s.Status, s.Reason)
			}
			f.driver.findErr = nil
			if err := e.Delete(t.Context(), "half", nil); err != nil || exists(t, dir) {
				t.Errorf("a delete that can: %v", err)
			}
		})
	}
}

func TestReconcileRemovesEmptyLeftovers(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"empty", "temp"} {
		if err := os.Mkdir(f.State.Shed(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, f.State.Shed("temp")+"/.tmp-1", "{")
	e := f.engine(t)
	if list, err := e.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	for _, name := range []string{"empty", "temp"} {
		if exists(t, f.State.Shed(name)) {
			t.Errorf("%s is still there", name)
		}
	}
}

// An upper that no record accounts for is nobody's to remove but the user's.
func TestReconcileKeepsWhatItCannotAccountFor(t *testing.T) {
	f := newFixture(t)
	garbage := f.shed(t, "garbage", state.Creating)
	write(t, garbage+"/shed.json", `{"version": 1, "phase": "creating", "name"`)
	newer := f.shed(t, "newer", state.Deleting)
	write(t, newer+"/shed.json", `{"version": 99, "phase": "deleting", "name": "newer", "image_digest": "x"}`)
	missing := f.shed(t, "missing", state.Ready)
	if err := os.Remove(missing + "/shed.json"); err != nil {
		t.Fatal(err)
	}
	e := f.engine(t)
	for name, want := range map[string]string{"garbage": "is damaged", "newer": "newer shed-server", "missing": "no such file"} {
		dir := f.State.Shed(name)
		s := get(t, e, name)
		if s.Status != shed.StatusDamaged || !strings.Contains(s.Reason, want) || !strings.Contains(s.Reason, dir+"/shed.json") {
			t.Errorf("%s: %s, %q; want damaged, %q", name, s.Status, s.Reason, want)
		}
		for verb, do := range map[string]func() error{
			"start": func() error { _, err := e.Start(t.Context(), name, nil); return err },
			"stop":  func() error { _, err := e.Stop(t.Context(), name, nil); return err },
			"reset": func() error { _, err := e.Reset(t.Context(), name); return err },
			"exec":  func() error { _, err := e.Exec(t.Context(), name, shed.Command{Login: true}); return err },
		} {
			if err := do(); shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), "damaged") || shed.ErrorHint(err) == "" {
				t.Errorf("%s %s: %v", verb, name, err)
			}
		}
		_, err := e.Create(t.Context(), shed.CreateOptions{Name: name, Image: "sha256:abc"}, nil)
		if err == nil {
			t.Errorf("create %s: no error", name)
		}
		if b, err := os.ReadFile(dir + "/upper.img"); err != nil || string(b) != "precious" {
			t.Fatalf("%s: its upper: %q, %v", name, b, err)
		}
		if err := e.Delete(t.Context(), name, nil); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
		if exists(t, dir) {
			t.Errorf("%s is still there after a delete", name)
		}
	}
}

func TestReconcileSaysWhyAShedIsStopped(t *testing.T) {
	f := newFixture(t)
	for name, tt := range map[string]struct {
		run  bool
		exit *keeper.Exit
		want string
	}{
		"never":    {want: ""},
		"asked":    {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.PowerOff}, Asked: true}, want: ""},
		"forced":   {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.Killed, Detail: "x"}, Asked: true}, want: ""},
		"itself":   {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.PowerOff}}, want: "it powered itself off"},
		"panicked": {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.Panic}}, want: "its kernel panicked"},
		"failed":   {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.Failed, Detail: "no memory"}}, want: "its machine ended: no memory"},
		"killed":   {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.Killed}}, want: "its machine ended: killed"},
		"signaled": {run: true, exit: &keeper.Exit{Exit: vm.Exit{Cause: vm.PowerOff}, Asked: true, Signaled: true}, want: "the host was shutting down"},
		"lost":     {run: true, want: "ended from outside, or the host went down"},
	} {
		dir := f.shed(t, name, state.Ready)
		if tt.run {
			f.runDir(t, dir)
		}
		if tt.exit != nil {
			b, err := json.Marshal(tt.exit)
			if err != nil {
				t.Fatal(err)
			}
			write(t, dir+"/exit.json", string(b))
		}
		e, err := New(t.Context(), f.Config)
		if err != nil {
			t.Fatal(err)
		}
		s := get(t, e, name)
		if s.Status != shed.StatusStopped || !strings.Contains(s.Reason, tt.want) || (tt.want == "") != (s.Reason == "") {
			t.Errorf("%s: %s, %q; want %q", name, s.Status, s.Reason, tt.want)
		}
		e.Close()
	}
}

// A machine that lost its keeper gets another one, again while it runs, and is
// noticed to have ended.
func TestReconcileGivesAMachineAKeeper(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "orphan", state.Ready)
	run := f.runDir(t, dir)
	f.driver.run(run)
	began := time.Now()
	e := f.engine(t) // its keepers end at once
	if s := get(t, e, "orphan"); s.Status != shed.StatusRunning {
		t.Errorf("%s, %q", s.Status, s.Reason)
	}
	for asked := 0; asked < 5; time.Sleep(time.Millisecond) {
		f.driver.mu.Lock()
		asked = f.driver.asked
		f.driver.mu.Unlock()
	}
	// At once, and then after one, two and four times the least delay.
	if passed := time.Since(began); passed < 7*minResumeDelay {
		t.Errorf("five keepers within %v", passed)
	}
	m, err := f.driver.Find(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	for get(t, e, "orphan").Status == shed.StatusRunning {
		time.Sleep(time.Millisecond)
	}
	if s := get(t, e, "orphan"); s.Status != shed.StatusStopped || !strings.Contains(s.Reason, "from outside") {
		t.Errorf("%s, %q", s.Status, s.Reason)
	}
}

// A machine whose keeper can't be replaced runs: nobody may take it for ended.
func TestReconcileTriesAgain(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "orphan", state.Ready)
	run := f.runDir(t, dir)
	f.driver.run(run)
	f.kernel(t, "6.1-current")
	f.Program = "/nonexistent"
	e := f.engine(t)
	for name, do := range map[string]func() error{
		"stop":  func() error { _, err := e.Stop(t.Context(), "orphan", nil); return err },
		"reset": func() error { _, err := e.Reset(t.Context(), "orphan"); return err },
	} {
		if err := do(); err == nil {
			t.Errorf("%s: no error", name)
		}
		if s := get(t, e, "orphan"); s.Status != shed.StatusRunning {
			t.Errorf("after a %s: %s, %q", name, s.Status, s.Reason)
		}
	}
	if b, err := os.ReadFile(dir + "/upper.img"); err != nil || string(b) != "precious" {
		t.Errorf("its upper: %q, %v", b, err)
	}
	m, err := f.driver.Find(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	for get(t, e, "orphan").Status == shed.StatusRunning {
		time.Sleep(time.Millisecond)
	}
}

// A keeper that can't write down how its machine ended has said it.
func TestReasonThatIsNotRecorded(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "box", state.Ready)
	run := f.runDir(t, dir)
	lock, err := os.Create(filepath.Join(run, "keeper.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(run, "keeper.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := f.engine(t)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var request map[string]bool
	if err := agent.ReadMessage(conn, &request); err != nil || !request["watch"] {
		t.Fatalf("%v, %v", request, err)
	}
	exit := keeper.Exit{Exit: vm.Exit{Cause: vm.PowerOff}, At: time.Now()}
	if err := agent.WriteMessage(conn, map[string]any{"exit": exit}); err != nil {
		t.Fatal(err)
	}
	for get(t, e, "box").Status == shed.StatusRunning {
		time.Sleep(time.Millisecond)
	}
	if s := get(t, e, "box"); s.Status != shed.StatusStopped || s.Reason != "it powered itself off" {
		t.Errorf("%s, %q", s.Status, s.Reason)
	}
}

func TestNames(t *testing.T) {
	f := newFixture(t)
	f.shed(t, "b", state.Ready)
	f.shed(t, "a", state.Ready)
	e := f.engine(t)
	list, err := e.List(t.Context())
	if err != nil || len(list) != 2 || list[0].Name != "a" || list[1].Name != "b" || list[0].DiskUsed == 0 {
		t.Errorf("%+v, %v", list, err)
	}
	for name, do := range map[string]func(string) error{
		"get":    func(n string) error { _, err := e.Get(t.Context(), n); return err },
		"start":  func(n string) error { _, err := e.Start(t.Context(), n, nil); return err },
		"stop":   func(n string) error { _, err := e.Stop(t.Context(), n, nil); return err },
		"reset":  func(n string) error { _, err := e.Reset(t.Context(), n); return err },
		"delete": func(n string) error { return e.Delete(t.Context(), n, nil) },
		"logs":   func(n string) error { _, err := e.Logs(t.Context(), n, false); return err },
		"exec":   func(n string) error { _, err := e.Exec(t.Context(), n, shed.Command{Login: true}); return err },
	} {
		if err := do("none"); shed.ErrorCode(err) != shed.CodeNotFound || !strings.Contains(err.Error(), `"none"`) {
			t.Errorf("%s of a shed that isn't there: %v", name, err)
		}
		for _, bad := range []string{"", "..", "A", "a/b", "-a"} {
			if err := do(bad); shed.ErrorCode(err) != shed.CodeInvalid {
				t.Errorf("%s %q: %v", name, bad, err)
			}
		}
	}
	if _, err := e.Stop(t.Context(), "a", nil); err != nil {
		t.Errorf("stopping a stopped shed: %v", err)
	}
}
