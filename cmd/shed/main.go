// Command shed is the CLI. Results go to stdout, progress and messages to stderr.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

// Exit codes. They are documented API.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnreachable = 5
	// exitExec is for exec, console and attach where shed itself failed; a command
	// line that is wrong is exitUsage there too.
	exitExec = 255
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run carries out one command line and returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once

	c := &cli{in: stdin, out: stdout, err: stderr}
	root := newRoot(c)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	c.close()
	if err == nil {
		return exitOK
	}
	if status := exitStatus(0); errors.As(err, &status) {
		return int(status)
	}
	if !c.began {
		c.json = c.json || slices.Contains(args, "--json") // the error may have come before it was read
		c.printError(err)
		return exitUsage
	}
	c.printError(err)
	if c.failure != 0 {
		return c.failure
	}
	return exitCode(err)
}

// exitStatus is the end of a command that has said all that there is to say.
type exitStatus int

func (s exitStatus) Error() string { return "" }

func exitCode(err error) int {
	switch shed.ErrorCode(err) {
	case "":
		return exitOK
	case shed.CodeInvalid:
		return exitUsage
	case shed.CodeNotFound, shed.CodeNoImage, shed.CodeNoSession:
		return exitNotFound
	case shed.CodeExists, shed.CodeConflict:
		return exitConflict
	case shed.CodeUnreachable:
		return exitUnreachable
	}
	return exitError
}

func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:   "shed",
		Short: "Persistent development machines: each shed is a VM with its own disk",
		Example: `  shed create web --repo charliek/shed
  shed attach web
  shed exec web -- go test ./...
  shed stop web`,
		Long: `Persistent development machines: each shed is a VM with its own disk.

Exit codes: 0 success, 1 error, 2 usage, 3 not found, 4 conflict (exists,
running, in use), 5 server unreachable. exec and console return the code of
what they ran, and like attach 255 where shed itself failed.`,
		Version:       newClientInfo().Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		CompletionOptions: cobra.CompletionOptions{
			DisableDefaultCmd: true,
		},
	}
	flags := root.PersistentFlags()
	flags.StringVarP(&c.server, "server", "s", "", "`name` of the server in the configuration")
	flags.StringVarP(&c.configFile, "config", "c", "", "configuration `file` (default ~/.shed/config.yaml)")
	flags.BoolVar(&c.json, "json", false, "print one JSON document")
	flags.CountVarP(&c.verbose, "verbose", "v", "say what is asked of the server; -vv: all progress too")
	flags.BoolVar(&c.noColor, "no-color", false, "no colors (also where NO_COLOR is set)")
	root.AddCommand(
		newCreate(c), newList(c), newStart(c), newStop(c), newReset(c), newDelete(c),
		newConsole(c), newAttach(c), newSessions(c), newExec(c), newLogs(c), newSSHConfig(c), newImage(c), newServer(c), newTunnels(c), newVersion(c), newCompletion(c),
	)
	asGroup(root)
	checkHelp(root)
	root.SetFlagErrorFunc(flagError)
	return root
}
