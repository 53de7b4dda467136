package main

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

// canAsk returns an error with hint if nobody can be asked whether to go on.
func (c *cli) canAsk(cmd *cobra.Command, force bool, hint string) error {
	_, canRead := terminal(c.in)
	_, canWrite := terminal(c.err)
	if force || canRead && canWrite && !c.json {
		return nil
	}
	return shed.Errorf(shed.CodeInvalid, "%s needs --force where it can't ask", cmd.CommandPath()).WithHint("%s", hint)
}

// ask returns an error unless the answer to question is yes.
func (c *cli) ask(force bool, question string) error {
	if force {
		return nil
	}
	fmt.Fprintf(c.err, "%s [y/N] ", printable(question))
	answer, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil && answer == "" {
		return fmt.Errorf("the answer can't be read: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	c.message("nothing was done")
	return exitStatus(exitError)
}
