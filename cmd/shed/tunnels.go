package main

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/tunnel"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func newTunnels(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tunnels",
		Short: "Forward ports of this machine into sheds",
		Long: `Forward ports of this machine's localhost into sheds, to what listens on
localhost there.

A tunnel reconnects by itself. While its server doesn't answer, a connection
waits for it some seconds. Starting a tunnel starts a stopped shed; connections
to a shed that was stopped later are refused and don't start it.`,
		Example: `  shed tunnels start web -t 3000 -t 8000:80
  shed tunnels start web -p webdev -d
  shed tunnels list
  shed tunnels stop web`,
	}
	cmd.AddCommand(newTunnelsStart(c), newTunnelsStop(c), newTunnelsList(c), newTunnelsConfig(c))
	asGroup(cmd)
	return cmd
}

// tunnelFiles returns the tunnels that run, and the path of the profiles.
func (c *cli) tunnelFiles() (*tunnel.Registry, string, error) {
	servers, err := c.servers()
	if err != nil {
		return nil, "", err
	}
	if servers.Config.Path() == "" {
		return nil, "", shed.Errorf(shed.CodeInvalid, "there is no home directory for the tunnels' records").WithHint("set HOME, or name a configuration file with --config")
	}
	dir := servers.Config.Dir()
	return tunnel.NewRegistry(filepath.Join(dir, "tunnels")), filepath.Join(dir, "tunnels.yaml"), nil
}

func newTunnelsStop(c *cli) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "stop [NAME]",
		Short: "End the tunnels to a shed, with the connections in them",
		Long: `End the tunnels to a shed, with the connections in them, from whichever
terminal they were started. With --all, those to all sheds, or to all of the
server that --server names.`,
		Args:              optionalName,
		ValidArgsFunction: c.completeNames,
	}
	cmd.Flags().BoolVar(&all, "all", false, "end the tunnels to all sheds")
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if all == (len(args) == 1) {
			return usageError(cmd, "%s needs either NAME or --all", cmd.CommandPath())
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		registry, _, err := c.tunnelFiles()
		if err != nil {
			return err
		}
		server, name := c.server, ""
		if len(args) > 0 {
			if server, name, err = c.splitRef(args[0]); err != nil {
				return err
			}
		}
		ended, err := registry.Stop(ctx, func(live []tunnel.Record) ([]tunnel.Record, error) { return tunnelsOf(live, server, name) })
		if c.json && err == nil {
			return c.printJSON(append([]tunnel.Record{}, ended...))
		}
		if len(ended) == 0 && err == nil {
			c.message("There are no tunnels.")
		}
		for _, rec := range ended {
			if err := c.printLine(rec.String()); err != nil {
				return err
			}
		}
		return err
	})
	return cmd
}

// tunnelsOf returns those of live that lead to the shed, on that server; "" is any. Of a shed there must be
// some, to one of its name only.
func tunnelsOf(live []tunnel.Record, server, name string) ([]tunnel.Record, error) {
	var found []tunnel.Record
	var servers []string
	for _, rec := range live {
		if (server == "" || rec.Server == server) && (name == "" || rec.Shed == name) {
			found = append(found, rec)
			servers = append(servers, rec.Server)
		}
	}
	slices.Sort(servers)
	servers = slices.Compact(servers)
	switch {
	case name != "" && len(found) == 0:
		return nil, shed.Errorf(shed.CodeNotFound, "there is no tunnel to %s", name).WithHint("list them: shed tunnels list")
	case name != "" && len(servers) > 1:
		return nil, shed.Errorf(shed.CodeInvalid, "there are tunnels to sheds called %s on several servers: %s", name, strings.Join(servers, ", ")).
			WithHint("say which: shed tunnels stop %s/%s", servers[0], name)
	}
	return found, nil
}

func newTunnelsList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the tunnels that run on this machine",
		Long: `List the tunnels that run on this machine, those in other terminals and in the
background included. A tunnel is up, reconnecting while its server doesn't
answer, or refusing connections while its shed doesn't run.`,
		Args: noArgs,
		RunE: c.action(func(ctx context.Context, _ []string) error {
			registry, _, err := c.tunnelFiles()
			if err != nil {
				return err
			}
			tunnels, err := registry.List(ctx)
			if err != nil {
				return err
			}
			if c.server != "" {
				tunnels = slices.DeleteFunc(tunnels, func(t tunnel.Tunnel) bool { return t.Server != c.server })
			}
			if c.json {
				return c.printJSON(append([]tunnel.Tunnel{}, tunnels...))
			}
			return c.printTunnels(tunnels)
		}),
	}
}

func (c *cli) printTunnels(tunnels []tunnel.Tunnel) error {
	var rows [][]string
	for _, t := range tunnels {
		for i, p := range t.Ports {
			rows = append(rows, []string{
				t.Shed, t.Server, strconv.Itoa(p.Local), strconv.Itoa(p.Remote), string(t.Mode), string(t.State),
				strconv.Itoa(t.Connections[i]), humanize.Time(t.Since),
			})
		}
	}
	if err := c.printTable([]string{"SHED", "SERVER", "LOCAL", "REMOTE", "MODE", "STATUS", "CONNECTIONS", "SINCE"}, rows); err != nil {
		return err
	}
	if len(tunnels) == 0 {
		c.message("There are no tunnels. Start one with: shed tunnels start NAME -t PORT")
	}
	for _, t := range tunnels {
		if t.Reason != "" {
			c.message("%s is %s: %s", t.Record, t.State, t.Reason)
		}
	}
	return nil
}
