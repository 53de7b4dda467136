//go:build linux

package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
)

func (e *Engine) Exec(ctx context.Context, name string, cmd shed.Command) (net.Conn, error) {
	if err := cmd.Validate(); err != nil {
		return nil, err
	}
	if cmd.Attach != nil {
		return e.attach(ctx, name, cmd)
	}
	rec, conn, err := e.open(ctx, name, true)
	if err != nil {
		return nil, err
	}
	if err := e.execOn(ctx, conn, rec, cmd); err != nil {
		return nil, err
	}
	return conn, nil
}

// open returns a stream to the agent of a shed. With start it starts one that is stopped; without, that is CodeConflict.
func (e *Engine) open(ctx context.Context, name string, start bool) (state.Record, net.Conn, error) {
	for tries := 0; ; tries++ {
		rec, client, err := e.running(ctx, name, start)
		if err != nil {
			return rec, nil, err
		}
		conn, err := client.Open(ctx)
		if err == nil || tries > 2 || ctx.Err() != nil || !errors.Is(err, keeper.ErrNotRunning) {
			return rec, conn, err
		}
		// It has just stopped, or its keeper is being replaced.
		time.Sleep(50 * time.Millisecond)
	}
}

// running returns the keeper of a shed. See open for start.
func (e *Engine) running(ctx context.Context, name string, start bool) (state.Record, *keeper.Client, error) {
	var none state.Record
	e.mu.Lock()
	en, ok := e.sheds[name]
	if ok && en.status == shed.StatusRunning && en.keeper != nil {
		defer e.mu.Unlock()
		return en.rec, en.keeper, nil
	}
	e.mu.Unlock()
	en, err := e.acquire(ctx, name)
	if err != nil {
		return none, nil, err
	}
	defer en.release()
	if start {
		if err := e.start(ctx, en, nil); err != nil {
			return none, nil, err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if en.keeper == nil && !start {
		return none, nil, shed.Errorf(shed.CodeConflict, "shed %q is %s", name, en.status)
	}
	if en.keeper == nil {
		return none, nil, shed.Errorf(shed.CodeConflict, "shed %q has stopped: %s", name, en.reason)
	}
	return en.rec, en.keeper, nil
}

// execOn starts a command and leaves the exec protocol to the caller. On error it closes conn.
func (e *Engine) execOn(ctx context.Context, conn net.Conn, rec state.Record, cmd shed.Command) error {
	env, err := e.environment(rec)
	if err != nil {
		conn.Close()
		return err
	}
	cmd.Env = append(env, cmd.Env...)
	// A shed that is frozen doesn't take a long command.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = agent.Exec(ctx, conn, cmd)
	if !stop() && err != nil {
		err = ctx.Err()
	}
	return err
}

// maxEnvLine is how long a line of the env_file may be, in bytes: as long as Linux takes.
const maxEnvLine = 128 << 10

// environment is what every command in a shed has on top of its user's.
func (e *Engine) environment(rec state.Record) ([]string, error) {
	env := []string{"SHED_NAME=" + rec.Name, "SHED_WORKSPACE=" + rec.Workspace, "SHED_SERVER=" + e.ServerName}
	if e.EnvFile == "" {
		return env, nil
	}
	f, err := os.Open(e.EnvFile)
	if errors.Is(err, os.ErrNotExist) {
		return env, nil
	}
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the server's env_file: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, maxEnvLine)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		line = strings.TrimPrefix(line, "export ")
		key, value, ok := strings.Cut(line, "=")
		if !ok || key == "" || strings.ContainsAny(key, " \t") {
			return nil, shed.Errorf(shed.CodeInvalid, "%s:%d: not NAME=VALUE", e.EnvFile, n)
		}
		if len(value) > 1 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		if strings.ContainsRune(line, 0) || !utf8.ValidString(line) {
			return nil, shed.Errorf(shed.CodeInvalid, "%s:%d: what isn't UTF-8, or has a NUL byte, can't be in the environment", e.EnvFile, n)
		}
		env = append(env, key+"="+value)
	}
	if err := sc.Err(); err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the server's env_file %s: %w", e.EnvFile, err)
	}
	return env, nil
}

var (
	shortRepo = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+$`)
	scpRepo   = regexp.MustCompile(`^[A-Za-z0-9._-]+@[A-Za-z0-9.-]+:[^\s]+$`)
	repoDir   = regexp.MustCompile(`^\.?[A-Za-z0-9_][A-Za-z0-9._-]*$`)
)

// parseRepo returns the URL to clone and the name of the directory that git makes of it.
func parseRepo(repo string) (cloneURL, dir string, err error) {
	bad := shed.Errorf(shed.CodeInvalid, "%q is no repository", repo).
		WithHint("give a URL, user@host:path or owner/repo")
	switch {
	case shortRepo.MatchString(repo):
		cloneURL = "https://github.com/" + strings.TrimSuffix(repo, ".git") + ".git"
	case scpRepo.MatchString(repo):
		cloneURL = repo
	default:
		u, perr := url.Parse(repo)
		if perr != nil || u.Host == "" || strings.HasPrefix(u.Host, "-") || strings.Trim(u.Path, "/") == "" {
			return "", "", bad
		}
		switch u.Scheme {
		case "https", "http", "ssh", "git":
		default:
			return "", "", bad
		}
		cloneURL = repo
	}
	dir = strings.TrimSuffix(path.Base(strings.TrimRight(cloneURL[strings.LastIndex(cloneURL, ":")+1:], "/")), ".git")
	if !repoDir.MatchString(dir) || dir == ".git" {
		return "", "", bad
	}
	return cloneURL, dir, nil
}

// clone clones the shed's repository into its workspace.
func (e *Engine) clone(ctx context.Context, en *entry) error {
	e.mu.Lock()
	client := en.keeper
	e.mu.Unlock()
	if client == nil {
		return shed.Errorf(shed.CodeBoot, "shed %q stopped before its repository was cloned", en.rec.Name)
	}
	log, err := os.OpenFile(filepath.Join(e.State.Shed(en.rec.Name), provisionFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	conn, err := client.Open(ctx)
	if err != nil {
		return err
	}
	if err := e.execOn(ctx, conn, en.rec, shed.Command{
		Args: []string{"git", "clone", "--", en.rec.Repo, en.rec.Workspace}, Dir: home, User: agent.DefaultUser,
		Env: []string{"GIT_TERMINAL_PROMPT=0"},
	}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	p := agent.NewProcess(conn)
	defer p.Close()
	p.Stdin().Close()
	outDone := make(chan struct{})
	go func() {
		defer close(outDone)
		io.Copy(log, p.Stdout())
	}()
	io.Copy(log, p.Stderr())
	<-outDone
	status, err := p.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	if status.Code != 0 {
		said := status.Error
		if said == "" {
			said = vm.LastLines(log.Name(), 0, 5)
		}
		return shed.Errorf(shed.CodeCommand, "cloning %s failed: %s", en.rec.Repo, said).
			WithHint("check the URL and that a shed may read it; what was made of this one is undone")
	}
	return nil
}

// logPoll is how often a followed log is looked at.
const logPoll = 200 * time.Millisecond

func (e *Engine) Logs(ctx context.Context, name string, follow bool) (io.ReadCloser, error) {
	if _, err := e.Get(ctx, name); err != nil {
		return nil, err
	}
	dir := e.State.Shed(name)
	r, w := io.Pipe()
	go func() {
		var offsets [2]int64
		for {
			for i, file := range []string{consoleFile, provisionFile} {
				n, err := copyFrom(w, filepath.Join(dir, file), offsets[i])
				offsets[i] = n
				if err != nil {
					w.CloseWithError(err)
					return
				}
			}
			if !follow {
				w.Close()
				return
			}
			select {
			case <-ctx.Done():
				w.CloseWithError(ctx.Err())
				return
			case <-time.After(logPoll):
			}
			if _, err := e.Get(ctx, name); err != nil {
				w.Close()
				return
			}
		}
	}()
	return r, nil
}

// copyFrom copies a file from offset to where it ends now, which it returns. A file that
// has become shorter is read from its start.
func copyFrom(w io.Writer, file string, offset int64) (int64, error) {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return offset, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return offset, err
	}
	if fi.Size() < offset {
		offset = 0
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return offset, err
	}
	n, err := io.Copy(w, io.LimitReader(f, fi.Size()-offset)) // it may grow faster than it is read
	if err != nil {
		return offset, fmt.Errorf("reading %s: %w", file, err)
	}
	return offset + n, nil
}
