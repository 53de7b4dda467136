package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// stopGrace is how long a child has to end when it is asked to.
	stopGrace = 5 * time.Second
	// maxMessages bounds what is kept of a child's messages, in bytes and lines.
	maxMessages     = 4 << 10
	maxMessageLines = 5
)

// command returns a command that speaks English and ends with ctx, and its stderr.
func command(ctx context.Context, dir, name string, args ...string) (*exec.Cmd, *messages) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopGrace
	stderr := new(messages)
	cmd.Stderr = stderr
	return cmd, stderr
}

// run runs a command in dir and returns what it wrote to its stdout.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd, stderr := command(ctx, dir, name, args...)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return nil, childError(cmd, err, stderr)
	}
	return out.Bytes(), nil
}

func childError(cmd *exec.Cmd, err error, stderr *messages) error {
	err = fmt.Errorf("%s: %w", filepath.Base(cmd.Path), err)
	if lines := stderr.lines(); len(lines) > 0 {
		err = errors.Join(err, errors.New(strings.Join(lines, "\n")))
	}
	return err
}

// messages keeps the end of what is written to it.
type messages struct{ buf []byte }

func (m *messages) Write(p []byte) (int, error) {
	m.buf = append(m.buf, p...)
	if over := len(m.buf) - maxMessages; over > 0 {
		m.buf = m.buf[over:]
	}
	return len(p), nil
}

func (m *messages) lines() []string {
	text := strings.TrimSpace(string(m.buf))
	if text == "" {
		return nil
	}
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-maxMessageLines):]
}
