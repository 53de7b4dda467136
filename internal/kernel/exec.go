package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/charliek/shed/internal/lines"
)

const (
	// stopGrace is how long a child has to end when it is asked to.
	stopGrace = 5 * time.Second
	// lastLines is how much of a child's messages an error has.
	lastLines = 5
)

// command returns a command that speaks English and ends with ctx, and its stderr.
func command(ctx context.Context, dir, name string, args ...string) (*exec.Cmd, *lines.Lines) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopGrace
	stderr := lines.New(lastLines, nil)
	cmd.Stderr = stderr.Writer()
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

func childError(cmd *exec.Cmd, err error, stderr *lines.Lines) error {
	err = fmt.Errorf("%s: %w", filepath.Base(cmd.Path), err)
	if said := stderr.Last(); said != "" {
		err = errors.Join(err, errors.New(said))
	}
	return err
}
