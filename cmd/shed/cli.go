package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// cli is what the commands share: streams, global flags, the servers.
type cli struct {
	in       io.Reader
	out, err io.Writer

	server     string
	configFile string
	json       bool
	verbose    int
	noColor    bool

	known   *client.Servers // once loaded
	quiet   bool            // asks for no passphrase
	taken   atomic.Bool     // the terminal is a session's
	began   bool            // the command line was right
	failure int             // exit code for every failure, if not 0

	messages sync.Mutex // of stderr
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
		client, err := c.connect()
		if err != nil {
			return err
		}
		return f(ctx, client, args)
	})
}

func (c *cli) close() {
	if c.known == nil {
		return
	}
	if err := c.known.Close(); err != nil {
		c.message("shed: what servers answered is not remembered: %v", err)
	}
}

// servers returns the configured servers.
func (c *cli) servers() (*client.Servers, error) { return c.configured(client.LoadConfig) }

// configured returns the servers of the configuration that is loaded, or else of what read returns.
func (c *cli) configured(read func(path string) (*client.Config, error)) (*client.Servers, error) {
	if c.known == nil {
		cfg, err := read(c.configFile)
		if err != nil {
			return nil, err
		}
		c.known = client.NewServers(cfg, c.clientOptions())
	}
	return c.known, nil
}

func (c *cli) clientOptions() client.Options {
	var opts client.Options
	if c.verbose > 0 {
		opts.Note = func(line string) { c.message("%s", line) }
	}
	if _, tty := terminal(c.err); tty && !c.quiet {
		opts.Ask = c.askPassphrase
	}
	return opts
}

// connect returns a client of the server that --server names, or of the default one.
func (c *cli) connect() (*api.Client, error) {
	_, client, err := c.connectNamed("")
	return client, err
}

// connectNamed is connect for the server called name, unless that is "".
func (c *cli) connectNamed(name string) (server string, _ *api.Client, err error) {
	servers, err := c.servers()
	if err != nil {
		return "", nil, err
	}
	if name == "" {
		name = c.server
	}
	if name == "" {
		if name, err = servers.Config.Default(); err != nil {
			return "", nil, err
		}
	}
	client, err := servers.Client(name)
	return name, client, err
}

// target is a shed to do something to.
type target struct {
	client *api.Client
	server string // its name
	name   string
}

// resolve returns the shed that ref means: NAME, which is looked up on all servers unless
// --server names one, or SERVER/NAME.
func (c *cli) resolve(ctx context.Context, ref string) (target, error) {
	servers, err := c.servers()
	if err != nil {
		return target{}, err
	}
	return c.resolveBy(ctx, ref, servers.Lookup)
}

// resolveBy is resolve with a lookup that is begun if it is needed.
func (c *cli) resolveBy(ctx context.Context, ref string, lookup func() *client.Lookup) (target, error) {
	servers, err := c.servers()
	if err != nil {
		return target{}, err
	}
	if strings.Contains(ref, "/") || c.server != "" || len(servers.Config.Names()) == 1 {
		return c.place(ref)
	}
	if err := shed.ValidateName(ref); err != nil {
		return target{}, err
	}
	server, err := lookup().Find(ctx, ref)
	if err != nil {
		return target{}, err
	}
	return c.place(server + "/" + ref)
}

// place returns where the shed is, or is to be, that ref means: without a server in it, the default one.
func (c *cli) place(ref string) (target, error) {
	server, name, err := c.splitRef(ref)
	if err != nil {
		return target{}, err
	}
	server, client, err := c.connectNamed(server)
	return target{client, server, name}, err
}

// splitRef takes NAME or SERVER/NAME apart, without asking servers. The server is "" if it isn't known.
func (c *cli) splitRef(ref string) (server, name string, err error) {
	server, name, exact := strings.Cut(ref, "/")
	switch {
	case !exact:
		server, name = c.server, ref
	case server == "":
		return "", "", shed.Errorf(shed.CodeInvalid, "%q does not name a shed", ref).WithHint("give the server as SERVER/NAME or as --server SERVER")
	case c.server != "" && c.server != server:
		return "", "", shed.Errorf(shed.CodeInvalid, "%q does not name a shed on the server %q", ref, c.server).
			WithHint("give the server as SERVER/NAME or as --server SERVER")
	}
	return server, name, shed.ValidateName(name)
}

// targets returns the sheds that refs mean. It fails, before anything is done to
// any of them, if one isn't there.
func (c *cli) targets(ctx context.Context, refs []string) ([]target, error) {
	servers, err := c.servers()
	if err != nil {
		return nil, err
	}
	lookup := sync.OnceValue(servers.Lookup)
	var targets []target
	seen := map[target]bool{}
	err = each(c, refs, func(ref string) error {
		t, err := c.resolveBy(ctx, ref, lookup)
		if err != nil {
			return err
		}
		if seen[t] {
			return nil // once is enough
		}
		seen[t] = true
		if _, err := t.client.Get(ctx, t.name); err != nil {
			return err
		}
		targets = append(targets, t)
		return nil
	})
	return targets, err
}

// answer is what a server answered.
type answer[T any] struct {
	server string // its name
	value  T
	err    error
}

const (
	// allTimeout is for each of all servers to answer. A server at the other end of the world takes half of it to log in.
	allTimeout = 3 * time.Second
	// absentTimeout is for one to take the connection that gave no answer before either. It leaves time for a packet
	// to be lost, which is sent again after a second.
	absentTimeout = 1500 * time.Millisecond
)

// onAll runs f on all servers at once, each for as long as it takes within allTimeout, or absentTimeout. The answers
// are in the order of the servers' names.
func onAll[T any](ctx context.Context, c *cli, f func(ctx context.Context, server string, client *api.Client) (T, error)) ([]answer[T], error) {
	servers, err := c.servers()
	if err != nil {
		return nil, err
	}
	names := servers.Config.Names()
	answers := make([]answer[T], len(names))
	ctx, cancel := servers.WithTimeout(ctx, allTimeout)
	defer cancel()
	var asked sync.WaitGroup
	for i, name := range names {
		a := &answers[i]
		a.server = name
		asked.Go(func() {
			ctx, giveUp := context.WithCancelCause(ctx)
			defer giveUp(nil)
			defer time.AfterFunc(absentTimeout, func() {
				if servers.Absent(name) {
					giveUp(errAbsent)
				}
			}).Stop()
			client, err := servers.Client(name)
			if err == nil {
				a.value, err = f(ctx, name, client)
			}
			if cause := context.Cause(ctx); err != nil && cause == errAbsent {
				err = cause
			} else if err != nil && errors.Is(cause, context.DeadlineExceeded) {
				err = shed.Errorf(shed.CodeUnreachable, "no answer within %s", allTimeout)
			}
			a.err = err
		})
	}
	asked.Wait()
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return nil, ctx.Err()
	}
	return answers, nil
}

var errAbsent error = shed.Errorf(shed.CodeUnreachable, "no connection within %s, and no answer the last time either", absentTimeout)

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

// message writes one line to stderr. It may be called from several goroutines at once.
func (c *cli) message(format string, args ...any) {
	c.messages.Lock()
	defer c.messages.Unlock()
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
	doc := errorDoc(err)
	if errors.Is(err, context.Canceled) {
		doc.Message = interrupted
	}
	if c.printJSON(struct {
		Error *shed.Error `json:"error"`
	}{doc}) != nil {
		c.printMessage(err)
	}
}

// errorDoc returns what --json says of err.
func errorDoc(err error) *shed.Error {
	return &shed.Error{Code: shed.ErrorCode(err), Message: err.Error(), Hint: shed.ErrorHint(err)}
}

const interrupted = "interrupted"

func (c *cli) printMessage(err error) {
	if errors.Is(err, context.Canceled) {
		c.message("shed: " + interrupted)
		return
	}
	c.message("shed: %s", err)
	c.printHint(err)
}

// printHint says what to try about err, if that is known.
func (c *cli) printHint(err error) {
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
