//go:build linux

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/state"
)

// A create that can't be carried out leaves nothing, and says what is wrong.
func TestCreateRefuses(t *testing.T) {
	f := newFixture(t)
	f.shed(t, "taken", state.Ready)
	e := f.engine(t)
	for name, tt := range map[string]struct {
		opts shed.CreateOptions
		code shed.Code
		want string
	}{
		"a bad name":           {shed.CreateOptions{Name: "No"}, shed.CodeInvalid, `"No"`},
		"no such backend":      {shed.CreateOptions{Name: "x", Backend: "vz"}, shed.CodeUnsupported, `"vz"`},
		"too many CPUs":        {shed.CreateOptions{Name: "x", CPUs: 10_000}, shed.CodeInvalid, "10000 CPUs"},
		"less than no CPUs":    {shed.CreateOptions{Name: "x", CPUs: -1}, shed.CodeInvalid, "-1 CPUs"},
		"too little memory":    {shed.CreateOptions{Name: "x", MemoryMB: 255}, shed.CodeInvalid, "255M of memory"},
		"too much memory":      {shed.CreateOptions{Name: "x", MemoryMB: 999 << 10}, shed.CodeInvalid, "999G of memory"},
		"too small a disk":     {shed.CreateOptions{Name: "x", UpperSize: 1 << 20}, shed.CodeInvalid, "size of 1M"},
		"too large a disk":     {shed.CreateOptions{Name: "x", UpperSize: 9 << 40}, shed.CodeInvalid, "size of 9T"},
		"no repository":        {shed.CreateOptions{Name: "x", Repo: "--upload-pack=x"}, shed.CodeInvalid, "--upload-pack=x"},
		"no such image":        {shed.CreateOptions{Name: "x", Image: "none"}, shed.CodeNoImage, "none"},
		"no default image yet": {shed.CreateOptions{Name: "x"}, shed.CodeNoImage, "base"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := e.Create(t.Context(), tt.opts, nil)
			if shed.ErrorCode(err) != tt.code || !strings.Contains(err.Error(), tt.want) || shed.ErrorHint(err) == "" {
				t.Errorf("%v (hint %q), want %s and %q", err, shed.ErrorHint(err), tt.code, tt.want)
			}
			if exists(t, f.State.Shed("x")) {
				t.Error("it left files")
			}
		})
	}
	if list, err := e.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestLogs(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "box", state.Ready)
	e := f.engine(t)
	write(t, dir+"/console.log", "console\n")
	write(t, dir+"/provision.log", "provision\n")
	r, err := e.Logs(t.Context(), "box", false)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "console\nprovision\n" {
		t.Errorf("%q, %v", b, err)
	}
	if r, err = e.Logs(t.Context(), "box", true); err != nil {
		t.Fatal(err)
	}
	read := func(want string) {
		t.Helper()
		b := make([]byte, len(want))
		if _, err := io.ReadFull(r, b); err != nil || string(b) != want {
			t.Fatalf("%q, %v; want %q", b, err, want)
		}
	}
	read("console\nprovision\n")
	console, err := os.OpenFile(dir+"/console.log", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	if _, err := console.WriteString("more\n"); err != nil {
		t.Fatal(err)
	}
	read("more\n")
	if err := e.Delete(t.Context(), "box", nil); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || len(b) != 0 {
		t.Errorf("after the delete: %q, %v", b, err)
	}
}

// A shed whose machine runs keeps its disk, whatever is known of it.
func TestResetOfWhatRunsAllTheSame(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "box", state.Ready)
	run := f.runDir(t, dir)
	f.kernel(t, "6.1-current")
	e := f.engine(t)
	for _, tt := range []struct {
		err error // of Running
		is  func(error) bool
	}{
		{errors.New("nobody knows"), func(err error) bool { return errors.Is(err, f.driver.runErr) }},
		{nil, func(err error) bool { return shed.ErrorCode(err) == shed.CodeConflict }},
	} {
		f.driver.run(run)
		f.driver.runErr = tt.err
		if s, err := e.Reset(t.Context(), "box"); !tt.is(err) {
			t.Errorf("%+v, %v", s, err)
		}
		if b, err := os.ReadFile(dir + "/upper.img"); err != nil || string(b) != "precious" {
			t.Fatalf("its upper: %q, %v", b, err)
		}
	}
	if s := get(t, e, "box"); s.Status != shed.StatusRunning {
		t.Errorf("now it is %s", s.Status)
	}
}

func TestAnnounce(t *testing.T) {
	console := t.TempDir() + "/console.log"
	rec := state.Record{Image: "base", ImageDigest: "sha256:abc", Kernel: "6.1-x", StartedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	line := "shed: starting at 2026-01-02T03:04:05Z, image base (sha256:abc), kernel 6.1-x\n"
	for _, want := range []string{line, line + "a boot that was cut of" + "\n" + line} {
		n, err := announce(console, rec)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(console)
		if err != nil || string(b) != want || n != int64(len(want)) {
			t.Errorf("%q, %d, %v; want %q", b, n, err, want)
		}
		write(t, console, want+"a boot that was cut of")
	}
	if _, err := announce(t.TempDir(), rec); err == nil {
		t.Error("no error about what is no file")
	}
}

func TestFollowedLogsEndWithTheirContext(t *testing.T) {
	f := newFixture(t)
	f.shed(t, "box", state.Ready)
	e := f.engine(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, err := e.Logs(ctx, "box", true)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// kernel makes what a Store knows a bundle by, and returns its ID.
func (f *fixture) kernel(t *testing.T, id string) string {
	t.Helper()
	dir := f.State.Path("kernels", id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "manifest.json"), `{"release": "6.1"}`)
	return id
}

// record reads the record that a crash now would leave.
func (f *fixture) record(t *testing.T, name string) state.Record {
	t.Helper()
	var rec state.Record
	b, err := os.ReadFile(f.State.Shed(name) + "/shed.json")
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestResetTakesTheCurrentKernel(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "box", state.Ready) // its kernel is gone
	current := f.kernel(t, "6.1-current")
	e := f.engine(t)
	s, err := e.Reset(t.Context(), "box")
	if err != nil || s.Kernel != current {
		t.Fatalf("%+v, %v", s, err)
	}
	if rec := f.record(t, "box"); rec.Kernel != current || rec.Phase != state.Ready {
		t.Errorf("recorded %+v", rec)
	}
	if fi, err := os.Stat(dir + "/upper.img"); err != nil || fi.Size() != 1<<30 {
		t.Errorf("its upper: %v, %v", fi, err)
	}
}

// A reset that fails leaves the upper, and the kernel that goes with it.
func TestResetThatFails(t *testing.T) {
	f := newFixture(t)
	dir := f.shed(t, "box", state.Ready)
	f.kernel(t, "6.1-current")
	write(t, f.State.Path("templates"), "in the way")
	e := f.engine(t)
	if s, err := e.Reset(t.Context(), "box"); err == nil {
		t.Fatalf("%+v", s)
	}
	if s := get(t, e, "box"); s.Kernel != "k" || s.Status != shed.StatusStopped {
		t.Errorf("%+v", s)
	}
	if rec := f.record(t, "box"); rec.Kernel != "k" {
		t.Errorf("recorded %+v", rec)
	}
	if b, err := os.ReadFile(dir + "/upper.img"); err != nil || string(b) != "precious" {
		t.Errorf("its upper: %q, %v", b, err)
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0B", -1: "-1B", 1: "1B", 1000: "1000B", 1 << 10: "1K", 1<<30 + 1: "1073741825B", 3 << 29: "1536M", 1 << 30: "1G", 1 << 40: "1T", 1 << 50: "1024T",
	} {
		if s := formatSize(n, "BKMGT"); s != want {
			t.Errorf("%d: %q, want %q", n, s, want)
		}
	}
}

func TestBootErrorSuggestsWhatHelps(t *testing.T) {
	f := newFixture(t)
	e := f.engine(t)
	const said = "the agent could not set the machine up: structure needs cleaning"
	for code, want := range map[shed.Code]string{
		agent.CodeUpper: "shed reset box", agent.CodeLayer: f.State.Path("layers"), shed.CodeInternal: "shed-server doctor",
	} {
		cause := shed.Errorf(code, said)
		err := e.bootError("box", cause, "the last words")
		if shed.ErrorCode(err) != shed.CodeBoot || !errors.Is(err, cause) || !strings.Contains(err.Error(), said) ||
			!strings.Contains(err.Error(), "the last words") || !strings.Contains(shed.ErrorHint(err), want) {
			t.Errorf("%v (hint %q)", err, shed.ErrorHint(err))
		}
	}
}

// What is wrong with an image's files comes with what to try, and what has that already keeps it.
func TestImageErrorSuggestsWhatHelps(t *testing.T) {
	rec := state.Record{Image: "base"}
	cause := errors.New("layer sha256:abc: gzip: invalid checksum")
	if err := imageError(t.Context(), rec, cause); !errors.Is(err, cause) || !strings.Contains(shed.ErrorHint(err), "image base") {
		t.Errorf("%v (hint %q)", err, shed.ErrorHint(err))
	}
	full := shed.Errorf(shed.CodeNoSpace, "full").WithHint("free some")
	if err := imageError(t.Context(), rec, full); err != full {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := imageError(ctx, rec, ctx.Err()); err != ctx.Err() {
		t.Errorf("%v", err)
	}
}
