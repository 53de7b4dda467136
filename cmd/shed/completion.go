package main

import (
	"context"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newCompletion(c *cli) *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	cmd := &cobra.Command{
		Use:       "completion SHELL",
		Short:     "Print the completion script for bash, zsh, fish or powershell",
		Example:   "  source <(shed completion bash)",
		Args:      needs(false, "SHELL"),
		ValidArgs: shells,
	}
	cmd.RunE = c.action(func(_ context.Context, args []string) error {
		if err := refuseJSON(c, cmd, "it prints a script"); err != nil {
			return err
		}
		root := cmd.Root()
		switch args[0] {
		case "bash":
			return root.GenBashCompletionV2(c.out, true)
		case "zsh":
			return root.GenZshCompletion(c.out)
		case "fish":
			return root.GenFishCompletion(c.out, true)
		case "powershell":
			return root.GenPowerShellCompletionWithDesc(c.out)
		}
		return usageError(cmd, "no completion for %q: there is %s", args[0], strings.Join(shells, ", "))
	})
	return cmd
}

const completeTimeout = time.Second

// completeNames completes names of sheds. With SERVER/ it completes those of that server; a name that
// several servers have needs it.
func (c *cli) completeNames(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	server, _, exact := strings.Cut(typed, "/")
	if c.server != "" && !exact {
		return complete(c, cmd, (*api.Client).List, func(sh *shed.Shed) string { return sh.Name })
	}
	c.quiet = true
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
	defer cancel()
	answers, err := onAll(ctx, c, func(ctx context.Context, name string, client *api.Client) ([]*shed.Shed, error) {
		if exact && name != server {
			return nil, nil
		}
		return client.List(ctx)
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	count := map[string]int{}
	for _, a := range answers {
		for _, sh := range a.value {
			count[sh.Name]++
		}
	}
	var names []string
	for _, a := range answers {
		for _, sh := range a.value {
			if exact || count[sh.Name] > 1 {
				names = append(names, a.server+"/"+sh.Name)
			} else {
				names = append(names, sh.Name)
			}
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeServers completes names of servers.
func (c *cli) completeServers(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	servers, err := c.servers()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return servers.Config.Names(), cobra.ShellCompDirectiveNoFileComp
}

// completeImages completes names of images.
func (c *cli) completeImages(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return complete(c, cmd, (*api.Client).Images, imageName)
}

// complete returns the names of what list does, as long as the server doesn't let people wait.
func complete[T any](c *cli, cmd *cobra.Command, list func(*api.Client, context.Context) ([]T, error), name func(T) string) ([]string, cobra.ShellCompDirective) {
	c.quiet = true
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
	defer cancel()
	client, err := c.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	all, err := list(client, ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, v := range all {
		names = append(names, name(v))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
