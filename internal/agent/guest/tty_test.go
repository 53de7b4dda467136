//go:build linux

package guest

import (
	"io"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func onTTY(cmd shed.Command) shed.Command {
	cmd.TTY = &shed.TTY{Term: "xterm-test", Size: shed.Size{Rows: 33, Cols: 101}}
	return cmd
}

func TestTTY(t *testing.T) {
	p := start(t, newShed(t), onTTY(sh(`tty; echo $TERM; stty size; echo err >&2; ps -o tpgid= -p $$ | tr -d ' '; echo $$`)))
	got := finish(t, p)
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(got.stdout, "\r\n", "\n")), "\n")
	if len(lines) != 6 {
		t.Fatalf("%q", got.stdout)
	}
	if !strings.HasPrefix(lines[0], "/dev/pts/") || lines[1] != "xterm-test" || lines[2] != "33 101" || lines[3] != "err" {
		t.Errorf("%q", lines)
	}
	if lines[4] != lines[5] {
		t.Errorf("the foreground group is %s, not the command's %s", lines[4], lines[5])
	}
	if got.stderr != "" {
		t.Errorf("stderr %q", got.stderr)
	}
}

func TestTTYResize(t *testing.T) {
	p := start(t, newShed(t), onTTY(sh(`trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done`)))
	readLine(t, p.Stdout())
	if err := p.Resize(shed.Size{Rows: 7, Cols: 9}); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.stdout != "7 9\r\n" {
		t.Errorf("%+v", got)
	}
}

// What is typed is the terminal's to interpret.
func TestTTYKeys(t *testing.T) {
	p := start(t, newShed(t), onTTY(sh(`trap 'echo INT; exit 9' INT; echo ready; while :; do sleep 0.01; done`)))
	readLine(t, p.Stdout())
	if _, err := io.WriteString(p.Stdin(), "\x03"); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.Code != 9 || !strings.Contains(got.stdout, "INT") {
		t.Errorf("%+v", got)
	}
}

func TestTTYEndOfInput(t *testing.T) {
	p := start(t, newShed(t), onTTY(sh(`stty -echo; echo ready; cat; echo end`)))
	readLine(t, p.Stdout())
	if _, err := io.WriteString(p.Stdin(), "line\n"); err != nil {
		t.Fatal(err)
	}
	if err := p.Stdin().Close(); err != nil {
		t.Fatal(err)
	}
	if got := finish(t, p); got.stdout != "line\r\nend\r\n" || got.Code != 0 {
		t.Errorf("%+v", got)
	}
}

// A signal goes to who has the terminal, not to the shell behind it.
func TestTTYSignalReachesTheForeground(t *testing.T) {
	p := start(t, newShed(t), onTTY(shed.Command{Args: []string{"bash", "--norc", "--noprofile", "-c",
		`set -m; sh -c 'trap "echo job; exit 5" TERM; echo ready; while :; do sleep 0.01; done'; echo shell $?`}}))
	readLine(t, p.Stdout())
	if err := p.Signal("TERM"); err != nil {
		t.Fatal(err)
	}
	// What the job says of its sleep, which the signal ends too, may come first.
	if got := finish(t, p); !strings.HasSuffix(got.stdout, "job\r\nshell 5\r\n") {
		t.Errorf("%+v", got)
	}
}
