// Package shed holds the nouns of the project, the contracts of the services
// that work on them, and the error codes that all of them share.
//
// It imports the standard library only; every other package may import it.
package shed

import (
	"context"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Status says what a shed is doing, as seen when it was asked.
type Status string

const (
	StatusCreating Status = "creating"
	StatusStarting Status = "starting"
	StatusRunning  Status = "running"
	StatusStopping Status = "stopping"
	StatusStopped  Status = "stopped"
	StatusDeleting Status = "deleting"
	// StatusDamaged is a shed whose record can't be read. Its files are
	// left alone; only a delete removes them.
	StatusDamaged Status = "damaged"
)

// Shed is one persistent VM with its own writable disk.
type Shed struct {
	Name    string `json:"name"`
	Backend string `json:"backend"`
	Status  Status `json:"status"`
	// Reason says why a shed is stopped or damaged where nobody asked for it.
	Reason      string    `json:"reason,omitempty"`
	Image       string    `json:"image"`        // as the user named it
	ImageDigest string    `json:"image_digest"` // of the manifest: sha256:...
	Kernel      string    `json:"kernel"`       // kernel bundle
	CPUs        int       `json:"cpus"`
	MemoryMB    int       `json:"memory_mb"`
	UpperSize   int64     `json:"upper_size"` // bytes, logical
	DiskUsed    int64     `json:"disk_used"`  // bytes, really allocated
	Repo        string    `json:"repo,omitempty"`
	Workspace   string    `json:"workspace"` // landing directory in the guest
	CreatedAt   time.Time `json:"created_at"`
	StartedAt   time.Time `json:"started_at,omitzero"`
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidateName returns an Error with CodeInvalid unless name can name a shed.
func ValidateName(name string) error {
	if nameRE.MatchString(name) {
		return nil
	}
	return Errorf(CodeInvalid, "%q can't be the name of a shed", name).
		WithHint("use 1 to 63 characters: a-z, 0-9 and '-', with no '-' at either end")
}

// Limits of what a shed may ask for. Sizes are in bytes, memory in MiB.
const (
	MinMemoryMB      = 256
	MinUpperSize     = 1 << 30
	MaxUpperSize     = 1 << 40
	DefaultUpperSize = 20 << 30
)

// CreateOptions describes the shed to create. Zero values mean the server's defaults.
type CreateOptions struct {
	Name        string `json:"name"`
	Image       string `json:"image,omitempty"`
	Backend     string `json:"backend,omitempty"`
	CPUs        int    `json:"cpus,omitempty"`
	MemoryMB    int    `json:"memory_mb,omitempty"`
	UpperSize   int64  `json:"upper_size,omitempty"` // bytes
	Repo        string `json:"repo,omitempty"`
	NoProvision bool   `json:"no_provision,omitempty"`
}

// Event reports how a long operation gets on. A phase begins with an event
// that has Phase set and ends with one that has Done set. Current and Total
// count Unit within the phase; Total is 0 where it isn't known. A phase may
// have parts that go on at the same time, such as layers: their events have Item set too, and
// one with Done ends the item alone.
type Event struct {
	Phase   string        `json:"phase"`
	Item    string        `json:"item,omitempty"`
	Message string        `json:"message,omitempty"`
	Current int64         `json:"current,omitempty"`
	Total   int64         `json:"total,omitempty"`
	Unit    string        `json:"unit,omitempty"` // "bytes" or a countable noun
	Done    bool          `json:"done,omitempty"`
	Elapsed time.Duration `json:"elapsed_ns,omitempty"` // of the phase; with Done
}

// Progress receives events. It must not block for long, and may be nil:
// call it through Report.
type Progress func(Event)

// Report hands e to p unless p is nil.
func (p Progress) Report(e Event) {
	if p != nil {
		p(e)
	}
}

// Phase reports that phase begins and returns the function that reports its end.
func (p Progress) Phase(phase, message string) (done func()) {
	start := time.Now()
	p.Report(Event{Phase: phase, Message: message})
	return func() { p.Report(Event{Phase: phase, Done: true, Elapsed: time.Since(start)}) }
}

// Reader returns r with the bytes that are read from it reported every few MB: as e, whose Current
// they are added to.
func (p Progress) Reader(r io.Reader, e Event) io.Reader {
	e.Unit = "bytes"
	return &countingReader{r: r, p: p, e: e}
}

type countingReader struct {
	r        io.Reader
	p        Progress
	e        Event
	reported int64 // steps
}

func (c *countingReader) Read(b []byte) (int, error) {
	const step = 4 << 20
	n, err := c.r.Read(b)
	c.e.Current += int64(n)
	if at := c.e.Current / step; at != c.reported {
		c.reported = at
		c.p.Report(c.e)
	}
	return n, err
}

// Size is the size of a terminal in cells.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// TTY asks for a pseudo-terminal.
type TTY struct {
	Term string `json:"term"`
	Size
}

// SubsystemSFTP is the subsystem that serves files, by the SFTP protocol on stdin and stdout.
const SubsystemSFTP = "sftp"

// Command is what to run in a shed. Exactly one of Args, Script, Login, Subsystem and
// Attach says what: Args is run literally, Script by the user's login shell with -c,
// Login starts an interactive login shell, Subsystem names a program that every shed
// has, whatever its image, and Attach a session, which needs a TTY and is the default user's.
type Command struct {
	Args      []string `json:"args,omitempty"`
	Script    string   `json:"script,omitempty"`
	Login     bool     `json:"login,omitempty"`
	Subsystem string   `json:"subsystem,omitempty"`
	Attach    *Attach  `json:"attach,omitempty"`

	Env  []string `json:"env,omitempty"`  // K=V, added to the login environment
	Dir  string   `json:"dir,omitempty"`  // default: the shed's workspace, or a subsystem's user's home
	User string   `json:"user,omitempty"` // name or UID; default: shed, or root where there is no shed
	TTY  *TTY     `json:"tty,omitempty"`
}

// Validate checks what can be told without the shed.
func (c Command) Validate() error {
	kinds := 0
	for _, set := range []bool{len(c.Args) > 0, c.Script != "", c.Login, c.Subsystem != "", c.Attach != nil} {
		if set {
			kinds++
		}
	}
	if kinds != 1 {
		return Errorf(CodeInvalid, "a command is exactly one of args, script, login, subsystem and attach")
	}
	if c.Subsystem != "" && (c.Subsystem != SubsystemSFTP || c.TTY != nil) {
		return Errorf(CodeInvalid, "there is no subsystem %.80q; the only one is %s, without a terminal", c.Subsystem, SubsystemSFTP)
	}
	if c.Attach != nil {
		if err := c.Attach.Validate(); err != nil {
			return err
		}
		if c.TTY == nil || c.User != "" {
			return Errorf(CodeInvalid, "a session is shown on a terminal, and is the shed's user's")
		}
	}
	for _, s := range append(append([]string{c.Script, c.Dir, c.User}, c.Args...), c.Env...) {
		if strings.ContainsRune(s, 0) {
			return Errorf(CodeInvalid, "a command can't contain a NUL byte")
		}
		if !utf8.ValidString(s) { // in JSON it would become another one
			return Errorf(CodeInvalid, "a command can't contain %q, which is not UTF-8", s)
		}
	}
	for _, kv := range c.Env {
		if key, _, ok := strings.Cut(kv, "="); !ok || key == "" {
			return Errorf(CodeInvalid, "%q is no environment variable", kv).WithHint("write NAME=VALUE")
		}
	}
	return nil
}

// Endpoint is an address inside a shed.
type Endpoint struct {
	Network string `json:"network"` // "tcp", "unix", or "accepted": see Sheds.Listen
	Address string `json:"address"` // HOST:PORT, an absolute path, or what an acceptance is called
	// NoStart leaves a stopped shed as it is: CodeConflict.
	NoStart bool `json:"no_start,omitempty"`
}

// Validate checks what can be told without the shed.
func (e Endpoint) Validate() error {
	if strings.ContainsRune(e.Address, 0) || !utf8.ValidString(e.Address) {
		return Errorf(CodeInvalid, "an address can't be %.80q", e.Address)
	}
	switch e.Network {
	case "tcp":
		_, port, err := net.SplitHostPort(e.Address)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil {
			return Errorf(CodeInvalid, "%.80q is no address", e.Address).WithHint("write HOST:PORT")
		}
	case "unix":
		if e.Address != "" && e.Address[0] != '/' {
			return Errorf(CodeInvalid, "the socket %.80q has no absolute path", e.Address)
		}
	case "accepted":
	default:
		return Errorf(CodeInvalid, "there is no network %.80q", e.Network).WithHint("use tcp or unix")
	}
	return nil
}

// ExitStatus is how a command in a shed ended.
type ExitStatus struct {
	Code   int    `json:"code"`             // 128+signal where a signal ended it
	Signal string `json:"signal,omitempty"` // "TERM", without SIG
	Error  string `json:"error,omitempty"`  // why it was never started; Code is then 127 or 126
}

// Process is a command that runs in a shed.
//
// Stdout and Stderr share one flow-controlled stream: both must be read until
// EOF. With a TTY, Stderr is empty. Close lets go of the command, which ends it if it
// still runs. All methods may be called concurrently.
type Process interface {
	Stdin() io.WriteCloser
	Stdout() io.Reader
	Stderr() io.Reader
	Resize(Size) error
	Signal(name string) error // "INT", "TERM", ...
	Wait() (ExitStatus, error)
	Close() error
}

// Sheds is what a server does with sheds. The engine implements it, and so
// does the HTTP client: callers can't tell them apart.
//
// Every method that takes a name returns CodeInvalid for one that can't be a
// name and CodeNotFound for one that no shed has.
type Sheds interface {
	// Create makes and starts a shed. Either all of it happened or, on error, none of
	// it. CodeExists if the name is taken, CodeNoImage if the image isn't here.
	Create(ctx context.Context, opts CreateOptions, p Progress) (*Shed, error)

	// List returns all sheds, sorted by name.
	List(ctx context.Context) ([]*Shed, error)

	Get(ctx context.Context, name string) (*Shed, error)

	// Start boots a stopped shed; starting a running one changes nothing.
	Start(ctx context.Context, name string, p Progress) (*Shed, error)

	// Stop shuts a shed down cleanly; stopping a stopped one changes nothing.
	Stop(ctx context.Context, name string, p Progress) (*Shed, error)

	// Reset gives a stopped shed a new, empty upper. CodeConflict if it runs.
	Reset(ctx context.Context, name string) (*Shed, error)

	// Delete removes a shed and all that it wrote. A running one is stopped first.
	Delete(ctx context.Context, name string, p Progress) error

	// Logs returns the shed's console and provisioning output, and with
	// follow goes on until ctx is done or the shed is deleted.
	Logs(ctx context.Context, name string, follow bool) (io.ReadCloser, error)

	// Exec runs cmd in a shed, starting the shed if it is stopped. The returned
	// connection speaks the exec protocol of internal/agent; NewProcess there
	// makes a Process of it. Closing it ends the command, but detaches from a session. See Attach
	// for further errors.
	Exec(ctx context.Context, name string, cmd Command) (net.Conn, error)

	// Dial connects to an address in a shed, starting the shed if it is stopped, unless that says no. Names resolve
	// in the shed, whose own localhost is meant; a Unix socket is opened by the shed's
	// user. CodeConnect if nothing answers there. The connection has a method CloseWrite. ctx is
	// for the time until it is connected.
	Dial(ctx context.Context, name string, to Endpoint) (net.Conn, error)

	// Listen listens in a shed, starting the shed if it is stopped. A port of 0 is any that
	// is free; a Unix socket is its user's, and without an address one in a new
	// directory. CodeConnect if that can't be.
	//
	// The returned connection carries messages of internal/agent: one Listening, and an
	// Accepted for each connection, which is to be dialled with the network "accepted".
	// Closing it ends the listening, but no connection.
	Listen(ctx context.Context, name string, on Endpoint) (net.Conn, error)

	// Sessions returns the sessions of a shed, sorted by name. A stopped one has none.
	Sessions(ctx context.Context, name string) ([]Session, error)

	// AllSessions returns the sessions of all sheds.
	AllSessions(ctx context.Context) (SessionList, error)

	// KillSession ends a session and what runs in it. CodeNoSession if it isn't there.
	KillSession(ctx context.Context, name, session string) error
}
