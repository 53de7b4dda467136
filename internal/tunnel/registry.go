//go:build linux || darwin

package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/userfile"
)

const (
	// tempPrefix begins the names of records that are being written, which the lock's holder alone does.
	tempPrefix = ".tmp-"

	lockPoll = 10 * time.Millisecond
	// statusTimeout is how long a tunnel may take to say how it is doing.
	statusTimeout = 2 * time.Second
)

// Registry knows the tunnels that run: in a directory it has a record of each, which the tunnel's process
// holds a lock on. So a record whose process has ended, however it did, is told from others, and whoever
// comes upon it removes it. Beside a record is a socket on which the process says how it is doing.
type Registry struct {
	dir         string
	endPatience time.Duration // how long a tunnel may take to end when it is asked to
}

// NewRegistry returns the registry in dir, which is made when it is needed.
func NewRegistry(dir string) *Registry { return &Registry{dir: dir, endPatience: 10 * time.Second} }

// CreateLog makes the log file of a tunnel to a shed that is about to be started.
func (r *Registry) CreateLog(shedName string) (*os.File, error) {
	if err := r.mkdir(); err != nil {
		return nil, err
	}
	return os.CreateTemp(r.dir, shedName+"-*.log")
}

func (r *Registry) mkdir() error {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return fmt.Errorf("the directory of the tunnels' records: %w", err)
	}
	return nil
}

// lock keeps others from changing the registry until unlock is called.
func (r *Registry) lock(ctx context.Context) (unlock func(), err error) {
	if err := r.mkdir(); err != nil {
		return nil, err
	}
	unlock, err = userfile.Lock(ctx, r.dir)
	if err != nil {
		return nil, fmt.Errorf("the tunnels' records: %w", err)
	}
	return unlock, nil
}

// poll calls f until it is done, fails, or ctx is done.
func poll(ctx context.Context, f func() (done bool, err error)) error {
	for {
		if done, err := f(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

func (r *Registry) record(pid int) string { return filepath.Join(r.dir, strconv.Itoa(pid)+".json") }
func (r *Registry) socket(pid int) string { return filepath.Join(r.dir, strconv.Itoa(pid)+".sock") }

// live returns the tunnels that run, and removes what others have left behind. The registry is locked.
func (r *Registry) live() ([]Record, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	var live []Record
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(r.dir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		pid, err := strconv.Atoi(id)
		if !isRecord || err != nil {
			continue
		}
		rec, ok, err := r.read(pid)
		if err != nil {
			return nil, err
		}
		if ok {
			live = append(live, rec)
		}
	}
	slices.SortFunc(live, func(a, b Record) int { return a.Since.Compare(b.Since) })
	return live, nil
}

// read returns the record of a process if that runs, and else removes what is left of it.
func (r *Registry) read(pid int) (rec Record, ok bool, err error) {
	f, err := os.Open(r.record(pid))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, false, nil // it has just ended
	}
	if err != nil {
		return rec, false, err
	}
	defer f.Close()
	held, err := held(f)
	if err != nil {
		return rec, false, err
	}
	text, err := io.ReadAll(f)
	if err == nil {
		err = json.Unmarshal(text, &rec)
	}
	if !held {
		// Written by a process that was killed at any point, it may say anything.
		if err != nil || filepath.Dir(rec.Log) != r.dir {
			rec.Log = ""
		}
		return rec, false, r.remove(pid, rec.Log)
	}
	if err != nil {
		return rec, false, fmt.Errorf("the record of the tunnel of process %d, %s, can't be read: %w", pid, f.Name(), err)
	}
	rec.PID = pid
	return rec, true, nil
}

// remove removes what there is of the tunnel of a process.
func (r *Registry) remove(pid int, log string) error {
	files := []string{r.socket(pid), r.record(pid)}
	if log != "" {
		files = append(files, log)
	}
	for _, file := range files {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// held says whether a process holds the lock on a record.
func held(f *os.File) (bool, error) {
	err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("the lock of %s: %w", f.Name(), err)
	}
	return false, unix.Flock(int(f.Fd()), unix.LOCK_UN)
}

// Tunnel is a tunnel that runs.
type Tunnel struct {
	Record
	Status
}

// List returns the tunnels that run, oldest first.
func (r *Registry) List(ctx context.Context) ([]Tunnel, error) {
	records, err := r.records(ctx)
	if err != nil {
		return nil, err
	}
	tunnels := make([]Tunnel, len(records))
	var parts sync.WaitGroup
	for i, rec := range records {
		parts.Go(func() { tunnels[i] = Tunnel{rec, r.status(ctx, rec)} })
	}
	parts.Wait()
	return slices.DeleteFunc(tunnels, func(t Tunnel) bool {
		_, err := os.Stat(r.record(t.PID))
		return t.State == Silent && errors.Is(err, fs.ErrNotExist) // it has ended meanwhile
	}), nil
}

func (r *Registry) records(ctx context.Context) ([]Record, error) {
	if _, err := os.Stat(r.dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return r.live()
}

// status asks the process of a tunnel how that is doing.
func (r *Registry) status(ctx context.Context, rec Record) Status {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	s := Status{Connections: make([]int, len(rec.Ports))}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", r.socket(rec.PID))
	if err == nil {
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		err = json.NewDecoder(conn).Decode(&s)
	}
	if err == nil && len(s.Connections) == len(rec.Ports) {
		return s
	}
	return Status{State: Silent, Reason: fmt.Sprintf("process %d doesn't say", rec.PID), Connections: make([]int, len(rec.Ports))}
}

// Check returns the tunnel that does already what rec is to do. CodeConflict if one to something else
// has a local port that rec needs. With replace neither matters.
func (r *Registry) Check(ctx context.Context, rec Record, replace bool) (*Record, error) {
	if replace {
		return nil, nil
	}
	live, err := r.records(ctx)
	if err != nil {
		return nil, err
	}
	return conflict(live, rec)
}

func conflict(live []Record, rec Record) (*Record, error) {
	for _, other := range live {
		if other.does(rec) {
			return &other, nil
		}
	}
	for _, other := range live {
		if port, ok := other.clash(rec); ok {
			return nil, shed.Errorf(shed.CodeConflict, "local port %d is taken by a tunnel: %v (server %s, %s, process %d)",
				port, other, other.Server, other.Mode, other.PID).
				WithHint("take its place with --replace, stop it with: shed tunnels stop %s, or take another port with -t LOCAL:REMOTE", other.Shed)
		}
	}
	return nil, nil
}

// Stop ends those of the tunnels that run which choose returns, and returns them when they have ended.
func (r *Registry) Stop(ctx context.Context, choose func([]Record) ([]Record, error)) ([]Record, error) {
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	live, err := r.live()
	if err != nil {
		return nil, err
	}
	chosen, err := choose(live)
	if err != nil {
		return nil, err
	}
	return r.end(ctx, chosen)
}

// end ends tunnels and returns those that it has ended. The registry is locked.
func (r *Registry) end(ctx context.Context, records []Record) (ended []Record, err error) {
	for _, rec := range records {
		e := r.endOne(ctx, rec)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("stopping the tunnel %v: %w", rec, e))
			continue
		}
		ended = append(ended, rec)
	}
	return ended, err
}

func (r *Registry) endOne(ctx context.Context, rec Record) error {
	f, err := os.Open(r.record(rec.PID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		// While the lock is held, the pid is that of the tunnel's process.
		if held, err := held(f); err != nil || !held {
			return err
		}
		if err := unix.Kill(rec.PID, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, r.endPatience)
		err = poll(wait, func() (bool, error) {
			held, err := held(f)
			return !held, err
		})
		cancel()
		if err == nil {
			return r.remove(rec.PID, rec.Log)
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	return fmt.Errorf("process %d was killed and did not end within %v", rec.PID, r.endPatience)
}
