package main

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func newSessions(c *cli) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "sessions [NAME]",
		Short: "List what runs in the sessions of sheds, or end one",
		Long: `List what runs in the sessions of a shed, of all sheds of a server, or of all
servers: the command, how many terminals show it, how long ago it last wrote
something, and the last line of its screen.`,
		Example: `  shed sessions
  shed sessions web
  shed sessions --all
  shed sessions kill web default`,
		Args:              optionalName,
		ValidArgsFunction: c.completeNames,
	}
	// Its arguments are no commands.
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError(cmd, "%w", err) })
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case all && len(args) > 0:
			return usageError(cmd, "--all means all sheds, and NAME one of them")
		case all && c.server != "":
			return usageError(cmd, "--all means all servers, and --server one of them")
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		switch {
		case all:
			return c.allSessions(ctx)
		case len(args) > 0:
			return c.sessionsOf(ctx, args[0])
		}
		return c.serverSessions(ctx)
	})
	cmd.Flags().BoolVarP(&all, "all", "a", false, "of all servers")
	cmd.AddCommand(newSessionsKill(c))
	return cmd
}

// sessionsOf lists the sessions of the shed that ref means.
func (c *cli) sessionsOf(ctx context.Context, ref string) error {
	t, err := c.resolve(ctx, ref)
	if err != nil {
		return err
	}
	sessions, err := t.client.Sessions(ctx, t.name)
	if err != nil {
		return err
	}
	if c.json {
		return c.printJSON(append([]shed.Session{}, sessions...))
	}
	if err := c.printFitted(sessionsHeader, sessionRows(sessions), len(sessionsHeader)-1); err != nil {
		return err
	}
	if len(sessions) == 0 {
		c.message("There are no sessions in %s. Open one with: shed attach %s", t.name, t.name)
	}
	return nil
}

const noSessions = "There are no sessions. Open one with: shed attach NAME"

// serverSessions lists the sessions of all sheds of a server.
func (c *cli) serverSessions(ctx context.Context) error {
	client, err := c.connect()
	if err != nil {
		return err
	}
	list, err := client.AllSessions(ctx)
	if err != nil {
		return err
	}
	c.printUnanswered(list.Unanswered, "")
	if c.json {
		if err := c.printJSON(append([]shed.Session{}, list.Sessions...)); err != nil || len(list.Unanswered) == 0 {
			return err
		}
		return exitStatus(exitError)
	}
	if err := c.printFitted(sessionsHeader, sessionRows(list.Sessions), len(sessionsHeader)-1); err != nil {
		return err
	}
	if len(list.Unanswered) > 0 {
		return exitStatus(exitError) // printUnanswered has said why
	}
	if len(list.Sessions) == 0 {
		c.message(noSessions)
	}
	return nil
}

// sessionOf is a session with the name of its shed's server.
type sessionOf struct {
	Server string `json:"server"`
	shed.Session
}

// unansweredOf is a shed that gave no answer, with the name of its server.
type unansweredOf struct {
	Server string `json:"server"`
	shed.Unanswered
}

// allSessions lists the sessions of all servers. It is no error that one is offline.
func (c *cli) allSessions(ctx context.Context) error {
	answers, err := onAll(ctx, c, func(ctx context.Context, _ string, client *api.Client) (shed.SessionList, error) {
		return client.AllSessions(ctx)
	})
	if err != nil {
		return err
	}
	doc := struct {
		Sessions   []sessionOf    `json:"sessions"`
		Unanswered []unansweredOf `json:"unanswered"`
		Offline    []offline      `json:"offline"`
	}{[]sessionOf{}, []unansweredOf{}, []offline{}}
	var rows [][]string
	for _, a := range answers {
		c.printUnanswered(a.value.Unanswered, a.server+"/")
		c.printOffline(a.server, a.err)
		if a.err != nil {
			doc.Offline = append(doc.Offline, newOffline(a.server, a.err))
		}
		for _, u := range a.value.Unanswered {
			doc.Unanswered = append(doc.Unanswered, unansweredOf{a.server, u})
		}
		for i, row := range sessionRows(a.value.Sessions) {
			doc.Sessions = append(doc.Sessions, sessionOf{a.server, a.value.Sessions[i]})
			rows = append(rows, append([]string{row[0], a.server}, row[1:]...))
		}
	}
	if c.json {
		return c.printJSON(doc)
	}
	slices.SortStableFunc(rows, func(a, b []string) int { return cmp.Compare(a[0], b[0]) })
	header := append([]string{sessionsHeader[0], "SERVER"}, sessionsHeader[1:]...)
	if err := c.printFitted(header, rows, len(header)-1); err != nil {
		return err
	}
	if len(rows) == 0 && len(doc.Unanswered) == 0 && len(doc.Offline) == 0 {
		c.message(noSessions)
	}
	return nil
}

// printUnanswered says which sheds gave no answer. prefix stands before their names.
func (c *cli) printUnanswered(unanswered []shed.Unanswered, prefix string) {
	for _, u := range unanswered {
		c.message("%s%s does not say what runs in it: %s", prefix, u.Shed, u.Reason)
	}
}

var sessionsHeader = []string{"NAME", "SESSION", "COMMAND", "ATTACHED", "IDLE", "LAST OUTPUT"}

func sessionRows(sessions []shed.Session) [][]string {
	now := time.Now()
	var rows [][]string
	for _, s := range sessions {
		rows = append(rows, []string{s.Shed, s.Name, oneLine(s.Command), attached(s.Attached), idle(s.ActiveAt, now), oneLine(s.LastLine)})
	}
	return rows
}

func attached(n int) string {
	switch n {
	case 0:
		return "no"
	case 1:
		return "yes"
	}
	return strconv.Itoa(n)
}

// idle says how long it is since at. The clock of another machine may be ahead.
func idle(at, now time.Time) string {
	if at.IsZero() {
		return ""
	}
	if at.After(now) {
		at = now
	}
	return strings.TrimSpace(humanize.RelTime(at, now, "", ""))
}

func newSessionsKill(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "kill NAME SESSION",
		Short: "End a session and what runs in it",
		Args:  needs(false, "NAME", "SESSION"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return c.completeNames(cmd, args, typed)
			case 1:
				return c.completeSessions(cmd, args, typed)
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if err := shed.ValidateSession(args[1]); err != nil {
			return err
		}
		return c.canAsk(cmd, force, "what runs in session "+args[1]+" of "+args[0]+" will be ended")
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		t, err := c.resolve(ctx, args[0])
		if err != nil {
			return err
		}
		name := args[1]
		if !force {
			if err := c.askKill(ctx, t, name); err != nil {
				return err
			}
		}
		if err := t.client.KillSession(ctx, t.name, name); err != nil {
			return err
		}
		if c.json {
			return c.printJSON(struct {
				Shed   string   `json:"shed"`
				Killed []string `json:"killed"`
			}{t.name, []string{name}})
		}
		return c.printLine(name)
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	return cmd
}

// askKill asks whether to end a session. It returns an error unless it is there and the answer is yes.
func (c *cli) askKill(ctx context.Context, t target, name string) error {
	sessions, err := t.client.Sessions(ctx, t.name)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		if s.Name == name {
			return c.ask(false, "End session "+name+" of "+t.name+" and what runs in it ("+s.Command+")?")
		}
	}
	return shed.Errorf(shed.CodeNoSession, "shed %q has no session %q", t.name, name).
		WithHint("those that there are: shed sessions %s", t.name)
}

// completeSessions completes names of the sessions of the shed that args begins with.
func (c *cli) completeSessions(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c.quiet = true
	ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
	defer cancel()
	t, err := c.resolve(ctx, args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	sessions, err := t.client.Sessions(ctx, t.name)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range sessions {
		names = append(names, s.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
