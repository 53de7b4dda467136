package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/client"
	"github.com/charliek/shed/internal/sshconfig"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
)

// sshConfig is one run of shed ssh-config.
type sshConfig struct {
	*cli
	all, install, uninstall, dryRun bool
}

func newSSHConfig(c *cli) *cobra.Command {
	s := sshConfig{cli: c}
	cmd := &cobra.Command{
		Use:   "ssh-config [NAME]",
		Short: "Have ssh, scp, rsync and IDEs reach sheds as shed-NAME",
		Long: `Print what ~/.ssh/config needs so that ssh, and all that is built on it, such as
scp, rsync, VS Code and Cursor, reach sheds as shed-NAME: one NAME, or else all
sheds of the server, or with --all those of all servers. A name that several
servers have becomes shed-NAME.SERVER.

The host keys of servers are pinned in the file known_hosts beside shed's own
configuration, and ssh trusts no others for these hosts. A server on this machine
says its key on its socket; those of others were pinned by shed server add.

With --install, the hosts are put into a block of their own at the top of
~/.ssh/config, or replaced in it: those of the server that no longer has them go,
those of other servers stay. With --all, hosts of servers that aren't configured
any more go too, and those of a server that doesn't answer stay. Nothing else in
the file changes, nor does it mean anything else to ssh. --uninstall takes the
block away again, or from it only one NAME or what --server names. Once the block
is there, shed create and shed delete keep it up to date.

What your configuration says about the host of a server that is another machine,
such as its HostName, ProxyJump or IdentityFile, holds for its sheds too.`,
		Example: `  shed ssh-config --install && ssh shed-web
  shed ssh-config --install --all --dry-run
  shed ssh-config >> ~/.ssh/config`,
		Args:              optionalName,
		ValidArgsFunction: c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case s.install && s.uninstall:
			return usageError(cmd, "--install and --uninstall are one too many")
		case s.all && len(args) > 0:
			return usageError(cmd, "--all means all sheds, and %q one of them", args[0])
		case s.all && c.server != "":
			return usageError(cmd, "--all means all servers, and --server one of them")
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		ref := ""
		if len(args) > 0 {
			ref = args[0]
		}
		if s.uninstall {
			return s.remove(ctx, ref)
		}
		return s.run(ctx, ref)
	})
	flags := cmd.Flags()
	flags.BoolVarP(&s.all, "all", "a", false, "sheds of all servers")
	flags.BoolVar(&s.install, "install", false, "put the hosts into ~/.ssh/config")
	flags.BoolVar(&s.uninstall, "uninstall", false, "take them out of ~/.ssh/config again")
	flags.BoolVar(&s.dryRun, "dry-run", false, "change no file; with --install and --uninstall, print what would change")
	return cmd
}

// sshServer is a server as ssh gets to it, and sheds of it.
type sshServer struct {
	hosts []sshconfig.Host
	// pin is the key that the server says that it has at addr, if it isn't pinned already.
	pin  ssh.PublicKey
	addr string
}

// sshAnswer is what --json prints.
type sshAnswer struct {
	Hosts   []sshHost `json:"hosts"`
	Config  string    `json:"config,omitempty"` // what is printed
	File    string    `json:"file,omitempty"`   // what is edited
	Changed bool      `json:"changed"`
	Diff    string    `json:"diff,omitempty"` // with --dry-run
	Offline []offline `json:"offline"`
}

type sshHost struct {
	Host   string `json:"host"`
	Shed   string `json:"shed"`
	Server string `json:"server"`
}

func sshHosts(hosts []sshconfig.Host) []sshHost {
	list := []sshHost{}
	for _, h := range hosts {
		list = append(list, sshHost{h.Alias, h.Shed, h.Server})
	}
	return list
}

// run prints or installs the hosts that ref means: one shed, or all if it is "".
func (s *sshConfig) run(ctx context.Context, ref string) error {
	answers, err := s.ask(ctx, ref)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(answers, func(a answer[sshServer]) bool { return a.err == nil }) {
		return each(s.cli, answers, func(a answer[sshServer]) error { return a.err })
	}
	var hosts []sshconfig.Host
	dead := []offline{}
	for _, a := range answers {
		if a.err != nil {
			dead = append(dead, newOffline(a.server, a.err))
			if !s.json {
				s.printOffline(a.server, a.err)
			}
			continue
		}
		if err := s.pin(ctx, a.server, a.value); err != nil {
			return err
		}
		hosts = append(hosts, a.value.hosts...)
	}
	if !s.install {
		return s.print(sshconfig.Named(hosts), dead)
	}
	known := s.known.Config.Names()
	return s.edit(ctx, dead, func(h sshconfig.Host) bool {
		return slices.ContainsFunc(hosts, func(n sshconfig.Host) bool { return n.Shed == h.Shed && n.Server == h.Server })
	}, func(installed []sshconfig.Host) ([]sshconfig.Host, error) {
		kept := slices.DeleteFunc(installed, func(h sshconfig.Host) bool {
			answered := slices.ContainsFunc(answers, func(a answer[sshServer]) bool { return a.server == h.Server && a.err == nil })
			switch {
			case ref != "":
				return h.Server == hosts[0].Server && h.Shed == hosts[0].Shed
			case s.all:
				return answered || !slices.Contains(known, h.Server)
			}
			return answered
		})
		return append(kept, hosts...), nil
	})
}

// ask returns what servers answer about the sheds that ref means. Where not all servers are asked, an error
// is returned.
func (s *sshConfig) ask(ctx context.Context, ref string) ([]answer[sshServer], error) {
	servers, err := s.servers()
	if err != nil {
		return nil, err
	}
	if s.all {
		return onAll(ctx, s.cli, func(ctx context.Context, server string, api *api.Client) (sshServer, error) {
			sheds, err := servers.List(ctx, server)
			if err != nil {
				return sshServer{}, err
			}
			return s.reach(ctx, server, api, sheds)
		})
	}
	a := answer[sshServer]{}
	var api *api.Client
	var sheds []*shed.Shed
	if ref != "" {
		t, err := s.resolve(ctx, ref)
		if err != nil {
			return nil, err
		}
		sh, err := t.client.Get(ctx, t.name)
		if err != nil {
			return nil, err
		}
		a.server, api, sheds = t.server, t.client, []*shed.Shed{sh}
	} else {
		if a.server, api, err = s.connectNamed(""); err != nil {
			return nil, err
		}
		if sheds, err = servers.List(ctx, a.server); err != nil {
			return nil, err
		}
	}
	a.value, err = s.reach(ctx, a.server, api, sheds)
	return []answer[sshServer]{a}, err
}

// reach finds out how ssh gets to sheds of a server.
func (s *sshConfig) reach(ctx context.Context, name string, api *api.Client, sheds []*shed.Shed) (sshServer, error) {
	cfg := s.known.Config
	server, err := cfg.Server(name)
	if err != nil {
		return sshServer{}, err
	}
	at := sshconfig.Address{Host: strings.ToLower(server.Host), Port: cmp.Or(server.SSHPort, client.DefaultSSHPort), KnownHosts: cfg.KnownHosts()}
	var found sshServer
	if server.Host == "" {
		addr, err := localSSH(ctx, name, api)
		if err != nil {
			return sshServer{}, err
		}
		at.Host, at.Port, at.Local = addr.Addr().String(), int(addr.Port()), true
		found.addr = addr.String()
		if found.pin, err = s.newKey(ctx, api, found.addr); err != nil {
			return sshServer{}, err
		}
	} else if at.Options, err = s.known.HostOptions(ctx, server.Host, at.Port); err != nil {
		s.message("What ~/.ssh/config says of %s is left out: %s", server.Host, err)
	}
	for _, sh := range sheds {
		h, err := sshconfig.NewHost(name, sh.Name, at)
		if err != nil {
			return sshServer{}, err
		}
		found.hosts = append(found.hosts, h)
	}
	return found, nil
}

// localSSH returns where a server on this machine listens for SSH.
func localSSH(ctx context.Context, name string, api *api.Client) (netip.AddrPort, error) {
	info, err := api.Info(ctx)
	if err != nil {
		return netip.AddrPort{}, err
	}
	addr, err := netip.ParseAddrPort(info.SSH)
	if err != nil || addr.Port() == 0 {
		return addr, shed.Errorf(shed.CodeUnsupported, "server %q does not say where it listens for SSH (%.80q)", name, info.SSH).
			WithHint("is it of the same version as this program? see: shed version")
	}
	if addr.Addr().IsUnspecified() { // it listens on all addresses
		addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port())
	}
	return addr, nil
}

// newKey returns the key of the SSH server at addr, as it says itself on its socket, if it isn't pinned. Where
// another server is configured to be at addr, nothing new is believed.
func (s *sshConfig) newKey(ctx context.Context, api *api.Client, addr string) (ssh.PublicKey, error) {
	for _, other := range s.known.Config.Servers {
		if other.Host != "" && other.Address() == addr {
			return nil, nil
		}
	}
	says, err := api.HostKey(ctx)
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(says.Key))
	if err != nil {
		return nil, fmt.Errorf("the host key of the SSH server at %s: %w", addr, err)
	}
	pinned, err := client.PinnedKeys(s.known.Config.KnownHosts(), addr)
	if err != nil {
		return nil, err
	}
	if len(pinned) == 1 && ssh.FingerprintSHA256(pinned[0]) == ssh.FingerprintSHA256(key) {
		return nil, nil
	}
	return key, nil
}

// pin has the file of known hosts know a server by the key that it has now.
func (s *sshConfig) pin(ctx context.Context, name string, server sshServer) error {
	if server.pin == nil || s.dryRun {
		return nil
	}
	file := s.known.Config.KnownHosts()
	before, err := client.PinnedKeys(file, server.addr)
	if err != nil {
		return err
	}
	if err := client.PinKey(ctx, file, server.addr, server.pin); err != nil {
		return err
	}
	if len(before) > 0 {
		s.message("The host key of server %q is another one now: %s", name, ssh.FingerprintSHA256(server.pin))
	}
	return nil
}

// print writes the hosts as ssh reads them.
func (s *sshConfig) print(hosts []sshconfig.Host, dead []offline) error {
	text := sshconfig.Render(hosts)
	if s.json {
		return s.printJSON(sshAnswer{Hosts: sshHosts(hosts), Config: string(text), Offline: dead})
	}
	if _, err := s.out.Write(text); err != nil {
		return err
	}
	s.sayNames(hosts)
	if len(hosts) == 0 {
		s.message("%s", noSheds)
	}
	return nil
}

// sayNames says which sheds have longer names, and why.
func (s *sshConfig) sayNames(hosts []sshconfig.Host) {
	names := map[string][]string{}
	for _, h := range hosts {
		names[h.Shed] = append(names[h.Shed], h.Alias)
	}
	for _, h := range hosts {
		if n := names[h.Shed]; len(n) > 1 && n[0] == h.Alias {
			s.message("Several servers have a shed %q: the hosts are %s", h.Shed, strings.Join(n, ", "))
		}
	}
}

// remove takes out of the file what ref and --server mean, or all.
func (s *sshConfig) remove(ctx context.Context, ref string) error {
	server, name := s.server, ""
	if ref != "" {
		var err error
		if server, name, err = s.splitRef(ref); err != nil {
			return err
		}
	}
	nothing := func(sshconfig.Host) bool { return false }
	return s.edit(ctx, []offline{}, nothing, func(installed []sshconfig.Host) ([]sshconfig.Host, error) {
		return slices.DeleteFunc(installed, func(h sshconfig.Host) bool {
			return (name == "" || h.Shed == name) && (server == "" || h.Server == server)
		}), nil
	})
}

// updateSSHConfig has the block in ~/.ssh/config, where there is one, follow a shed that has been created, or deleted if gone.
func (c *cli) updateSSHConfig(ctx context.Context, t target, gone bool) {
	s := sshConfig{cli: c}
	reach := sync.OnceValues(func() (sshServer, error) { // an edit may be made twice
		found, err := s.reach(ctx, t.server, t.client, []*shed.Shed{{Name: t.name}})
		if err == nil {
			err = s.pin(ctx, t.server, found)
		}
		return found, err
	})
	c.followInSSHConfig(ctx, func(installed []sshconfig.Host) ([]sshconfig.Host, error) {
		kept := slices.DeleteFunc(installed, func(h sshconfig.Host) bool { return h.Server == t.server && h.Shed == t.name })
		if gone {
			return kept, nil
		}
		found, err := reach()
		return append(kept, found.hosts...), err
	})
}

// followInSSHConfig edits the block in ~/.ssh/config, where there is one with any hosts. What goes wrong is said, and no error: what
// the block follows has been done.
func (c *cli) followInSSHConfig(ctx context.Context, edit sshconfig.Edit) {
	path, err := sshConfigFile()
	if err != nil {
		return // nor is there a block
	}
	if _, err := sshconfig.Apply(ctx, path, func(installed []sshconfig.Host) ([]sshconfig.Host, error) {
		if len(installed) == 0 {
			return nil, nil
		}
		return edit(installed)
	}); err != nil {
		c.message("%s does not follow: %s; see: shed ssh-config --install", path, err)
	}
}

func sshConfigFile() (string, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return "", shed.Errorf(shed.CodeInvalid, "there is no home directory with an SSH configuration: %w", err)
	}
	return filepath.Join(home, ".ssh", "config"), nil
}

// edit changes ~/.ssh/config, or says how it would, and prints the hosts in it that are wanted.
func (s *sshConfig) edit(ctx context.Context, dead []offline, wanted func(sshconfig.Host) bool, edit sshconfig.Edit) error {
	path, err := sshConfigFile()
	if err != nil {
		return err
	}
	var change sshconfig.Change
	if s.dryRun {
		change, err = sshconfig.Plan(path, edit)
	} else {
		change, err = sshconfig.Apply(ctx, path, edit)
	}
	if err != nil {
		return err
	}
	hosts := slices.DeleteFunc(slices.Clone(change.Hosts), func(h sshconfig.Host) bool { return !wanted(h) })
	if s.json {
		a := sshAnswer{Hosts: sshHosts(hosts), File: change.File, Changed: change.Changed(), Offline: dead}
		if s.dryRun {
			a.Diff = change.Diff()
		}
		return s.printJSON(a)
	}
	if s.dryRun {
		// A file may have CRLF at the ends of its lines, and what a terminal acts upon within them.
		if _, err := fmt.Fprint(s.out, printable(strings.ReplaceAll(change.Diff(), "\r\n", "\n"))); err != nil {
			return err
		}
	} else {
		for _, h := range hosts {
			if err := s.printLine(h.Alias); err != nil {
				return err
			}
		}
	}
	s.sayNames(change.Hosts)
	for _, d := range dead {
		if slices.ContainsFunc(change.Hosts, func(h sshconfig.Host) bool { return h.Server == d.Server }) {
			s.message("What %s has of %s stays as it was", change.File, d.Server)
		}
	}
	s.sayChange(change, len(hosts))
	return nil
}

// sayChange says what has been done to the file, and what to know about that. n is how many hosts were wanted in it.
func (s *sshConfig) sayChange(c sshconfig.Change, n int) {
	switch {
	case s.install && n == 0:
		s.message("%s", noSheds)
	case !c.Changed() && s.install:
		s.message("%s is up to date", c.File)
	case !c.Changed():
		s.message("There is nothing of that in %s", c.File)
	case !s.dryRun:
		s.message("%s is changed", c.File)
	}
	if !c.Changed() {
		return
	}
	if c.Links > 0 {
		s.message("Note: %s has other names (hard links), which keep what it was before", c.File)
	}
	if c.Included > 0 && c.Before != nil {
		s.message("Note: VS Code and Cursor list no hosts of files that are included below a Host line, as on line %d of %s. "+
			"ssh reads them as before", c.Included, c.File)
	}
}
