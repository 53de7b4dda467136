//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/charmbracelet/x/ansi"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	// sessionName is what the agent is called where it keeps a session, or shows one, in an image without
	// tmux: as a process of its own with the rights of the user.
	sessionName = "shed-session"

	// keptTerm is the kind of terminal that a kept session is to its programs.
	keptTerm = "xterm-256color"
)

// keptRequest is the first message on the socket of a kept session. It is answered by an agent.Reply. After that to Attach come
// frames of the exec protocol, in both directions, and FrameExit when the session has ended. After that to Status
// comes a keptStatus, and the connection lasts as long as the session.
type keptRequest struct {
	Attach *shed.Size `json:"attach,omitempty"`
	Status bool       `json:"status,omitempty"`
}

type keptStatus struct {
	Session shed.Session `json:"session"`
	Leader  int          `json:"leader"` // process ID of the shell
}

// keptTaken is the reply of a keeper that there is no need of.
const keptTaken = "the session is there already"

const (
	requestTimeout = 5 * time.Second // for a client to say what it wants
	farewellLimit  = time.Second     // for a client to take what it is told at the end
)

// runSession runs what its arguments say: keep DIR NAME, or attach DIR NAME MODE.
func runSession(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "keep":
		return runKeeper(args[1], args[2])
	case len(args) == 4 && args[0] == "attach":
		os.Exit(runAttach(args[1], args[2], shed.AttachMode(args[3])))
	}
	return errors.New("a session's process isn't called like this")
}

// keeper holds the terminal of a session and shows it to whoever is attached.
type keeper struct {
	name    string
	created time.Time
	shell   *exec.Cmd
	tty     *os.File
	input   *stdinQueue // to the shell's terminal

	mu      sync.Mutex
	screen  *screen
	viewers []*viewer // the last is the one that was used last: it has the say about the size
	wrote   time.Time
}

// runKeeper keeps a session until its shell ends, and doesn't return unless that fails. Descriptor 3 is
// the first connection to it.
func runKeeper(dir, name string) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM)
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	file := os.NewFile(3, "first")
	first, err := net.FileConn(file)
	if err != nil {
		return err
	}
	file.Close()
	refuse := func(err error) error {
		return errors.Join(agent.WriteMessage(first, agent.Reply{Error: err.Error()}), first.Close())
	}
	l, err := listenKept(dir, name)
	if err != nil {
		return refuse(err)
	}
	k, err := startKeeper(name)
	if err != nil {
		return errors.Join(refuse(err), l.close())
	}
	os.Chdir("/")
	go func() {
		for range signals {
			endTerminal(k.shell.Process.Pid)
		}
	}()
	if err := k.run(l, first); err != nil {
		return err
	}
	os.Exit(0)
	return nil
}

// startKeeper starts a login shell in a new terminal.
func startKeeper(name string) (*keeper, error) {
	shell := os.Getenv("SHELL")
	k := &keeper{name: name, created: time.Now(), wrote: time.Now(), input: newStdinQueue()}
	k.shell = &exec.Cmd{
		Path: shell, Args: []string{"-" + filepath.Base(shell)},
		Env:         environ(os.Environ()).with("TERM=" + keptTerm),
		SysProcAttr: &syscall.SysProcAttr{},
	}
	// What programs ask of their terminal is answered only as long as they read: they may ask without end.
	k.screen = newScreen(shed.Size{}, func(b []byte) { k.input.put(b) })
	tty, err := startOnTTY(k.shell, k.screen.size)
	if err != nil {
		k.screen.close()
		return nil, err
	}
	k.tty = tty
	return k, nil
}

// run serves the session until its shell has ended and all clients are told.
func (k *keeper) run(l *keptListener, first net.Conn) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { k.serve(ctx, first) })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { k.serve(ctx, conn) })
		}
	})
	wg.Go(func() {
		for {
			b, ok := k.input.take()
			if !ok {
				return
			}
			k.tty.Write(b)
			k.input.taken()
		}
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		k.shell.Wait()
		k.tty.SetReadDeadline(time.Unix(1, 0))
	}()
	readOutput(k.tty, make([]byte, 16<<10), func(b []byte) error {
		k.draw(b)
		return nil
	})
	<-ended
	err := l.close()
	cancel()
	k.input.close()
	k.tty.Close()
	wg.Wait()
	k.screen.close()
	return err
}

// draw has the screen show what the session's programs have written.
func (k *keeper) draw(b []byte) {
	// A line that scrolls a large screen takes long: nobody else who needs the screen is to wait for many of them.
	for len(b) > 0 {
		n := partOf(b)
		k.drawPart(b[:n])
		b = b[n:]
	}
}

// partOf returns how much of b is drawn at once: it ends with a line or, where that is too long, with a character.
func partOf(b []byte) int {
	if len(b) <= drawnAtOnce {
		return len(b)
	}
	if end := bytes.LastIndexByte(b[:drawnAtOnce], '\n'); end >= 0 {
		return end + 1
	}
	n := 0
	for {
		char, _ := ansi.FirstGraphemeCluster(b[n:], ansi.GraphemeWidth)
		next := n + max(len(char), 1)
		if n > 0 && next > drawnAtOnce {
			return n
		}
		n = next
	}
}

// drawnAtOnce is how much of what a program has written is drawn without anybody else getting at the screen, in bytes.
const drawnAtOnce = 512

func (k *keeper) drawPart(b []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.screen.write(b)
	k.wrote = time.Now()
	k.touch()
}

// touch has every viewer look at the screen again.
func (k *keeper) touch() {
	for _, v := range k.viewers {
		v.touch()
	}
}

// fit gives the screen the size of the terminal that was used last.
func (k *keeper) fit() {
	if len(k.viewers) == 0 {
		return
	}
	old := k.screen.size
	k.screen.resize(k.viewers[len(k.viewers)-1].p.size)
	if k.screen.size != old {
		resizeTTY(k.tty, k.screen.size)
		k.touch()
	}
}

func (k *keeper) status() keptStatus {
	command := processName(k.shell.Process.Pid)
	if fg, ok := foreground(k.tty); ok {
		if name := processName(fg); name != "" {
			command = name
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return keptStatus{
		Session: shed.Session{
			Name: k.name, Keeper: shed.KeptByAgent, Command: command, Attached: len(k.viewers),
			LastLine: k.screen.lastLine(), CreatedAt: k.created, ActiveAt: k.wrote,
		},
		Leader: k.shell.Process.Pid,
	}
}

// processName returns what a process is called, or "" if there is no such process.
func processName(pid int) string {
	b, err := os.ReadFile(procFile(pid, "cmdline"))
	if err != nil {
		return ""
	}
	arg0, _, _ := strings.Cut(string(b), "\x00")
	if arg0 == "" {
		b, err := os.ReadFile(procFile(pid, "comm"))
		if err != nil {
			return ""
		}
		arg0 = strings.TrimSpace(string(b))
	}
	return filepath.Base(strings.TrimPrefix(arg0, "-"))
}

// serve answers a client, and returns when it has gone.
func (k *keeper) serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(requestTimeout))
	var req keptRequest
	if err := agent.ReadMessage(conn, &req); err != nil {
		return
	}
	conn.SetReadDeadline(time.Time{})
	// A client that doesn't read must not keep the session from ending.
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now().Add(farewellLimit)) })()
	switch {
	case req.Attach != nil:
		if err := agent.WriteMessage(conn, agent.Reply{}); err == nil {
			k.attach(ctx, conn, *req.Attach)
		}
	case req.Status:
		if errors.Join(agent.WriteMessage(conn, agent.Reply{}), agent.WriteMessage(conn, k.status())) != nil {
			return
		}
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		io.Copy(io.Discard, conn)
	default:
		agent.WriteMessage(conn, agent.Reply{Error: "the session's process doesn't know this request"})
	}
}
