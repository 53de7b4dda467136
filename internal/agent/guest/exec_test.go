//go:build linux

package guest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// TestMain makes the tests independent of what whoever runs them ignores, as nohup(1) does
// with SIGHUP: the agent's commands inherit only what is ignored.
func TestMain(m *testing.M) {
	if os.Args[0] == sftpName || os.Args[0] == sessionName { // the agent starts itself
		Main()
	}
	if run, ok := helpers[os.Args[0]]; ok {
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGTERM, unix.SIGPIPE)
	os.Exit(m.Run())
}

// shedWith runs the agent's exec engine in this process, on this system, and
// returns the host's link to it.
func shedWith(t *testing.T, setup agent.Setup) *agent.Client {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT TESTED: the agent runs as root, and so must this test")
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "host")
	host, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	guest := os.NewFile(uintptr(fds[1]), "guest")
	kept := t.TempDir()
	var wg sync.WaitGroup
	wg.Go(func() {
		m := &machine{setup: &setup, kept: kept}
		if err := agent.ServePort(guest, m.handle); !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("ServePort: %v", err)
		}
	})
	t.Cleanup(func() {
		host.Close()
		guest.Close()
		wg.Wait()
	})
	c, err := agent.Connect(t.Context(), host, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newShed(t *testing.T) *agent.Client {
	return shedWith(t, agent.Setup{Workspace: t.TempDir()})
}

// start starts cmd, as root unless it says otherwise.
func start(t *testing.T, c *agent.Client, cmd shed.Command) shed.Process {
	t.Helper()
	if cmd.User == "" {
		cmd.User = "root"
	}
	return startAsIs(t, c, cmd)
}

func startAsIs(t *testing.T, c *agent.Client, cmd shed.Command) shed.Process {
	t.Helper()
	s, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Exec(t.Context(), s, cmd); err != nil {
		t.Fatal(err)
	}
	p := agent.NewProcess(s)
	t.Cleanup(func() { p.Close() })
	return p
}

type result struct {
	stdout, stderr string
	shed.ExitStatus
}

// finish reads all that p has to say.
func finish(t *testing.T, p shed.Process) result {
	t.Helper()
	var r result
	stderr := make(chan struct{})
	go func() {
		defer close(stderr)
		b, err := io.ReadAll(p.Stderr())
		if err != nil {
			t.Errorf("stderr: %v", err)
		}
		r.stderr = string(b)
	}()
	b, err := io.ReadAll(p.Stdout())
	if err != nil {
		t.Errorf("stdout: %v", err)
	}
	<-stderr
	r.stdout = string(b)
	if r.ExitStatus, err = p.Wait(); err != nil {
		t.Fatal(err)
	}
	return r
}

func run(t *testing.T, c *agent.Client, cmd shed.Command) result {
	t.Helper()
	p := start(t, c, cmd)
	if err := p.Stdin().Close(); err != nil {
		t.Fatal(err)
	}
	return finish(t, p)
}

func sh(script string) shed.Command { return shed.Command{Args: []string{"sh", "-c", script}} }

// readLine reads up to a newline and not a byte further.
func readLine(t *testing.T, r io.Reader) string {
	t.Helper()
	var line []byte
	for {
		b := make([]byte, 1)
		if _, err := io.ReadFull(r, b); err != nil {
			t.Fatalf("after %q: %v", line, err)
		}
		if b[0] == '\n' {
			return strings.TrimRight(string(line), "\r")
		}
		line = append(line, b[0])
	}
}

func readPID(t *testing.T, r io.Reader) int {
	t.Helper()
	pid, err := strconv.Atoi(readLine(t, r))
	if err != nil || pid < 2 {
		t.Fatalf("no pid: %d, %v", pid, err)
	}
	return pid
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(state, "Z") // a zombie is its parent's business
}

func waitGone(pid int) {
	for alive(pid) {
		time.Sleep(2 * time.Millisecond)
	}
}

func TestExecPassesArgumentsLiterally(t *testing.T) {
	got := run(t, newShed(t), shed.Command{Args: []string{"printf", "<%s>", "a b", "$HOME", "*", "", "\"'\\\n", "-x"}})
	if want := "<a b><$HOME><*><><\"'\\\n><-x>"; got.stdout != want || got.Code != 0 {
		t.Errorf("%+v, want %q", got, want)
	}
}

func TestExecEnvironmentAndDirectory(t *testing.T) {
	dir := t.TempDir()
	c := shedWith(t, agent.Setup{Workspace: dir, Env: []string{"SHED_NAME=box", "KIND=setup"}})
	cmd := sh(`echo "$SHED_NAME $KIND $NEW $HOME $USER"; echo "$PWD"; pwd -P; case $PATH in */usr/bin*) echo path;; esac`)
	cmd.Env = []string{"KIND=own", "NEW=x=y"}
	if got, want := run(t, c, cmd), "box own x=y /root root\n"+dir+"\n"+dir+"\npath\n"; got.stdout != want {
		t.Errorf("%+v, want %q", got, want)
	}
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	got := run(t, c, shed.Command{Args: []string{"pwd"}, Dir: "sub"})
	if got.stdout != dir+"/sub\n" {
		t.Errorf("in a relative directory: %+v", got)
	}
}

func TestExecScriptAndLoginUseTheLoginShell(t *testing.T) {
	c := newShed(t)
	if got := run(t, c, shed.Command{Script: `echo "$0 $((6*7))"; exit 5`}); !strings.HasPrefix(got.stdout, "-") ||
		!strings.HasSuffix(got.stdout, " 42\n") || got.Code != 5 {
		t.Errorf("script: %+v", got)
	}
	p := start(t, c, shed.Command{Login: true})
	if _, err := io.WriteString(p.Stdin(), "echo $((6*7))\nexit 6\n"); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); !strings.HasSuffix(got.stdout, "42\n") || got.Code != 6 {
		t.Errorf("login: %+v", got)
	}
}

func TestExecStatus(t *testing.T) {
	c := newShed(t)
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte("\x7fELF but not really"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		cmd  shed.Command
		code int
		sig  string
		err  string
	}{
		"success":         {cmd: sh("exit 0")},
		"failure":         {cmd: sh("exit 7"), code: 7},
		"255":             {cmd: sh("exit 255"), code: 255},
		"killed":          {cmd: sh("kill -KILL $$"), code: 137, sig: "KILL"},
		"terminated":      {cmd: sh("kill -TERM $$"), code: 143, sig: "TERM"},
		"not there":       {cmd: shed.Command{Args: []string{"no-such-command"}}, code: 127, err: "no-such-command: command not found"},
		"path not there":  {cmd: shed.Command{Args: []string{"/no/such"}}, code: 127, err: "/no/such"},
		"not executable":  {cmd: shed.Command{Args: []string{plain}}, code: 126, err: "permission denied"},
		"a directory":     {cmd: shed.Command{Args: []string{dir}}, code: 126, err: "permission denied"},
		"no program":      {cmd: shed.Command{Args: []string{garbage}}, code: 126, err: "exec format error"},
		"no program, tty": {cmd: shed.Command{Args: []string{garbage}, TTY: &shed.TTY{}}, code: 126, err: "exec format error"},
		"no directory":    {cmd: shed.Command{Args: []string{"true"}, Dir: "/no/such/dir"}, code: 127, err: "/no/such/dir"},
		"no user":         {cmd: shed.Command{Args: []string{"true"}, User: "nosuchuser"}, code: 127, err: "nosuchuser"},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t, c, tt.cmd)
			if got.Code != tt.code || got.Signal != tt.sig || !strings.Contains(got.Error, tt.err) || (tt.err == "") != (got.Error == "") {
				t.Errorf("%+v, want code %d, signal %q, error %q", got, tt.code, tt.sig, tt.err)
			}
		})
	}
}

// A machine that isn't the shed yet says so instead of running things in the initramfs.
func TestExecBeforeSetup(t *testing.T) {
	m := &machine{}
	if _, err := m.command(shed.Command{Args: []string{"true"}, User: "root"}); err == nil || !strings.Contains(err.Error(), "isn't set up") {
		t.Errorf("error %v", err)
	}
}

func TestExecKeepsOutputsApart(t *testing.T) {
	got := run(t, newShed(t), sh("echo out; echo err >&2"))
	if got.stdout != "out\n" || got.stderr != "err\n" {
		t.Errorf("%+v", got)
	}
}

func TestExecCarriesMuchBothWays(t *testing.T) {
	const size = 64 << 20
	p := start(t, newShed(t), shed.Command{Args: []string{"cat"}})
	in, out := sha256.New(), sha256.New()
	sent := make(chan error, 1)
	go func() {
		block := make([]byte, 100_000)
		for left := size; left > 0; left -= len(block) {
			block = block[:min(left, len(block))]
			for i := range block {
				block[i] = byte((left + i) * 31 / 7)
			}
			in.Write(block)
			if _, err := p.Stdin().Write(block); err != nil {
				sent <- err
				return
			}
		}
		sent <- p.Stdin().Close()
	}()
	n, err := io.Copy(out, p.Stdout())
	if err := errors.Join(err, <-sent); err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		t.Error("what came back differs")
	}
	if status, err := p.Wait(); err != nil || status.Code != 0 {
		t.Errorf("%+v, %v", status, err)
	}
}

// Stdin that a command doesn't read keeps nothing else from it.
func TestExecSignalsPassUnreadStdin(t *testing.T) {
	p := start(t, newShed(t), sh(`trap 'echo got it; exit 3' INT; echo ready; while :; do sleep 0.01; done`))
	if line := readLine(t, p.Stdout()); line != "ready" {
		t.Fatalf("%q", line)
	}
	if _, err := p.Stdin().Write(make([]byte, agent.StdinWindow)); err != nil {
		t.Fatal(err)
	}
	written := make(chan struct{})
	go func() {
		p.Stdin().Write(make([]byte, 5<<20))
		close(written)
	}()
	if err := p.Signal("INT"); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.stdout != "got it\n" || got.Code != 3 {
		t.Errorf("%+v", got)
	}
	<-written // it fails, or what is left is dropped; it doesn't get stuck
}

func TestExecDropsStdinThatIsNotWanted(t *testing.T) {
	p := start(t, newShed(t), sh(`exec <&-; read x; trap 'exit 4' USR1; echo ready; while :; do sleep 0.01; done`))
	readLine(t, p.Stdout())
	if _, err := p.Stdin().Write(make([]byte, 5<<20)); err != nil {
		t.Errorf("writing to a closed stdin: %v", err)
	}
	if err := p.Signal("USR1"); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.Code != 4 {
		t.Errorf("%+v", got)
	}
}

func TestExecIgnoresSignalsThatDoNotExist(t *testing.T) {
	p := start(t, newShed(t), shed.Command{Args: []string{"cat"}})
	for _, name := range []string{"", "NOSUCH", "SIGTERM", "9"} {
		if err := p.Signal(name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(p.Stdin(), "still there"); err != nil {
		t.Fatal(err)
	}
	p.Stdin().Close()
	if got := finish(t, p); got.stdout != "still there" {
		t.Errorf("%+v", got)
	}
}

// A command has ended when it has, whoever still holds its output, and all that it wrote arrives.
func TestExecDoesNotWaitForTheBackground(t *testing.T) {
	c := newShed(t)
	const written = 900_000 // fits the pipe
	for _, tty := range []*shed.TTY{nil, {Term: "dumb"}} {
		cmd := sh(fmt.Sprintf(`trap '' HUP; sleep 1000 & echo $!; head -c %d /dev/zero | tr '\0' x; echo end`, written))
		cmd.TTY = tty
		p := start(t, c, cmd)
		pid := readPID(t, p.Stdout())
		t.Cleanup(func() { unix.Kill(pid, unix.SIGKILL) })
		got := finish(t, p)
		if want := strings.Repeat("x", written) + "end"; strings.TrimSpace(got.stdout) != want {
			t.Errorf("tty %v: %d bytes of output, want %d: %.30q...", tty != nil, len(got.stdout), len(want)+1, got.stdout)
		}
		if !alive(pid) {
			t.Errorf("tty %v: the process in the background was ended", tty != nil)
		}
	}
}

func TestExecEndsThoughTheBackgroundWritesOn(t *testing.T) {
	p := start(t, newShed(t), sh(`sh -c 'echo $$; exec yes' & read x; exit 2`))
	pid := readPID(t, p.Stdout())
	t.Cleanup(func() { unix.Kill(pid, unix.SIGKILL) })
	if _, err := io.ReadFull(p.Stdout(), make([]byte, len("y\n"))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(p.Stdin(), "\n"); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.Code != 2 || !strings.HasPrefix(got.stdout, "y\n") {
		t.Errorf("code %d, %.20q", got.Code, got.stdout)
	}
	waitGone(pid) // of SIGPIPE
}

// Commands start with the signals that they expect, whatever the agent does about its own.
func TestExecSignalsAreNotIgnored(t *testing.T) {
	got := run(t, newShed(t), sh("sed -n -E 's/^Sig(Ign|Blk):\\s*//p' /proc/self/status"))
	// The C library keeps these two for itself, and some programs start others with them ignored.
	const internal = 1<<(32-1) | 1<<(33-1)
	for _, field := range strings.Fields(got.stdout) {
		set, err := strconv.ParseUint(field, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		if set&^internal != 0 {
			t.Errorf("signals %#x are ignored or blocked", set&^internal)
		}
	}
	if n := len(strings.Fields(got.stdout)); n != 2 {
		t.Errorf("%q, want two sets of signals", got.stdout)
	}
}

// A client that goes away ends its command, with all that belongs to it.
func TestExecHangsUpWhenTheClientGoes(t *testing.T) {
	c := newShed(t)
	loop := `while :; do sleep 0.01; done`
	for name, tt := range map[string]struct {
		script string
		tty    bool
	}{
		"pipes":                   {script: loop},
		"tty":                     {script: loop, tty: true},
		"ignoring it":             {script: `trap '' HUP TERM; ` + loop},
		"ignoring it, tty":        {script: `trap '' HUP TERM; ` + loop, tty: true},
		"stopped":                 {script: `kill -STOP $$; ` + loop},
		"writing, nobody reads":   {script: `yes`},
		"writing to a tty":        {script: `yes`, tty: true},
		"in the foreground, jobs": {script: `set -m; ` + `sh -c '` + loop + `'`, tty: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			note := filepath.Join(t.TempDir(), "hup")
			script := "echo $$; " + tt.script
			if tt.script == loop {
				script = "trap 'echo x > " + note + "; exit' HUP; trap '' TERM; " + script
			}
			cmd := sh(script)
			if tt.tty {
				cmd.TTY = &shed.TTY{Term: "dumb"}
			}
			p := start(t, c, cmd)
			pid := readPID(t, p.Stdout())
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			waitGone(pid)
			if _, err := os.Stat(note); tt.script == loop && err != nil {
				t.Errorf("it was not hung up on: %v", err)
			}
		})
	}
}

func TestExecAfterManyCommands(t *testing.T) {
	c := newShed(t)
	run(t, c, sh("true")) // what is opened once is open by now
	before := openFiles(t)
	var wg sync.WaitGroup
	for i := range 100 {
		cmd := sh("cat; echo err >&2")
		if i%2 == 0 {
			cmd.TTY = &shed.TTY{Term: "dumb"}
		}
		p := start(t, c, cmd)
		wg.Go(func() {
			p.Stdin().Close()
			go io.Copy(io.Discard, p.Stderr())
			io.Copy(io.Discard, p.Stdout())
			if status, err := p.Wait(); err != nil || status.Code != 0 {
				t.Errorf("%+v, %v", status, err)
			}
		})
	}
	wg.Wait()
	for openFiles(t) > before { // closed right after the status was sent
		time.Sleep(time.Millisecond)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
