package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/tunnel"
	"github.com/spf13/cobra"
)

func newTunnelsConfig(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "config NAME",
		Short: "Print a profile with the ports that are open in a shed",
		Long: `Print what listens on localhost in a shed now, as a profile to put into
tunnels.yaml beside the configuration (~/.shed/tunnels.yaml). Ports below 1024,
which may be root's alone on this machine, get another local one: 80 is 8080.

The image needs the program cat.`,
		Example:           "  shed tunnels config web",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeNames,
		RunE: c.action(func(ctx context.Context, args []string) error {
			t, err := c.resolve(ctx, args[0])
			if err != nil {
				return err
			}
			remote, err := openPorts(ctx, t)
			if err != nil {
				return err
			}
			return c.printProfile(t.name, suggestAll(remote))
		}),
	}
}

// openPorts returns what listens on localhost in a shed.
func openPorts(ctx context.Context, t target) ([]int, error) {
	sh, err := t.client.Get(ctx, t.name)
	if err != nil {
		return nil, err
	}
	if sh.Status != shed.StatusRunning {
		return nil, shed.Errorf(shed.CodeConflict, "nothing listens in %s: it is %s", t.name, sh.Status).
			WithHint("start it, and the programs in it: shed start %s", t.name)
	}
	conn, err := t.client.Exec(ctx, t.name, shed.Command{Args: []string{"cat", "/proc/net/tcp", "/proc/net/tcp6"}, Dir: "/"})
	if err != nil {
		return nil, err
	}
	p := agent.NewProcess(conn)
	defer p.Close()
	defer context.AfterFunc(ctx, func() { p.Close() })()
	p.Stdin().Close()
	var out, said []byte
	var outErr, saidErr error
	var output sync.WaitGroup
	output.Go(func() { out, outErr = io.ReadAll(p.Stdout()) })
	output.Go(func() { said, saidErr = io.ReadAll(p.Stderr()) })
	output.Wait()
	status, err := p.Wait()
	for _, err := range []error{ctx.Err(), err, outErr, saidErr} {
		if err != nil {
			return nil, fmt.Errorf("asking %s what listens in it: %w", t.name, err)
		}
	}
	// That cat fails says nothing: without IPv6 there is no tcp6.
	ports, ok := tunnel.Listening(string(out))
	if !ok {
		why := strings.TrimSpace(status.Error + string(said))
		return nil, shed.Errorf(shed.CodeUnsupported, "%s doesn't say what listens in it: %s", t.name, why).WithHint("its image needs the program cat")
	}
	return ports, nil
}

// suggestAll returns how to forward the ports, each from a local one of its own.
func suggestAll(remote []int) []tunnel.Port {
	taken := map[int]bool{}
	for _, port := range remote {
		taken[port] = tunnel.Suggest(port).Local == port
	}
	ports := []tunnel.Port{}
	for _, port := range remote {
		p := tunnel.Suggest(port)
		for p.Local != port && taken[p.Local] {
			p.Local++
		}
		taken[p.Local] = true
		ports = append(ports, p)
	}
	return ports
}

func (c *cli) printProfile(name string, ports []tunnel.Port) error {
	if c.json {
		type profile struct {
			Ports []tunnel.Port `json:"ports"`
		}
		return c.printJSON(map[string]map[string]profile{"profiles": {name: {ports}}})
	}
	if len(ports) == 0 {
		c.message("Nothing listens on localhost in %s.", name)
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "profiles:\n  %q:\n    ports:\n", name)
	for _, p := range ports {
		fmt.Fprintf(&b, "      - {local: %d, remote: %d}\n", p.Local, p.Remote)
	}
	return c.printLine(strings.TrimSuffix(b.String(), "\n"))
}
