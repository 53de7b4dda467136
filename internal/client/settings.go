package client

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed/internal/lines"
)

// apiUser and apiSocket are where the SSH server has the HTTP API.
const (
	apiUser   = "_api"
	apiSocket = "/shed.sock"
)

const (
	settingsTimeout = 2 * time.Second // for OpenSSH to say what is configured
	maxSettings     = 1 << 20         // bytes of that
)

// settings are what the user's OpenSSH is told about a host.
type settings struct {
	hostName       string
	identities     []string // files of private keys
	certificates   []string
	identitiesOnly bool   // no other keys of the agent
	agent          string // socket, or ""
	// proxy is a command whose stdin and stdout are a connection to the host; nil: none is needed.
	proxy []string
}

// defaultSettings are those where OpenSSH says nothing.
func defaultSettings(host string) settings {
	s := settings{hostName: host, agent: os.Getenv("SSH_AUTH_SOCK")}
	for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
		s.identities = append(s.identities, expandHome("~/.ssh/"+name))
	}
	return s
}

// loadSettings asks OpenSSH what it is configured to use for host. Where it doesn't answer, it returns the default and why.
func loadSettings(ctx context.Context, host string, port int) (settings, error) {
	text, err := askOpenSSH(ctx, host, port)
	if err != nil || text == nil {
		return defaultSettings(host), err
	}
	return parseSettings(text, host, port), nil
}

// askOpenSSH returns what `ssh -G` prints about host, or nil where there is no ssh.
func askOpenSSH(ctx context.Context, host string, port int) ([]byte, error) {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return nil, nil // nothing is configured then
	}
	ctx, cancel := context.WithTimeout(ctx, settingsTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-G", "-p", strconv.Itoa(port), "-l", apiUser, host)
	// The configuration may run commands, and is not ours: they all get this long, and no terminal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond
	var out limitedBuffer
	said := lines.New(3, nil)
	cmd.Stdout, cmd.Stderr = &out, said.Writer()
	if err := cmd.Run(); err != nil {
		switch {
		case out.full:
			err = errors.New("too much output")
		case ctx.Err() != nil:
			err = fmt.Errorf("no answer within %s", settingsTimeout)
		}
		return nil, fmt.Errorf("ssh -G %s: %w %s", host, err, said.Last())
	}
	return out.b.Bytes(), nil
}

// limitedBuffer takes no more than maxSettings bytes.
type limitedBuffer struct {
	b    bytes.Buffer
	full bool
}

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if l.b.Len()+len(p) > maxSettings {
		l.full = true
		return 0, io.ErrShortWrite
	}
	return l.b.Write(p)
}

// optionsIn yields the keywords, in lower case, in what `ssh -G` prints, and their values.
func optionsIn(text []byte) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		scanner := bufio.NewScanner(bytes.NewReader(text))
		scanner.Buffer(nil, maxSettings)
		for scanner.Scan() {
			key, value, ok := strings.Cut(scanner.Text(), " ")
			if ok && !yield(strings.ToLower(key), value) {
				return
			}
		}
	}
}

// parseSettings reads what `ssh -G` prints about host.
func parseSettings(text []byte, host string, port int) settings {
	s := settings{hostName: host, agent: os.Getenv("SSH_AUTH_SOCK")}
	var identities, certificates []string
	var proxyCommand, proxyJump string
	for key, value := range optionsIn(text) {
		value = strings.TrimSpace(value)
		if value == "" || strings.ContainsRune(value, 0) {
			continue
		}
		switch key {
		case "hostname":
			if isHost(value) {
				s.hostName = value
			}
		case "identityfile":
			identities = append(identities, value)
		case "certificatefile":
			certificates = append(certificates, value)
		case "identitiesonly":
			s.identitiesOnly = value == "yes"
		case "identityagent":
			s.agent = value
		case "proxycommand":
			proxyCommand = value
		case "proxyjump":
			proxyJump = value
		}
	}
	expand := expander(host, s.hostName, port)
	files := func(paths []string) (files []string) {
		for _, path := range paths {
			if path, ok := expand(path); ok && path != "none" {
				files = append(files, expandHome(path))
			}
		}
		return files
	}
	s.identities, s.certificates = files(identities), files(certificates)
	switch {
	case s.agent == "none":
		s.agent = ""
	case s.agent == "SSH_AUTH_SOCK":
		s.agent = os.Getenv("SSH_AUTH_SOCK")
	case strings.HasPrefix(s.agent, "$"):
		s.agent = os.Getenv(strings.Trim(s.agent[1:], "{}"))
	default:
		path, ok := expand(s.agent)
		if s.agent = expandHome(path); !ok {
			s.agent = ""
		}
	}
	s.proxy = proxy(proxyCommand, proxyJump, net.JoinHostPort(s.hostName, strconv.Itoa(port)), expand)
	return s
}

// proxy returns the command that connects with to, as ssh_config(5) says of ProxyCommand and ProxyJump.
func proxy(command, jump, to string, expand func(string) (string, bool)) []string {
	if jump != "" && jump != "none" {
		args := []string{"ssh", "-W", to}
		last := jump
		if i := strings.LastIndex(jump, ","); i >= 0 {
			args = append(args, "-J", jump[:i])
			last = jump[i+1:]
		}
		if !strings.Contains(last, "://") {
			last = "ssh://" + last
		}
		return append(args, last)
	}
	if command == "" || command == "none" {
		return nil
	}
	if line, ok := expand(command); ok {
		return []string{cmp.Or(os.Getenv("SHELL"), "/bin/sh"), "-c", "exec " + line}
	}
	return nil
}

// expander returns a function that replaces the tokens of ssh_config(5) in a value. It reports false for a value with one that it doesn't know.
func expander(host, hostName string, port int) func(string) (string, bool) {
	tokens := map[byte]string{
		'%': "%", 'h': hostName, 'n': host, 'k': host, 'p': strconv.Itoa(port), 'r': apiUser, 'i': strconv.Itoa(os.Getuid()),
	}
	tokens['d'], _ = os.UserHomeDir()
	if u, err := user.Current(); err == nil {
		tokens['u'] = u.Username
	}
	if name, err := os.Hostname(); err == nil {
		tokens['l'] = name
		tokens['L'], _, _ = strings.Cut(name, ".")
	}
	return func(value string) (string, bool) {
		var b strings.Builder
		for i := 0; i < len(value); i++ {
			if value[i] != '%' {
				b.WriteByte(value[i])
				continue
			}
			if i++; i == len(value) {
				return "", false
			}
			token, ok := tokens[value[i]]
			if !ok {
				return "", false
			}
			b.WriteString(token)
		}
		return b.String(), true
	}
}

// dialProxy starts a command and returns the connection that its stdin and stdout are. Its end is waited for when that is closed.
func dialProxy(args []string) (net.Conn, error) {
	syscall.ForkLock.RLock() // no other child is to have them
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(pair[0])
		syscall.CloseOnExec(pair[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "proxy"), os.NewFile(uintptr(pair[1]), "proxy")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	said := lines.New(5, nil)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, said.Writer()
	// In a session of its own it doesn't get the signals of the terminal, which are for what runs in the shed; it can ask for nothing there either.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("the proxy %q: %w", filepath.Base(args[0]), err)
	}
	return &proxyConn{Conn: conn, cmd: cmd, said: said}, nil
}

// proxyConn is a connection through a command. It is closed once.
type proxyConn struct {
	net.Conn
	cmd  *exec.Cmd
	said *lines.Lines
}

func (c *proxyConn) Close() error {
	err := c.Conn.Close()
	syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
	c.cmd.Wait() // it was killed, or has failed: that is in what it said
	return err
}
