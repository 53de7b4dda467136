package main

import (
	"context"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/tunnel"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

// tunnelFlags are the flags of tunnels start.
type tunnelFlags struct {
	ports      []string
	profiles   []string
	background bool
	replace    bool
	detached   string // see startBackground
}

func newTunnelsStart(c *cli) *cobra.Command {
	var flags tunnelFlags
	cmd := &cobra.Command{
		Use:   "start NAME",
		Short: "Forward ports into a shed",
		Long: `Forward ports of this machine's localhost into a shed, to its own localhost,
until Ctrl-C, or in the background with -d. A stopped shed is started.

What runs already isn't started again. A port that a tunnel to elsewhere has is
a conflict, unless --replace ends that tunnel.

Profiles are in tunnels.yaml beside the configuration (~/.shed/tunnels.yaml):

  profiles:
    webdev:
      ports:
        - {local: 3000, remote: 3000}
        - {local: 5432}`,
		Example: `  shed tunnels start web -t 3000 -t 8000:80
  shed tunnels start web -p webdev -t 9229 -d`,
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	f := cmd.Flags()
	f.StringArrayVarP(&flags.ports, "tunnel", "t", nil, "ports, as `LOCAL[:REMOTE]` (repeatable); LOCAL 0 is any that is free")
	f.StringArrayVarP(&flags.profiles, "profile", "p", nil, "`name` of a profile in tunnels.yaml (repeatable)")
	f.BoolVarP(&flags.background, "background", "d", false, "run in the background, beyond the terminal's end")
	f.BoolVar(&flags.replace, "replace", false, "end tunnels that have one of the ports")
	f.StringVar(&flags.detached, "detached", "", "")
	if err := f.MarkHidden("detached"); err != nil {
		panic(err)
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if len(flags.ports)+len(flags.profiles) == 0 {
			return usageError(cmd, "%s needs ports: -t LOCAL[:REMOTE] or -p PROFILE", cmd.CommandPath())
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		if flags.detached != "" {
			return c.serveDetached(ctx, args[0], flags)
		}
		return c.startTunnel(ctx, args[0], flags)
	})
	return cmd
}

// read returns what the flags ask for. The profiles are in file.
func (f tunnelFlags) read(file string) ([]tunnel.Port, error) {
	var ports []tunnel.Port
	for _, s := range f.ports {
		p, err := tunnel.ParsePort(s)
		if err != nil {
			return nil, err
		}
		ports = append(ports, p)
	}
	if len(f.profiles) > 0 {
		profiles, err := tunnel.LoadProfiles(file)
		if err != nil {
			return nil, err
		}
		for _, name := range f.profiles {
			more, err := profiles.Ports(name)
			if err != nil {
				return nil, err
			}
			ports = append(ports, more...)
		}
	}
	return ports, tunnel.CheckPorts(ports)
}

// describeTunnel returns the tunnel that the flags ask for, and the shed that it is to lead to.
func (c *cli) describeTunnel(ctx context.Context, ref string, flags tunnelFlags) (*tunnel.Registry, tunnel.Record, target, error) {
	var rec tunnel.Record
	registry, profiles, err := c.tunnelFiles()
	if err == nil {
		rec.Ports, err = flags.read(profiles)
	}
	if err != nil {
		return nil, rec, target{}, err
	}
	t, err := c.resolve(ctx, ref)
	rec.Shed, rec.Server, rec.Mode = t.name, t.server, tunnel.Foreground
	return registry, rec, t, err
}

func (c *cli) startTunnel(ctx context.Context, ref string, flags tunnelFlags) error {
	registry, rec, t, err := c.describeTunnel(ctx, ref, flags)
	if err != nil {
		return err
	}
	// Before the shed is started for nothing.
	running, err := registry.Check(ctx, rec, flags.replace)
	if err != nil {
		return err
	}
	if running != nil {
		return c.printRunning(*running, flags.background)
	}
	if err := c.wake(ctx, t); err != nil {
		return err
	}
	if flags.background {
		return c.startBackground(ctx, registry, rec, flags.replace)
	}
	// The terminal's end is the tunnel's.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	claim, running, err := registry.Claim(ctx, rec, flags.replace)
	if err != nil {
		return err
	}
	if running != nil {
		return c.printRunning(*running, flags.background)
	}
	defer claim.Close()
	if err := c.printTunnel(claim.Record); err != nil {
		return err
	}
	if _, tty := terminal(c.err); tty {
		c.message("Ctrl-C ends it.")
	}
	claim.Serve(ctx, t.client, c.message)
	return claim.Close()
}

// wake starts the shed of a tunnel if it is stopped.
func (c *cli) wake(ctx context.Context, t target) error {
	sh, err := t.client.Get(ctx, t.name)
	if err != nil || sh.Status == shed.StatusRunning {
		return err
	}
	c.message("%s is %s: starting it", t.name, sh.Status)
	report, end := c.progress("start " + t.name)
	defer end()
	_, err = t.client.Start(ctx, t.name, report)
	return err
}

// printTunnel prints what a tunnel forwards.
func (c *cli) printTunnel(rec tunnel.Record) error {
	if c.json {
		return c.printJSON(rec)
	}
	for _, line := range rec.Forwards() {
		if err := c.printLine(line); err != nil {
			return err
		}
	}
	return nil
}

// printRunning says that what is to be started, in the background or not, runs as rec already.
func (c *cli) printRunning(rec tunnel.Record, background bool) error {
	if background && rec.Mode != tunnel.Background {
		return shed.Errorf(shed.CodeConflict, "it runs already, in a terminal, whose end is its end").
			WithHint("--replace ends that tunnel and starts this one")
	}
	c.message("It runs already: in the %s, started %s.", rec.Mode, humanize.Time(rec.Since))
	return c.printTunnel(rec)
}

// serveDetached is the process that startBackground starts. It tells that one how its start went.
func (c *cli) serveDetached(ctx context.Context, ref string, flags tunnelFlags) error {
	registry, rec, t, err := c.describeTunnel(ctx, ref, flags)
	if err == nil {
		_, err = t.client.Get(ctx, t.name) // a server that this process can't log in to
	}
	var claim *tunnel.Claim
	var report startReport
	if err == nil {
		rec.Mode, rec.Log = tunnel.Background, flags.detached
		claim, report.Running, err = registry.Claim(ctx, rec, flags.replace)
	}
	if claim == nil {
		report.fail(err)
		return report.send()
	}
	defer claim.Close()
	report.Started = &claim.Record
	log := func(format string, args ...any) {
		c.message("%s %s", time.Now().Format(time.DateTime), fmt.Sprintf(format, args...))
	}
	log("forwarding %v", claim.Record)
	if err := report.send(); err != nil {
		return err
	}
	claim.Serve(ctx, t.client, log)
	return claim.Close()
}
