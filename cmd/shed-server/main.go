//go:build linux

// Command shed-server runs sheds: it serves the HTTP API and SSH, and is run once
// more, as a keeper, for each shed that runs.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/charliek/shed"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "shed-server:", err)
		if hint := shed.ErrorHint(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
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
	}
	var configFile string
	root.PersistentFlags().StringVarP(&configFile, "config", "c", "", "configuration file (default: the first of ./server.yaml, ~/.config/shed/server.yaml, /etc/shed/server.yaml)")
	root.AddCommand(
		&cobra.Command{
			Use: "serve", Short: "Serve the HTTP API and SSH until interrupted; sheds run on", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := loadConfig(configFile)
				if err != nil {
					return err
				}
				return serve(cmd.Context(), cfg)
			},
		},
		&cobra.Command{
			Use: "doctor", Short: "Check what this machine has to offer, and say what to do about what is missing", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := loadConfig(configFile)
				if err != nil {
					return err
				}
				return doctor(cmd.Context(), cfg, cmd.OutOrStdout())
			},
		},
		&cobra.Command{
			Use: "keep DIR", Short: "Run the machine of one shed (used by serve)", Hidden: true, Args: cobra.ExactArgs(1),
			RunE: func(_ *cobra.Command, args []string) error { return keep(args[0]) },
		},
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "shed-server", version) },
		},
	)
	return root
}
