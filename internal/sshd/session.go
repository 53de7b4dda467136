package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	// exitFailed is the exit status where not the command failed but what should have run it.
	exitFailed = 255

	copyBuffer = 32 << 10 // bytes: what a packet of SSH carries

	maxPendingSignals = 16
)

// session is one session channel. It runs at most one command.
type session struct {
	*connection
	ch ssh.Channel

	// Of the goroutine that takes requests, until the command is started.
	started bool
	tty     *shed.TTY
	env     []string
	agent   bool // to be forwarded

	// To the running command. Requests never wait for it: that would hold up the
	// whole connection when a command doesn't read its input.
	sizes   chan shed.Size // the latest only
	signals chan string
}

func newSession(c *connection, ch ssh.Channel) *session {
	return &session{
		connection: c, ch: ch,
		sizes:   make(chan shed.Size, 1),
		signals: make(chan string, maxPendingSignals),
	}
}

// serve handles the channel's requests until it is closed, which ends a
// command that still runs, and returns when all of the session has ended.
func (s *session) serve(ctx context.Context, requests <-chan *ssh.Request) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for req := range requests {
		cmd, err := s.handle(req)
		if err != nil {
			s.log.Debug("SSH request refused", "type", fmt.Sprintf("%.80s", req.Type), "reason", err)
		}
		req.Reply(err == nil, nil)
		if cmd != nil {
			s.started = true
			running.Go(func() { s.run(ctx, *cmd, &running) })
		}
	}
}

var (
	errStarted    = errors.New("the command has been started already")
	errNotStarted = errors.New("no command has been started")
)

// handle handles one request. The error says why it is refused. A command is to be
// started after the reply.
func (s *session) handle(req *ssh.Request) (*shed.Command, error) {
	switch req.Type {
	case "shell", "exec", "subsystem", "env", "pty-req", "auth-agent-req@openssh.com":
		if s.started {
			return nil, errStarted
		}
	case "signal":
		if !s.started {
			return nil, errNotStarted
		}
	}
	switch req.Type {
	case "shell":
		return s.command(shed.Command{Login: true}, ""), nil
	case "exec":
		cmd, err := parseExec(req.Payload)
		if err != nil {
			return nil, err
		}
		return s.command(cmd, cmd.Script), nil
	case "subsystem":
		cmd, err := parseSubsystem(req.Payload)
		if err != nil {
			return nil, err
		}
		return s.command(cmd, cmd.Subsystem), nil
	case "auth-agent-req@openssh.com":
		if s.rights.Load().noAgent {
			return nil, errors.New("the key may not have its agent forwarded")
		}
		s.agent = true
		return nil, nil
	case "env":
		v, err := parseEnv(req.Payload, s.rights.Load().command != "")
		if err != nil {
			return nil, err
		}
		if len(s.env) >= maxEnv {
			return nil, fmt.Errorf("more than %d variables", maxEnv)
		}
		s.env = append(s.env, v)
		return nil, nil
	case "pty-req":
		if s.rights.Load().noPTY {
			return nil, errors.New("the key may not have a terminal")
		}
		tty, err := parsePTY(req.Payload)
		if err != nil {
			return nil, err
		}
		s.tty = &tty
		return nil, nil
	case "window-change":
		size, err := parseWindowChange(req.Payload)
		if err != nil {
			return nil, err
		}
		return nil, s.resize(size)
	case "signal":
		name, err := parseSignal(req.Payload)
		if err != nil {
			return nil, err
		}
		select {
		case s.signals <- name:
			return nil, nil
		default:
			return nil, errors.New("the command does not take its signals")
		}
	default:
		return nil, errors.New("not supported")
	}
}

// internalSFTP is what sshd(8) calls the command that serves files.
const internalSFTP = "internal-sftp"

// command completes cmd, or replaces it by what the key is bound to. asked is
// what the client says to run.
func (s *session) command(cmd shed.Command, asked string) *shed.Command {
	r := s.rights.Load()
	env := s.env
	switch {
	case r.command == internalSFTP:
		cmd = shed.Command{Subsystem: shed.SubsystemSFTP}
	case r.command != "":
		cmd = shed.Command{Script: r.command}
		if asked != "" {
			env = append(env, "SSH_ORIGINAL_COMMAND="+strings.ToValidUTF8(asked, "\uFFFD"))
		}
	}
	if cmd.Subsystem == "" {
		cmd.TTY = s.tty
	}
	client, clientPort := addrFields(s.conn.RemoteAddr())
	server, serverPort := addrFields(s.conn.LocalAddr())
	cmd.Env = append(append(env,
		fmt.Sprintf("SSH_CONNECTION=%s %d %s %d", client, clientPort, server, serverPort),
		fmt.Sprintf("SSH_CLIENT=%s %d %d", client, clientPort, serverPort)), r.env...)
	return &cmd
}

// addrFields returns an address as the variables of SSH have it.
func addrFields(addr net.Addr) (ip string, port uint16) {
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return "UNKNOWN", 0
	}
	return ap.Addr().Unmap().String(), ap.Port()
}

func (s *session) resize(size shed.Size) error {
	switch {
	case s.tty == nil:
		return errors.New("there is no terminal")
	case !s.started:
		s.tty.Size = size
	default:
		select {
		case <-s.sizes:
		default:
		}
		s.sizes <- size // only this goroutine fills it
	}
	return nil
}

// run runs cmd, tells the client how it ended and closes the channel. What may
// last until the client has closed the channel too is added to rest.
func (s *session) run(ctx context.Context, cmd shed.Command, rest *sync.WaitGroup) {
	defer s.ch.Close()
	if err := s.checkName(); err != nil {
		s.fail(cmd, err)
		return
	}
	if s.agent {
		sock, stop, err := s.forwardAgent(ctx)
		if err != nil { // as anywhere else, the command runs without
			s.log.Info("SSH agent not forwarded", "err", err)
		} else {
			defer stop()
			cmd.Env = append(cmd.Env, "SSH_AUTH_SOCK="+sock)
		}
	}
	conn, err := s.s.sheds.Exec(ctx, s.conn.User(), cmd)
	if err != nil {
		s.fail(cmd, err)
		return
	}
	status, err := s.attach(ctx, agent.NewProcess(conn), rest)
	switch {
	case ctx.Err() != nil: // nobody is there to be told
	case err != nil:
		s.fail(cmd, err)
	default:
		if status.Error != "" {
			s.print(cmd, "shed: "+status.Error)
		}
		s.exit(status)
	}
}

// attach connects the channel with p, which it closes, and returns how p ended once all
// that p wrote is delivered.
func (s *session) attach(ctx context.Context, p shed.Process, rest *sync.WaitGroup) (shed.ExitStatus, error) {
	defer context.AfterFunc(ctx, func() { p.Close() })()

	rest.Go(func() {
		stdin := p.Stdin()
		if _, err := copyStream(stdin, s.ch); err == nil {
			stdin.Close()
		}
	})

	var parts sync.WaitGroup
	defer parts.Wait()
	ended := make(chan struct{})
	defer close(ended)
	defer p.Close() // before the wait: writes to p may block
	parts.Go(func() {
		for {
			var err error
			select {
			case <-ended:
				return
			case size := <-s.sizes:
				err = p.Resize(size)
			case name := <-s.signals:
				err = p.Signal(name)
			}
			if err != nil {
				return // p has ended
			}
		}
	})

	var output sync.WaitGroup
	output.Go(func() { copyStream(s.ch, p.Stdout()) })
	output.Go(func() { copyStream(s.ch.Stderr(), p.Stderr()) })
	output.Wait()
	return p.Wait()
}

func copyStream(w io.Writer, r io.Reader) (int64, error) {
	return io.CopyBuffer(w, r, make([]byte, copyBuffer))
}

// fail tells the client why its command didn't run to its end.
func (s *session) fail(cmd shed.Command, err error) {
	s.log.Info("SSH session failed", "err", err)
	text := "shed: " + err.Error()
	if hint := shed.ErrorHint(err); hint != "" {
		text += "\nhint: " + hint
	}
	s.print(cmd, text)
	s.exit(shed.ExitStatus{Code: exitFailed})
}

// print writes lines to the client's standard error.
func (s *session) print(cmd shed.Command, lines string) {
	lines = strings.TrimRight(lines, "\n") + "\n"
	if cmd.TTY != nil { // the client's terminal is raw
		lines = strings.ReplaceAll(lines, "\n", "\r\n")
	}
	io.WriteString(s.ch.Stderr(), lines)
}

// exit tells the client how the command ended and ends the output, in this order: a client may
// close the channel as soon as the output has ended, and nothing can be sent on it from then on.
func (s *session) exit(status shed.ExitStatus) {
	defer s.ch.CloseWrite()
	if slices.Contains(signals, status.Signal) {
		s.ch.SendRequest("exit-signal", false, ssh.Marshal(struct {
			Name       string
			CoreDumped bool
			Message    string
			Language   string
		}{Name: status.Signal}))
		return
	}
	s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(status.Code)}))
}
