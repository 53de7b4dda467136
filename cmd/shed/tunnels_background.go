package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/tunnel"
	"golang.org/x/sys/unix"
)

// reportFD is where the process of a tunnel in the background writes its startReport.
const reportFD = 3

// startReport is how the start of a tunnel in the background went. One of the fields is set.
type startReport struct {
	Started *tunnel.Record `json:"started,omitempty"`
	Running *tunnel.Record `json:"running,omitempty"` // that one does it already
	Error   *shed.Error    `json:"error,omitempty"`
}

func (r *startReport) fail(err error) {
	if err != nil {
		r.Error = errorDoc(err)
	}
}

func (r *startReport) send() error {
	f := os.NewFile(reportFD, "report")
	return errors.Join(json.NewEncoder(f).Encode(r), f.Close())
}

// startBackground starts a process of its own for a tunnel, which has neither this one's terminal nor its
// working directory, and returns when its ports are open.
func (c *cli) startBackground(ctx context.Context, registry *tunnel.Registry, rec tunnel.Record, replace bool) error {
	args, err := c.detachedArgs(rec, replace)
	if err != nil {
		return err
	}
	log, err := registry.CreateLog(rec.Shed)
	if err != nil {
		return err
	}
	defer log.Close()
	report, err := c.spawn(ctx, append(args, "--detached", log.Name(), "--", rec.Server+"/"+rec.Shed), log)
	switch {
	case err != nil:
	case report.Error != nil:
		err = report.Error
	case report.Running != nil:
		err = c.printRunning(*report.Running, true)
	default:
		if err := c.printTunnel(*report.Started); err != nil {
			return err
		}
		c.message("It runs in the background; end it with: shed tunnels stop %s", rec.Shed)
		return nil
	}
	if rmErr := os.Remove(log.Name()); !errors.Is(rmErr, fs.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return err
}

// detachedArgs returns the command line that describes rec, without the shed.
func (c *cli) detachedArgs(rec tunnel.Record, replace bool) ([]string, error) {
	args := []string{"tunnels", "start"}
	if c.configFile != "" || os.Getenv("SHED_CONFIG") != "" {
		servers, err := c.servers()
		if err != nil {
			return nil, err
		}
		args = append(args, "--config", servers.Config.Path())
	}
	for _, p := range rec.Ports {
		args = append(args, "-t", p.String())
	}
	if replace {
		args = append(args, "--replace")
	}
	return args, nil
}

// spawn starts this program with args, detached and with its output in log, and returns what it reports. It
// runs on if that is that it has started, and has ended else.
func (c *cli) spawn(ctx context.Context, args []string, log *os.File) (report startReport, err error) {
	exe, err := os.Executable()
	if err != nil {
		return report, err
	}
	if err := closeOnExec(); err != nil {
		return report, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return report, err
	}
	defer r.Close()
	cmd := exec.Command(exe, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.ExtraFiles = []*os.File{w} // reportFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return report, fmt.Errorf("starting the tunnel's process: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	err = json.NewDecoder(r).Decode(&report)
	if stop() && err == nil && report.Started != nil {
		return report, cmd.Process.Release()
	}
	// It has not started, or was interrupted.
	ended := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return report, ctx.Err()
	case err != nil:
		said, _ := io.ReadAll(io.NewSectionReader(log, 0, maxSaid))
		return report, shed.Errorf(shed.CodeInternal, "the tunnel's process ended before its ports were open (%v): %s", ended, strings.TrimSpace(string(said)))
	}
	return report, nil
}

// maxSaid is how much is shown, in bytes, of what a process said that failed.
const maxSaid = 4 << 10

// closeOnExec keeps from programs that this one starts what it was itself started with besides stdin, stdout and
// stderr, such as a lock that a shell script holds.
func closeOnExec() error {
	open, err := os.ReadDir("/dev/fd")
	if err != nil {
		return fmt.Errorf("looking for open files: %w", err)
	}
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
