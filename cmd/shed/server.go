package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/client"
	"github.com/charliek/shed/internal/sshconfig"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/term"
)

func newServer(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Name the servers that sheds are on",
		Example: `  shed server add home.local
  shed server list
  shed server set-default home`,
	}
	cmd.AddCommand(newServerAdd(c), newServerList(c), newServerRemove(c), newServerSetDefault(c))
	asGroup(cmd)
	return cmd
}

// editable returns the servers of a configuration that need not be there yet.
func (c *cli) editable() (*client.Servers, error) { return c.configured(client.NewConfig) }

func newServerAdd(c *cli) *cobra.Command {
	var name, fingerprint string
	var sshPort, httpPort int
	cmd := &cobra.Command{
		Use:   "add HOST",
		Short: "Add a server to the configuration",
		Long: `Add a server to the configuration.

HOST is a name or an IP address, whose SSH server is logged in to with the keys of
the SSH agent, those in ~/.ssh, or those that ~/.ssh/config names for it. The key
that it proves itself with is shown and remembered: from then on no other is
accepted. Compare it with the one that the server shows, or give it with
--fingerprint. HOST may also be the path of the socket of a server on this machine.`,
		Example: `  shed server add home.local
  shed server add 192.168.1.20 --name big --fingerprint SHA256:...
  shed server add /run/shed/shed.sock --name here`,
		Args: needs(false, "HOST"),
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		for flag, port := range map[string]int{"ssh-port": sshPort, "http-port": httpPort} {
			if cmd.Flags().Changed(flag) && (port < 1 || port > 65535) {
				return usageError(cmd, "--%s %d is no port", flag, port)
			}
		}
		if cmd.Flags().Changed("name") {
			if err := client.ValidateName(name); err != nil {
				return err
			}
		}
		if cmd.Flags().Changed("fingerprint") && !isFingerprint(fingerprint) {
			return usageError(cmd, "--fingerprint %.80q is none: it is SHA256: and 43 characters, as `ssh-keygen -lf` shows it", fingerprint)
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		server, err := client.ParseHost(args[0])
		if err != nil {
			return err
		}
		if server.Host != "" {
			server.SSHPort, server.HTTPPort = cmp.Or(sshPort, client.DefaultSSHPort), cmp.Or(httpPort, client.DefaultHTTPPort)
		} else if fingerprint != "" || sshPort != 0 || httpPort != 0 {
			return usageError(cmd, "a server with a socket has no ports and no fingerprint: the socket's permissions say whose it is")
		}
		return c.addServer(ctx, server, name, fingerprint)
	})
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "what to call it (default: as it calls itself)")
	f.IntVar(&sshPort, "ssh-port", 0, "`port` of its SSH server (default 2222)")
	f.IntVar(&httpPort, "http-port", 0, "`port` of its HTTP API, noted in the configuration for other programs; shed itself uses SSH (default 8080)")
	f.StringVar(&fingerprint, "fingerprint", "", "accept only the host key with this `SHA256:...`")
	return cmd
}

func isFingerprint(s string) bool {
	hash, ok := strings.CutPrefix(s, "SHA256:")
	return ok && len(hash) == 43 && !strings.ContainsAny(hash, " \t\r\n")
}

// addServer adds a server that lets us in. Until then, nothing is changed.
func (c *cli) addServer(ctx context.Context, server client.Server, name, fingerprint string) error {
	servers, err := c.editable()
	if err != nil {
		return err
	}
	cfg := servers.Config
	if err := cfg.CanAdd(name, server); err != nil {
		return err
	}
	var hostKey ssh.PublicKey
	said := false
	info, err := servers.Probe(ctx, server, func(key ssh.PublicKey) error {
		got := ssh.FingerprintSHA256(key)
		if !said {
			said = true
			c.message("%s has the host key %s %s", server.Address(), key.Type(), got)
		}
		if fingerprint != "" && got != fingerprint {
			return shed.Errorf(shed.CodeUnreachable, "the host key of %s is %s, and not %s", server.Address(), got, fingerprint).
				WithHint("this is not the server that you mean, or the fingerprint is wrong; nothing was added")
		}
		hostKey = key
		return nil
	})
	if err != nil {
		return err
	}
	if name == "" {
		if name, err = nameFor(server, info); err != nil {
			return err
		}
	}
	if err := cfg.CanAdd(name, server); err != nil {
		return err
	}
	wasLocal := len(cfg.Servers) == 0
	if server.Host != "" {
		if err := client.PinKey(ctx, cfg.KnownHosts(), server.Address(), hostKey); err != nil {
			return fmt.Errorf("the host key can't be remembered: %w", err)
		}
	}
	if err := cfg.Add(ctx, name, server); err != nil {
		return err
	}
	if c.json {
		return c.printJSON(serverState{
			Name: name, Address: server.Address(), Default: cfg.DefaultServer == name, Status: statusOnline, Version: info.Version,
			HostKey: fingerprintOf(hostKey),
		})
	}
	c.message("Added server %s at %s%s.", name, server.Address(), map[bool]string{true: ", the default"}[cfg.DefaultServer == name])
	if socket := api.DefaultSocket(); wasLocal && server.Address() != socket {
		if _, err := os.Stat(socket); err == nil {
			c.message("The server on this machine is no longer used without a name; add it too with: shed server add %s", socket)
		}
	}
	return c.printLine(name)
}

func fingerprintOf(key ssh.PublicKey) string {
	if key == nil {
		return ""
	}
	return ssh.FingerprintSHA256(key)
}

// nameFor returns what to call a server that the user gave no name: what it calls itself, or else the
// first part of its host.
func nameFor(server client.Server, info shed.Info) (string, error) {
	host := server.Host
	if net.ParseIP(host) == nil {
		host, _, _ = strings.Cut(host, ".")
	}
	for _, name := range []string{info.Name, host} {
		if client.ValidateName(name) == nil {
			return name, nil
		}
	}
	return "", shed.Errorf(shed.CodeInvalid, "the server at %s has no name that it could be called by", server.Address()).
		WithHint("give it one with --name")
}

// serverState is a server and how it is.
type serverState struct {
	Name    string      `json:"name"`
	Address string      `json:"address"`
	Default bool        `json:"default"`
	Status  string      `json:"status"`
	Version string      `json:"version,omitempty"`
	Sheds   *int        `json:"sheds,omitempty"` // how many
	HostKey string      `json:"host_key,omitempty"`
	Error   *shed.Error `json:"error,omitempty"` // why it is offline
}

const statusOnline = "online"

func newServerList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List servers, and whether they answer",
		Args:    noArgs,
		RunE: c.action(func(ctx context.Context, _ []string) error {
			servers, err := c.servers()
			if err != nil {
				return err
			}
			type answered struct {
				info  shed.Info
				sheds int
			}
			answers, err := onAll(ctx, c, func(ctx context.Context, name string, client *api.Client) (answered, error) {
				sheds, err := servers.List(ctx, name)
				if err != nil {
					return answered{}, err
				}
				info, err := client.Info(ctx)
				return answered{info, len(sheds)}, err
			})
			if err != nil {
				return err
			}
			standard, err := servers.Config.Default()
			if err != nil {
				standard = "" // there is none, which isn't this command's concern
			}
			states := make([]serverState, 0, len(answers))
			for _, a := range answers {
				server, err := servers.Config.Server(a.server)
				if err != nil {
					return err
				}
				st := serverState{Name: a.server, Address: server.Address(), Default: a.server == standard, Status: statusOnline}
				if a.err == nil {
					st.Version, st.Sheds = a.value.info.Version, &a.value.sheds
				} else {
					st.Status, st.Error = statusOffline, errorDoc(a.err)
				}
				states = append(states, st)
			}
			if c.json {
				return c.printJSON(states)
			}
			var rows [][]string
			for _, st := range states {
				sheds := ""
				if st.Sheds != nil {
					sheds = strconv.Itoa(*st.Sheds)
				}
				rows = append(rows, []string{st.Name, st.Address, map[bool]string{true: "yes"}[st.Default], st.Status, st.Version, sheds})
			}
			if err := c.printTable([]string{"NAME", "ADDRESS", "DEFAULT", "STATUS", "VERSION", "SHEDS"}, rows); err != nil {
				return err
			}
			for _, a := range answers {
				c.printOffline(a.server, a.err)
			}
			return nil
		}),
	}
}

func newServerRemove(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "remove NAME",
		Aliases:           []string{"rm"},
		Short:             "Remove a server from the configuration, and forget its host key",
		Long:              "Remove a server from the configuration, and forget its host key. The server and its sheds stay as they are.",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeServers,
		RunE: c.action(func(ctx context.Context, args []string) error {
			servers, err := c.editable()
			if err != nil {
				return err
			}
			cfg := servers.Config
			server, name := cfg.Servers[args[0]], args[0]
			wasDefault := cfg.DefaultServer == name
			if err := cfg.Remove(ctx, name); err != nil {
				return err
			}
			if server.Host != "" && cfg.At(server) == "" {
				if err := client.UnpinKey(ctx, cfg.KnownHosts(), server.Address()); err != nil {
					return fmt.Errorf("server %s is removed, but its host key is not: %w", name, err)
				}
			}
			c.followInSSHConfig(ctx, func(installed []sshconfig.Host) ([]sshconfig.Host, error) {
				return slices.DeleteFunc(installed, func(h sshconfig.Host) bool { return h.Server == name }), nil
			})
			if c.json {
				return c.printJSON(struct {
					Removed string `json:"removed"`
				}{name})
			}
			if wasDefault && len(cfg.Servers) > 1 {
				c.message("There is no default server now; choose one with: shed server set-default NAME")
			}
			return c.printLine(name)
		}),
	}
}

func newServerSetDefault(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "set-default NAME",
		Short:             "Make a server the one that is meant where none is named",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeServers,
		RunE: c.action(func(ctx context.Context, args []string) error {
			servers, err := c.editable()
			if err != nil {
				return err
			}
			if err := servers.Config.SetDefault(ctx, args[0]); err != nil {
				return err
			}
			if c.json {
				return c.printJSON(struct {
					Default string `json:"default"`
				}{args[0]})
			}
			return c.printLine(args[0])
		}),
	}
}

// askPassphrase asks for a passphrase in the terminal, whatever stdin is.
func (c *cli) askPassphrase(ctx context.Context, prompt string) ([]byte, error) {
	if c.taken.Load() {
		return nil, errors.New("the terminal has a session")
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer tty.Close()
	fd := int(tty.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	fmt.Fprint(tty, printable(prompt))
	type result struct {
		phrase []byte
		err    error
	}
	// The goroutine isn't waited for if ctx ends first: a read of a terminal can't be interrupted, and the
	// program is about to end.
	typed := make(chan result, 1)
	go func() {
		phrase, err := term.ReadPassword(fd)
		typed <- result{phrase, err}
	}()
	defer fmt.Fprintln(tty)
	select {
	case r := <-typed:
		return r.phrase, r.err
	case <-ctx.Done():
		term.Restore(fd, state)
		return nil, ctx.Err()
	}
}
