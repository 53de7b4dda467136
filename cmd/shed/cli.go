package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// cli is what the commands share: streams, global flags, the connection.
type cli struct {
	in       io.Reader
	out, err io.Writer

	server     string
	configFile string
	json       bool
	verbose    int
	noColor    bool

	config  *config // once loaded
	clients []*api.Client
	began   bool // the command line was right
	failure int  // exit code for every failure, if not 0
}

// action adapts f to cobra. What fails before it runs is wrong usage.
func (c *cli) action(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c.began = true
		return f(cmd.Context(), args)
	}
}

// withServer is action for what needs the server that --server names, or the default one.
func (c *cli) withServer(f func(ctx context.Context, client *api.Client, args []string) error) func(*cobra.Command, []string) error {
	return c.action(func(ctx context.Context, args []string) error {
		client, err := c.connect("")
		if err != nil {
			return err
		}
		return f(ctx, client, args)
	})
}

func (c *cli) close() {
	for _, client := range c.clients {
		client.Close()
	}
}

// connect returns a client of the server called name, or of the default one if it is "".
func (c *cli) connect(name string) (*api.Client, error) {
	if c.config == nil {
		cfg, err := loadConfig(c.configFile)
		if err != nil {
			return nil, err
		}
		c.config = cfg
	}
	if name == "" {
		name = c.server
	}
	socket, label, err := c.config.socket(name)
	if err != nil {
		return nil, err
	}
	client := api.NewUnixClient(socket, label)
	if c.verbose > 0 {
		c.message("using %s", label)
		client.Trace = func(line string) { c.message("%s", line) }
	}
	c.clients = append(c.clients, client)
	return client, nil
}

// target is a shed to do something to.
type target struct {
	client *api.Client
	name   string
}

// resolve returns the shed that ref means: NAME or SERVER/NAME.
func (c *cli) resolve(_ context.Context, ref string) (target, error) { return c.place(ref) }

// place returns where the shed is, or is to be, that ref means: without a server in it, the default one.
func (c *cli) place(ref string) (target, error) {
	server, name, exact := strings.Cut(ref, "/")
	if !exact {
		server, name = "", ref
	} else if server == "" || c.server != "" && c.server != server {
		return target{}, shed.Errorf(shed.CodeInvalid, "%q does not name a shed on the server %q", ref, c.server).
			WithHint("give the server as SERVER/NAME or as --server SERVER")
	}
	if err := shed.ValidateName(name); err != nil {
		return target{}, err
	}
	client, err := c.connect(server)
	return target{client, name}, err
}

// targets returns the sheds that refs mean. It fails, before anything is done to
// any of them, if one isn't there.
func (c *cli) targets(ctx context.Context, refs []string) ([]target, error) {
	var targets []target
	seen := map[string]bool{}
	err := each(c, refs, func(ref string) error {
		if seen[ref] {
			return nil // once is enough
		}
		seen[ref] = true
		t, err := c.resolve(ctx, ref)
		if err != nil {
			return err
		}
		if _, err := t.client.Get(ctx, t.name); err != nil {
			return err
		}
		targets = append(targets, t)
		return nil
	})
	return targets, err
}

// each runs f for all of list, those after a failed one included. The last error is
// returned, the others are printed.
func each[T any](c *cli, list []T, f func(T) error) error {
	var failed error
	for _, v := range list {
		err := f(v)
		if err == nil {
			continue
		}
		if failed != nil {
			c.printMessage(failed)
		}
		failed = err
		if errors.Is(err, context.Canceled) {
			break
		}
	}
	return failed
}

// message writes one line to stderr.
func (c *cli) message(format string, args ...any) {
	fmt.Fprintln(c.err, printable(fmt.Sprintf(format, args...)))
}

// printLine writes one line to stdout.
func (c *cli) printLine(line string) error {
	_, err := fmt.Fprintln(c.out, printable(line))
	return err
}

// printJSON writes the one document of --json.
func (c *cli) printJSON(v any) error {
	enc := json.NewEncoder(c.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// printError says what err is: on stdout with --json, else on stderr.
func (c *cli) printError(err error) {
	if !c.json {
		c.printMessage(err)
		return
	}
	said := err.Error()
	if errors.Is(err, context.Canceled) {
		said = interrupted
	}
	c.printJSON(struct {
		Error shed.Error `json:"error"`
	}{shed.Error{Code: shed.ErrorCode(err), Message: said, Hint: shed.ErrorHint(err)}})
}

const interrupted = "interrupted"

func (c *cli) printMessage(err error) {
	if errors.Is(err, context.Canceled) {
		c.message("shed: " + interrupted)
		return
	}
	c.message("shed: %s", err)
	if hint := shed.ErrorHint(err); hint != "" {
		c.message("hint: %s", hint)
	}
}

// printable replaces what a terminal would act upon: messages may quote what a
// shed has written.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// terminal returns the file descriptor of stream if it is a terminal.
func terminal(stream any) (fd int, ok bool) {
	f, ok := stream.(*os.File)
	if !ok {
		return -1, false
	}
	fd = int(f.Fd())
	return fd, term.IsTerminal(fd)
}

// color says whether stderr takes escape sequences for colors.
func (c *cli) color() bool {
	_, tty := terminal(c.err)
	return tty && !c.noColor && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
