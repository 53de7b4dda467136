//go:build linux

// Command shed-server runs sheds: it serves the HTTP API and SSH, and is run once
// more, as a keeper, for each shed that runs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/charliek/shed"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit codes.
const (
	exitError = 1
	exitUsage = 2
)

// run carries out one command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := command()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "shed-server:", err)
	if hint := shed.ErrorHint(err); hint != "" {
		fmt.Fprintln(stderr, "hint:", hint)
	}
	if usage := (usageError{}); errors.As(err, &usage) {
		return exitUsage
	}
	return exitError
}

// usageError is an error about the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// arguments checks that a command has n of them.
func arguments(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		if n == 0 {
			return usageError{shed.Errorf(shed.CodeInvalid, "%s takes no arguments, got %q", cmd.CommandPath(), args[0]).
				WithHint("see: %s --help", cmd.CommandPath())}
		}
		return usageError{shed.Errorf(shed.CodeInvalid, "%s takes %d argument, got %d", cmd.CommandPath(), n, len(args)).
			WithHint("usage: %s", cmd.UseLine())}
	}
}

// unknownCommand says which commands there are.
func unknownCommand(root *cobra.Command, name string) error {
	var names []string
	for _, cmd := range root.Commands() {
		if cmd.IsAvailableCommand() {
			names = append(names, cmd.Name())
		}
	}
	return usageError{shed.Errorf(shed.CodeInvalid, "unknown command %q for %q", name, root.CommandPath()).
		WithHint("there are: %s  (see: %s --help)", strings.Join(names, ", "), root.CommandPath())}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "shed-server",
		Short: "Run persistent Linux VMs for coding work and coding agents",
		Long: "shed-server runs sheds, persistent Linux VMs, on this machine.\n\n" +
			"Run `shed-server doctor` to see whether all that it needs is here, then `shed-server serve`.",
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if cmd == root && cmd.Flags().NArg() > 0 { // whose flags can't be known
			return unknownCommand(root, cmd.Flags().Arg(0))
		}
		return usageError{shed.Errorf(shed.CodeInvalid, "%w", err).WithHint("see: %s --help", cmd.CommandPath())}
	})
	var configFile string
	// configured adapts f, which needs the configuration, to cobra.
	configured := func(f func(cmd *cobra.Command, cfg config) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(configFile)
			if err != nil {
				return err
			}
			return f(cmd, cfg)
		}
	}
	root.PersistentFlags().StringVarP(&configFile, "config", "c", "", "configuration `file` (default: the first of ./server.yaml, ~/.config/shed/server.yaml, /etc/shed/server.yaml)")
	root.AddCommand(
		&cobra.Command{
			Use: "serve", Short: "Serve the HTTP API and SSH until interrupted; sheds run on", Args: arguments(0),
			RunE: configured(func(cmd *cobra.Command, cfg config) error {
				return serve(cmd.Context(), cfg)
			}),
		},
		&cobra.Command{
			Use: "doctor", Short: "Check what this machine has to offer, and say what to do about what is missing", Args: arguments(0),
			RunE: configured(func(cmd *cobra.Command, cfg config) error {
				return doctor(cmd.Context(), cfg, cmd.OutOrStdout())
			}),
		},
		&cobra.Command{
			Use: "pull-images", Short: "Pull the images that the configuration names", Args: arguments(0),
			RunE: configured(func(cmd *cobra.Command, cfg config) error {
				return pullImages(cmd.Context(), cfg, cmd.OutOrStdout(), cmd.ErrOrStderr())
			}),
		},
		&cobra.Command{
			Use: "keep DIR", Short: "Run the machine of one shed (used by serve)", Hidden: true, Args: arguments(1),
			RunE: func(cmd *cobra.Command, args []string) error { return keep(cmd.Context(), args[0]) },
		},
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: arguments(0),
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "shed-server", version) },
		},
	)
	root.InitDefaultHelpCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "help" {
			cmd.Args = func(_ *cobra.Command, args []string) error {
				if found, _, err := root.Find(args); err != nil || found != root || len(args) == 0 {
					return err
				}
				return unknownCommand(root, args[0])
			}
		}
	}
	return root
}
