//go:build linux

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"github.com/rogpeppe/go-internal/testscript"
)

// terminal is a program in a terminal, and what it has shown there.
type terminal struct {
	user  *os.File // the user's side
	cmd   *exec.Cmd
	ended chan struct{} // closed when the program has ended, and all is in shown

	mu    sync.Mutex
	shown []byte
	seen  int // how much of it was expected already
}

// terminalsKey is that of a script's terminals, by name.
type terminalsKey struct{}

// cmdTerminal is terminal NAME VERB ARGS...:
//
//	terminal NAME run COMMAND ARGS...   in a new terminal of 24 rows and 80 columns
//	terminal NAME expect REGEXP         waits until that is shown after what was expected before
//	[!] terminal NAME shows REGEXP      is it among what was shown until now?
//	terminal NAME type TEXT             with Go's escapes: \r, \x02
//	terminal NAME resize ROWS COLUMNS
//	terminal NAME signal NUMBER         to the program
//	terminal NAME ends CODE             waits for the end, with that exit code
//
// What is shown is without escape sequences.
func cmdTerminal(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 3 || neg && args[1] != "shows" {
		ts.Fatalf("usage: terminal NAME run|expect|shows|type|resize|signal|ends ARGS...")
	}
	all := ts.Value(terminalsKey{}).(map[string]*terminal)
	name, verb, args := args[0], args[1], args[2:]
	if verb == "run" {
		t, err := runTerminal(ts, args)
		ts.Check(err)
		all[name] = t
		return
	}
	t := all[name]
	if t == nil {
		ts.Fatalf("there is no terminal %s", name)
	}
	if err := t.do(verb, args, neg); err != nil {
		ts.Fatalf("terminal %s: %v; it has shown:\n%s", name, err, t.text())
	}
}

// runTerminal runs a program with the environment of a script until that ends.
func runTerminal(ts *testscript.TestScript, args []string) (*terminal, error) {
	// The environment can't be asked for, but a program gets it.
	file := ts.MkAbs(".environment")
	if err := ts.Exec("sh", "-c", `env -0 >"$0"`, file); err != nil {
		return nil, err
	}
	env := strings.Split(strings.TrimRight(ts.ReadFile(file), "\x00"), "\x00")
	cmd := exec.Command("env", args...) // which looks it up in the script's PATH
	cmd.Env = append(env, "TERM=xterm-256color", "LC_ALL=C.UTF-8")
	cmd.Dir = ts.MkAbs(".")
	user, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		return nil, err
	}
	t := &terminal{user: user, cmd: cmd, ended: make(chan struct{})}
	go t.watch()
	ts.Defer(func() {
		cmd.Process.Kill()
		<-t.ended
		user.Close()
	})
	return t, nil
}

func (t *terminal) watch() {
	defer close(t.ended)
	buf := make([]byte, 64<<10)
	for {
		n, err := t.user.Read(buf)
		t.mu.Lock()
		t.shown = append(t.shown, buf[:n]...)
		t.mu.Unlock()
		if err != nil { // EIO: nobody has the terminal any more
			break
		}
	}
	t.cmd.Wait()
}

// escape matches the sequences of a terminal: CSI, OSC and the like, and the short ones.
var escape = regexp.MustCompile(`\x1b(\[[0-?]*[ -/]*[@-~]|[\]P_^X][^\x07\x1b]*(\x07|\x1b\\)?|[ -/]*[0-~])|[\x00-\x09\x0b-\x1f]`)

// unfinished matches a sequence whose end has not come yet.
var unfinished = regexp.MustCompile(`\x1b(\[[0-?]*)?[ -/]*$`)

// text returns all that was shown, as text.
func (t *terminal) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(escape.ReplaceAll(unfinished.ReplaceAll(t.shown, nil), nil))
}

func (t *terminal) do(verb string, args []string, neg bool) error {
	switch verb {
	case "expect":
		return t.expect(args[0])
	case "shows":
		re, err := regexp.Compile(args[0])
		if err == nil && re.MatchString(t.text()) == neg {
			err = fmt.Errorf("%q is shown: %v", args[0], neg)
		}
		return err
	case "type":
		text, err := strconv.Unquote(`"` + strings.ReplaceAll(args[0], `"`, `\"`) + `"`)
		if err != nil {
			return fmt.Errorf("%q: %w", args[0], err)
		}
		_, err = t.user.WriteString(text)
		return err
	case "resize":
		if len(args) != 2 {
			return errors.New("usage: resize ROWS COLUMNS")
		}
		rows, err1 := strconv.ParseUint(args[0], 10, 16)
		cols, err2 := strconv.ParseUint(args[1], 10, 16)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		return pty.Setsize(t.user, &pty.Winsize{Rows: uint16(rows), Cols: uint16(cols)})
	case "signal":
		sig, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return t.cmd.Process.Signal(syscall.Signal(sig))
	case "ends":
		return t.end(args[0])
	}
	return fmt.Errorf("%s: no such thing", verb)
}

// expect waits until what is shown, and was not expected before, has a match of pattern.
func (t *terminal) expect(pattern string) error {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return err
	}
	return eventually(func() error {
		over := false
		select {
		case <-t.ended:
			over = true
		default:
		}
		text := t.text()
		if at := re.FindStringIndex(text[t.seen:]); at != nil {
			t.seen += at[1]
			return nil
		}
		err := fmt.Errorf("%q is not shown after %q", pattern, text[max(0, t.seen-40):t.seen])
		if over {
			return permanent{err}
		}
		return err
	})
}

func (t *terminal) end(code string) error {
	select {
	case <-t.ended:
	case <-time.After(patience):
		return fmt.Errorf("it has not ended within %v", patience)
	}
	if got := strconv.Itoa(t.cmd.ProcessState.ExitCode()); got != code {
		return fmt.Errorf("exit code %s, want %s", got, code)
	}
	return nil
}
