//go:build linux

package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/charliek/shed/internal/proclock"
)

const lockPatience = 2 * time.Second

var errKept = errors.New("the shed has a keeper")

// lock takes the lock on the run directory. It is held by whoever has the file open: the
// server while it starts a keeper, and then the keeper, which inherits it. Where there is a keeper
// that answers, that is errKept.
func (c *Client) lock(ctx context.Context) (*os.File, error) {
	for {
		f, err := proclock.Take(filepath.Join(c.run, lockFile), 0)
		if !errors.Is(err, proclock.ErrHeld) {
			return f, err
		}
		// Who looks for a keeper holds it for a moment, and a keeper that is ending until it has: neither answers.
		err = c.ping(ctx)
		if err == nil {
			return nil, errKept
		}
		if !errors.Is(err, ErrNotRunning) {
			return nil, err
		}
	}
}

// locked says whether somebody holds the lock on a run directory.
func locked(run string) (bool, error) {
	return proclock.Held(filepath.Join(run, lockFile))
}

// killKeeper ends the keeper of a run directory with SIGKILL, however it fares, and returns when
// it has ended. Where there is none, that is no error.
func killKeeper(run string) error {
	p, err := proclock.Find(filepath.Join(run, lockFile), lockPatience)
	if errors.Is(err, proclock.ErrNotHeld) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.Kill(); err != nil {
		return err
	}
	select {
	case <-p.Ended():
		return nil
	case <-time.After(answerTimeout):
		return fmt.Errorf("the keeper, process %d, was killed and did not end within %v", p.PID(), answerTimeout)
	}
}
