//go:build linux

package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/porttest"
)

type serverKey struct{}

func scriptServer(ts *testscript.TestScript) *server { return ts.Value(serverKey{}).(*server) }

func TestScripts(t *testing.T) {
	t.Parallel()
	dependOnSources(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "scripts",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setup,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "fuse":
				f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
				if err == nil {
					f.Close()
				}
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"server":      cmdServer,
			"exits":       cmdExits,
			"eventually":  cmdEventually,
			"wait-status": cmdWaitStatus,
			"kill-pid-of": cmdKill,
			"freeze":      cmdSignal(syscall.SIGSTOP, stopped),
			"thaw":        cmdSignal(syscall.SIGCONT, func(int) error { return nil }),
			"terminate":   cmdSignal(syscall.SIGTERM, func(int) error { return nil }),
			"hang-up":     cmdSignal(syscall.SIGHUP, func(int) error { return nil }),
			"no-machine":  cmdNoMachine,
			"capture":     cmdCapture,
			"unused-port": cmdUnusedPort,
			"small-disk":  cmdSmallDisk,
			"mkimage":     cmdMkimage,
			"registry":    cmdRegistry,
			"terminal":    cmdTerminal,
		},
	})
}

// setup gives a script a server, which it has to start, with what is in server.yaml in its configuration.
func setup(env *testscript.Env) (err error) {
	host, err := listen()
	if err != nil {
		return err
	}
	env.Defer(host.close)
	extra, err := os.ReadFile(filepath.Join(env.WorkDir, "server.yaml"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	key, pub, err := sshKey(env.WorkDir)
	if err != nil {
		return err
	}
	s, err := newServer(fmt.Sprintf("network: {allow_host_ports: [%d, %d]}\nauth: {authorized_keys: [%q]}\n%s",
		port(host.http), port(host.echo), pub, extra))
	if err != nil {
		return err
	}
	t := env.T().(testing.TB)
	env.Defer(func() {
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.log())
		}
		if err := errors.Join(s.checkProcesses(), s.close()); err != nil {
			t.Error(err)
		}
	})
	if err := fillState(t, s.state); err != nil {
		return err
	}
	sshConfig := fmt.Sprintf("Host *\n\tHostName 127.0.0.1\n\tPort %d\n\tIdentityFile %s\n\tIdentitiesOnly yes\n"+
		"\tIdentityAgent none\n\tUserKnownHostsFile %s\n\tStrictHostKeyChecking yes\n\tBatchMode yes\n\tLogLevel ERROR\n",
		s.sshPort, key, filepath.Join(s.dir, "known_hosts"))
	if err := os.WriteFile(filepath.Join(s.dir, "ssh_config"), []byte(sshConfig), 0o600); err != nil {
		return err
	}
	env.Values[serverKey{}] = s
	env.Values[terminalsKey{}] = map[string]*terminal{}
	for _, v := range [][2]string{
		{"PATH", binDir + string(os.PathListSeparator) + os.Getenv("PATH") + ":/usr/sbin:/sbin"},
		{"BIN", binDir},
		{"HOME", s.dir},
		{"SHED_CONFIG", s.clientConfig},
		{"SERVER_DIR", s.dir},
		{"SERVER_CONFIG", s.config},
		{"STATE", s.state},
		{"SSH_CONFIG", filepath.Join(s.dir, "ssh_config")},
		{"HTTP_PORT", strconv.Itoa(s.httpPort)},
		{"SSH_PORT", strconv.Itoa(s.sshPort)},
		{"HOST_HTTP", strconv.Itoa(port(host.http))},
		{"HOST_ECHO", strconv.Itoa(port(host.echo))},
		{"HOST_CLOSED", strconv.Itoa(port(host.closed))},
	} {
		env.Setenv(v[0], v[1])
	}
	return nil
}

// sshKey makes a key pair in dir.
func sshKey(dir string) (file, public string, err error) {
	file = filepath.Join(dir, "id_ed25519")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "e2e", "-f", file).CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	pub, err := os.ReadFile(file + ".pub")
	return file, strings.TrimSpace(string(pub)), err
}

// cmdServer is server start, which sets SERVER_PID, or stop|kill9, or server log-match REGEXP, which waits for a line.
func cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	s := scriptServer(ts)
	if len(args) == 0 || neg {
		ts.Fatalf("usage: server start|stop|kill9|log-match REGEXP")
	}
	switch args[0] {
	case "start":
		ts.Check(s.start())
		ts.Setenv("SERVER_PID", strconv.Itoa(s.cmd.Process.Pid))
	case "stop":
		ts.Check(s.stop())
	case "kill9":
		ts.Check(s.kill())
	case "log-match":
		re, err := regexp.Compile(args[1])
		ts.Check(err)
		ts.Check(eventually(func() error {
			if !re.MatchString(s.log()) {
				return fmt.Errorf("no %q in the server's log", re)
			}
			return nil
		}))
	default:
		ts.Fatalf("server %s: no such thing", args[0])
	}
}

// cmdExits is exits CODE COMMAND ARGS..., which runs a command that must end with that code.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if (got == want) == neg {
		ts.Fatalf("exit code %d, want %s%d", got, map[bool]string{true: "not "}[neg], want)
	}
}

// cmdEventually is [!] eventually COMMAND ARGS..., which runs a command until it succeeds, or fails with "!".
func cmdEventually(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(eventually(func() error {
		err := ts.Exec(args[0], args[1:]...)
		if neg && err == nil {
			return fmt.Errorf("%q still succeeds", args)
		}
		if neg {
			return nil
		}
		return err
	}))
}

// cmdWaitStatus is wait-status NAME STATUS [REGEXP of the reason].
func cmdWaitStatus(ts *testscript.TestScript, neg bool, args []string) {
	s := scriptServer(ts)
	if len(args) < 2 || neg {
		ts.Fatalf("usage: wait-status NAME STATUS [REASON]")
	}
	reason := regexp.MustCompile(strings.Join(args[2:], " "))
	ts.Check(eventually(func() error {
		sheds, err := s.list(context.Background())
		if err != nil {
			return err
		}
		for _, sh := range sheds {
			if sh.Name != args[0] {
				continue
			}
			if string(sh.Status) == args[1] && reason.MatchString(sh.Reason) {
				return nil
			}
			return fmt.Errorf("%s is %s: %s", sh.Name, sh.Status, sh.Reason)
		}
		return fmt.Errorf("there is no shed %s", args[0])
	}))
}

// cmdKill is kill-pid-of vmm|keeper NAME, with SIGKILL.
func cmdKill(ts *testscript.TestScript, neg bool, args []string) {
	s := scriptServer(ts)
	if len(args) != 2 || neg {
		ts.Fatalf("usage: kill-pid-of vmm|keeper NAME")
	}
	p, err := s.findProcess(args[0], args[1])
	ts.Check(err)
	ts.Check(s.killProcess(p))
}

// cmdSignal is freeze, thaw, terminate or hang-up vmm|keeper NAME, with the signal that does it. Done says whether it has.
func cmdSignal(sig syscall.Signal, done func(pid int) error) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if len(args) != 2 || neg {
			ts.Fatalf("usage: freeze|thaw|terminate|hang-up vmm|keeper NAME")
		}
		p, err := scriptServer(ts).findProcess(args[0], args[1])
		ts.Check(err)
		ts.Check(syscall.Kill(p.pid, sig))
		ts.Check(eventually(func() error { return done(p.pid) }))
	}
}

// stopped returns nil if no thread of a process runs any more.
func stopped(pid int) error {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return err
	}
	if len(stats) == 0 {
		return permanent{fmt.Errorf("process %d has ended", pid)}
	}
	for _, file := range stats {
		if stat, err := os.ReadFile(file); err == nil && !bytes.Contains(stat, []byte(") T ")) {
			return fmt.Errorf("a thread runs still: %s", stat)
		}
	}
	return nil
}

// cmdNoMachine is no-machine NAME..., which fails if a process of these sheds runs.
func cmdNoMachine(ts *testscript.TestScript, neg bool, args []string) {
	all, err := scriptServer(ts).processes()
	ts.Check(err)
	for _, p := range all {
		if slices.Contains(args, p.shed) {
			ts.Fatalf("it runs: %v", p)
		}
	}
}

// cmdCapture is capture NAME, which puts the last output into a variable.
func cmdCapture(ts *testscript.TestScript, neg bool, args []string) {
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// cmdUnusedPort is unused-port NAME, which puts a port that nobody listens on into a variable.
func cmdUnusedPort(ts *testscript.TestScript, neg bool, args []string) {
	port, err := porttest.Unused()
	ts.Check(err)
	ts.Setenv(args[0], strconv.Itoa(port))
}

// cmdSmallDisk is small-disk SIZE, which puts a file system of that size below the directory
// of the sheds. Only root can.
func cmdSmallDisk(ts *testscript.TestScript, neg bool, args []string) {
	dir := filepath.Join(scriptServer(ts).state, "sheds")
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+args[0]))
	ts.Defer(func() {
		// What still runs there is ended after this.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			ts.Fatalf("unmounting %s: %v", dir, err)
		}
	})
}
