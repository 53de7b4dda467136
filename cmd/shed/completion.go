package main

import (
	"context"
	"strings"

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
