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
	"slices"
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
	m.commands.Add(1)
	defer m.commands.Add(-1)
	if c.Attach != nil && !answer(s, m.checkAttach(*c.Attach)) {
		return
	}
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
	m.awaitNetwork()
	p = &running{cmd: cmd, frames: frames, ended: make(chan struct{}), attached: c.Attach != nil}
	err = m.startInCgroup(cmd, func() error {
		if c.TTY != nil {
			return p.startTTY(p.ttySize(c.TTY.Size))
		}
		return p.startPipes()
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil, exitNotFound, fmt.Errorf("%s: what it is run by is not in the shed: the interpreter that its first line names, or the dynamic linker", cmd.Path)
	}
	if err != nil {
		return nil, exitNotExecutable, err
	}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	return p, 0, nil
}

// startInCgroup calls start, which starts cmd, as what the host asked for is started.
func (m *machine) startInCgroup(cmd *exec.Cmd, start func() error) error {
	if m.cgroup != "" {
		cgroup, err := os.Open(m.cgroup)
		if err != nil {
			return err
		}
		defer cgroup.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	}
	return startCommand(start)
}

// oomFile says how gladly the kernel ends this process when memory runs out. For the agent it
// is never: without it nobody gets at the shed any more.
const oomFile = "/proc/self/oom_score_adj"

// starting is locked while a process is started.
var starting struct {
	sync.Mutex
	oom    *os.File // oomFile, which stays open: it is needed where no other file can be opened any more
	spared []byte   // what it says between starts
}

// startCommand calls start, which starts a process that must not inherit how the agent is spared.
func startCommand(start func() error) error {
	s := &starting
	s.Lock()
	defer s.Unlock()
	if s.oom == nil {
		f, err := os.OpenFile(oomFile, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		spared, err := io.ReadAll(f)
		if err != nil {
			f.Close()
			return err
		}
		s.oom, s.spared = f, spared
	}
	if _, err := s.oom.WriteAt([]byte("0"), 0); err != nil {
		return err
	}
	defer s.oom.WriteAt(s.spared, 0)
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

// currentSetup returns what the host has said last.
func (m *machine) currentSetup() (agent.Setup, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.setup == nil {
		return agent.Setup{}, errors.New("the shed isn't set up yet")
	}
	return *m.setup, nil
}

// command makes the process of c, not started yet.
func (m *machine) command(c shed.Command) (*exec.Cmd, error) {
	setup, err := m.currentSetup()
	if err != nil {
		return nil, err
	}
	isProgram := len(c.Args) > 0
	a, base, err := commandUser(setup, c.User, isProgram)
	if err != nil {
		return nil, err
	}
	own := c.Env
	if c.TTY != nil && c.TTY.Term != "" {
		own = append([]string{"TERM=" + c.TTY.Term}, own...)
	}
	cmd := &exec.Cmd{
		SysProcAttr: &syscall.SysProcAttr{Credential: a.credential(), Setsid: true},
		Dir:         a.workDir(c.Dir, startDirs(setup, isProgram)...),
	}
	if c.Subsystem != "" && c.Dir == "" {
		cmd.Dir = a.workDir("")
	}
	if fi, err := os.Stat(cmd.Dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("the directory %s isn't in the shed", cmd.Dir)
	}
	if !a.mayEnter(cmd.Dir) {
		return nil, fmt.Errorf("the directory %s, for the user %s: %w", cmd.Dir, a.name, os.ErrPermission)
	}
	if c.Subsystem != "" {
		cmd.Path, cmd.Args, cmd.Env = selfExe, []string{sftpName}, base.with(own...)
	} else if isProgram {
		env := m.loginEnv(a, base, setup.Image).with(own...)
		cmd.Env = env
		cmd.Args = c.Args
		cmd.Path, err = lookPath(c.Args[0], env.get("PATH"), cmd.Dir)
		if err != nil {
			return nil, err
		}
	} else {
		var ok bool
		if cmd.Path, ok = a.loginShell(); !ok {
			return nil, fmt.Errorf("the image has no shell; to run a program of it: shed exec %s -- PROGRAM", setup.Hostname)
		}
		if c.Attach != nil {
			u := m.sessionUser(a, m.loginEnv(a, base, setup.Image).with("SHELL="+cmd.Path).with(own...))
			if err := u.attach(cmd, *c.Attach); err != nil {
				return nil, err
			}
		} else {
			cmd.Env = base.with("SHELL=" + cmd.Path).with(own...)
			// A leading dash makes any shell a login shell.
			cmd.Args = []string{"-" + filepath.Base(cmd.Path)}
			if c.Script != "" {
				cmd.Args = append(cmd.Args, "-c", c.Script)
			}
		}
	}
	cmd.Env = environ(cmd.Env).with("PWD=" + cmd.Dir)
	return cmd, nil
}

// loginEnv returns the environment of programs that a runs: that of its login shell, with the image's PATH.
func (m *machine) loginEnv(a *account, base environ, img agent.Image) environ {
	env := m.shellEnv(a, base)
	return env.with("PATH=" + mergePath(env.get("PATH"), environ(img.Env).get("PATH")))
}

// commandUser returns whom a command runs as that asks for user, and their environment before any
// shell has run. A program runs as the image wants it to, and a login is the default user's.
func commandUser(s agent.Setup, user string, isProgram bool) (a *account, base environ, err error) {
	ofImage := isProgram && user == "" && s.Image.User != ""
	if ofImage {
		a, err = lookupImageUser(s.Image.User)
	} else {
		a, err = lookupUser(user)
	}
	if err != nil {
		return nil, nil, err
	}
	return a, a.baseEnv(s.Image.Env, ofImage).with(s.Env...), nil
}

// startDirs returns where commands start, the best first, before their user's home.
func startDirs(s agent.Setup, isProgram bool) []string {
	var dirs []string
	if s.Workspace != "" {
		dirs = append(dirs, s.Workspace)
	}
	if dir := filepath.Join("/", s.Image.WorkingDir); isProgram && dir != "/" {
		dirs = append(dirs, dir)
	}
	return dirs
}

// workDir resolves the directory asked for: a relative one from where a command of a starts
// otherwise. That is the first of start that is there and open to a, or the home: a directory that is gone must not
// keep anybody out.
func (a *account) workDir(dir string, start ...string) string {
	if rest, ok := strings.CutPrefix(dir, "~"); ok && (rest == "" || rest[0] == '/') {
		return filepath.Join(a.home, rest)
	}
	if filepath.IsAbs(dir) {
		return dir
	}
	for _, d := range append(start, a.home) {
		if a.mayEnter(d) {
			return filepath.Join(d, dir)
		}
	}
	return filepath.Join("/", dir)
}

// mayEnter says whether dir is a directory that a can make its working directory.
func (a *account) mayEnter(dir string) bool {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false
	}
	for {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return false
		}
		search := uint32(unix.S_IXOTH)
		switch {
		case a.uid == 0:
			search = 0
		case st.Uid == a.uid:
			search = unix.S_IXUSR
		case st.Gid == a.gid || slices.Contains(a.groups, st.Gid):
			search = unix.S_IXGRP
		}
		if st.Mode&search != search {
			return false
		}
		if dir == "/" {
			return true
		}
		dir = filepath.Dir(dir)
	}
}

// lookPath finds a program as execvp(3) does, with a relative name taken from dir.
func lookPath(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		err := executable(name)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%s: no such file in the shed", name)
		}
		return name, err
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
