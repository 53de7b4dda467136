package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

// usageError returns an error about the command line of cmd.
func usageError(cmd *cobra.Command, format string, args ...any) *shed.Error {
	return shed.Errorf(shed.CodeInvalid, format, args...).WithHint("usage: %s", useLine(cmd))
}

func useLine(cmd *cobra.Command) string {
	return strings.TrimSuffix(cmd.UseLine(), " [flags]") + "  (see: " + cmd.CommandPath() + " --help)"
}

// asGroup makes cmd a command that only has commands: by itself it prints its help.
func asGroup(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		return cmd.Help()
	}
}

func unknownCommand(cmd *cobra.Command, name string) error {
	err := shed.Errorf(shed.CodeInvalid, "unknown command %q for %q", name, cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if names := cmd.SuggestionsFor(name); len(names) > 0 {
		return err.WithHint("did you mean %s?", strings.Join(names, " or "))
	}
	return err.WithHint("see: %s --help", cmd.CommandPath())
}

// checkHelp has the command help of root refuse what is no command.
func checkHelp(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "help" {
			cmd.Args = func(_ *cobra.Command, args []string) error {
				found, rest, err := root.Find(args)
				if err == nil && len(rest) > 0 && found.HasSubCommands() {
					err = unknownCommand(found, rest[0])
				}
				return err
			}
		}
	}
}

func flagError(cmd *cobra.Command, err error) error {
	if cmd.HasSubCommands() && cmd.Flags().NArg() > 0 {
		return unknownCommand(cmd, cmd.Flags().Arg(0)) // whose flags can't be known
	}
	if num := (*strconv.NumError)(nil); errors.As(err, &num) { // without the names of Go's functions
		return usageError(cmd, "%s%w", strings.TrimSuffix(err.Error(), num.Error()), num.Err)
	}
	return usageError(cmd, "%w", err)
}

// needs returns a check of the number of arguments; more than one of the last if many.
func needs(many bool, names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usageError(cmd, "%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and "))
		}
		if len(args) > len(names) && !many {
			takes := "no arguments"
			if len(names) > 0 {
				takes = "only " + strings.Join(names, " and ")
			}
			return usageError(cmd, "%s takes %s, got %q", cmd.CommandPath(), takes, args[len(names)])
		}
		return nil
	}
}

// noArgs is the check of a command without arguments.
func noArgs(cmd *cobra.Command, args []string) error { return needs(false)(cmd, args) }

// optionalName is the check of a command whose one argument, NAME, may be left out.
func optionalName(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return needs(false, "NAME")(cmd, args)
}

// refuseJSON is for commands whose stdout isn't theirs.
func refuseJSON(c *cli, cmd *cobra.Command, why string) error {
	if c.json {
		return fmt.Errorf("%w", usageError(cmd, "%s has no --json: %s", cmd.CommandPath(), why))
	}
	return nil
}
