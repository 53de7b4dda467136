//go:build linux

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// Exit codes of commands that can't be started, as shells have them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// exec runs c on s, by the exec protocol.
func (m *machine) exec(s *agent.Stream, c shed.Command) {
	frames := agent.NewFrameWriter(s)
	input := make(chan error, 1) // has a value when nothing more comes from the client
	var status shed.ExitStatus
	p, code, err := m.start(frames, c)
	if err == nil {
		go func() { input <- p.input(s) }()
		status, err = p.wait(input)
		if err != nil {
			s.Reset()
			return
		}
	} else {
		status = shed.ExitStatus{Code: code, Error: err.Error()}
		go func() {
			_, err := io.Copy(io.Discard, s)
			input <- err
		}()
	}
	b, err := json.Marshal(status)
	if err == nil {
		err = frames.Write(agent.FrameExit, b)
	}
	if err == nil {
		err = s.CloseWrite()
	}
	if err != nil {
		s.Reset()
	}
	// A client that is sending stdin sees the end only when it has got rid of that.
	<-input
	s.Close()
}

// start starts c. An error comes with the exit code that stands for it.
func (m *machine) start(frames *agent.FrameWriter, c shed.Command) (p *running, code int, err error) {
	cmd, err := m.command(c)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil, exitNotExecutable, err
		}
		return nil, exitNotFound, err
	}
	if m.cgroup != "" {
		cgroup, err := os.Open(m.cgroup)
		if err != nil {
			return nil, exitNotExecutable, err
		}
		defer cgroup.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	}
	p = &running{cmd: cmd, frames: frames, ended: make(chan struct{})}
	err = startCommand(func() error {
		if c.TTY != nil {
			return p.startTTY(c.TTY.Size)
		}
		return p.startPipes()
	})
	if err != nil {
		return nil, exitNotExecutable, err
	}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	return p, 0, nil
}

// oomFile says how gladly the kernel ends this process when memory runs out. For the agent it
// is never: without it nobody gets at the shed any more.
const oomFile = "/proc/self/oom_score_adj"

var startMu sync.Mutex

// startCommand calls start, which starts a process that must not inherit how the agent is spared.
func startCommand(start func() error) error {
	startMu.Lock()
	defer startMu.Unlock()
	spared, err := os.ReadFile(oomFile)
	if err != nil {
		return err
	}
	if err := os.WriteFile(oomFile, []byte("0"), 0); err != nil {
		return err
	}
	defer os.WriteFile(oomFile, spared, 0)
	return start()
}

// wait returns how p ended, when its output is sent. An error means that nobody
// is there to be told.
func (p *running) wait(input <-chan error) (shed.ExitStatus, error) {
	select {
	case <-p.ended:
		return exitStatus(p.cmd.ProcessState), p.drain()
	case err := <-input:
		p.hangUp()
		p.close()
		return shed.ExitStatus{}, err
	}
}

// command makes the process of c, not started yet.
func (m *machine) command(c shed.Command) (*exec.Cmd, error) {
	a, err := lookupUser(c.User)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	setup := m.setup
	m.mu.Unlock()
	if setup == nil {
		return nil, errors.New("the shed isn't set up yet")
	}
	base := a.baseEnv().with(setup.Env...)
	own := c.Env
	if c.TTY != nil && c.TTY.Term != "" {
		own = append([]string{"TERM=" + c.TTY.Term}, own...)
	}
	cmd := &exec.Cmd{
		SysProcAttr: &syscall.SysProcAttr{Credential: a.credential(), Setsid: true},
		Dir:         workDir(c.Dir, setup.Workspace, a.home),
	}
	if fi, err := os.Stat(cmd.Dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("the directory %s isn't in the shed", cmd.Dir)
	}
	switch {
	case len(c.Args) > 0:
		env := m.envs.get(a, base).with(own...)
		cmd.Env = env
		cmd.Args = c.Args
		cmd.Path, err = lookPath(c.Args[0], env.get("PATH"), cmd.Dir)
		if err != nil {
			return nil, err
		}
	default:
		cmd.Env = base.with(own...)
		cmd.Path = a.shell
		// A leading dash makes any shell a login shell.
		cmd.Args = []string{"-" + filepath.Base(a.shell)}
		if c.Script != "" {
			cmd.Args = append(cmd.Args, "-c", c.Script)
		}
		if _, err := os.Stat(a.shell); err != nil {
			return nil, fmt.Errorf("the shed has no shell %s", a.shell)
		}
	}
	cmd.Env = environ(cmd.Env).with("PWD=" + cmd.Dir)
	return cmd, nil
}

// workDir resolves the directory asked for. The workspace may be gone, which must
// not keep anybody out.
func workDir(dir, workspace, home string) string {
	if dir == "" {
		for _, d := range []string{workspace, home} {
			if fi, err := os.Stat(d); err == nil && fi.IsDir() {
				return d
			}
		}
		return "/"
	}
	if rest, ok := strings.CutPrefix(dir, "~"); ok && (rest == "" || rest[0] == '/') {
		return filepath.Join(home, rest)
	}
	if !filepath.IsAbs(dir) {
		return filepath.Join(workspace, dir)
	}
	return dir
}

// lookPath finds a program as execvp(3) does, with a relative name taken from dir.
func lookPath(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		if file := filepath.Join(d, name); executable(file) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: command not found in the shed", name)
}

func executable(file string) error {
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	if fi.IsDir() || fi.Mode()&0o111 == 0 {
		return &os.PathError{Op: "exec", Path: file, Err: os.ErrPermission}
	}
	return nil
}

func exitStatus(state *os.ProcessState) shed.ExitStatus {
	ws := state.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		name := strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG")
		return shed.ExitStatus{Code: 128 + int(ws.Signal()), Signal: name}
	}
	return shed.ExitStatus{Code: ws.ExitStatus()}
}
