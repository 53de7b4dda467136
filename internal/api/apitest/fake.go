// Package apitest has a server's sheds and images in memory, for tests of
// what stands in front of them.
package apitest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// Created is when every shed of a Fake was created.
var Created = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// Fake implements shed.Sheds and shed.Images. Its sheds run nothing; the
// functions, where set, say what happens.
type Fake struct {
	// Before runs before each operation, such as "create", and may fail it.
	Before func(ctx context.Context, op, name string, p shed.Progress) error
	// Run is the command that runs behind Exec. It should end when in does.
	Run func(cmd shed.Command, in *agent.FrameReader, out *agent.FrameWriter) shed.ExitStatus
	// Connect is what Dial does, other than picking up what a listener has accepted.
	Connect func(ctx context.Context, to shed.Endpoint) (net.Conn, error)
	// Bind listens for Listen.
	Bind func(ctx context.Context, on shed.Endpoint) (net.Listener, error)
	// Log is what Logs returns.
	Log func(ctx context.Context, follow bool) io.ReadCloser
	// Archive is what Save writes, instead of the names.
	Archive func(ctx context.Context, w io.Writer) error
	// Take reads what Load and Build get, instead of reading it to its end.
	Take func(ctx context.Context, r io.Reader, p shed.Progress) error

	// Unanswered is what AllSessions returns besides the sessions.
	Unanswered []shed.Unanswered

	mu       sync.Mutex
	sheds    []*shed.Shed
	images   []*shed.Image
	sessions []shed.Session
	built    shed.BuildOptions
	commands sync.WaitGroup
	accepted agent.Acceptances
}

var (
	_ shed.Sheds  = (*Fake)(nil)
	_ shed.Images = (*Fake)(nil)
)

// Add adds a shed, and Create does with the server's defaults.
func (f *Fake) Add(sh shed.Shed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sheds = append(f.sheds, &sh)
	slices.SortFunc(f.sheds, func(a, b *shed.Shed) int { return strings.Compare(a.Name, b.Name) })
}

// WaitCommands returns when no command runs and nothing listens.
func (f *Fake) WaitCommands() { f.commands.Wait() }

// Ack tells the client that the command has taken n bytes of stdin. A Run must.
func Ack(out *agent.FrameWriter, n int) error {
	return out.Write(agent.FrameStdinAck, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

func (f *Fake) begin(ctx context.Context, op, name string, p shed.Progress) error {
	if f.Before == nil {
		return nil
	}
	return f.Before(ctx, op, name, p)
}

// update runs change on the shed called name and returns a copy.
func (f *Fake) update(name string, change func(*shed.Shed) error) (*shed.Shed, error) {
	if err := shed.ValidateName(name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, sh := range f.sheds {
		if sh.Name == name {
			if err := change(sh); err != nil {
				return nil, err
			}
			c := *sh
			return &c, nil
		}
	}
	return nil, shed.Errorf(shed.CodeNotFound, "there is no shed %q", name)
}

func (f *Fake) Create(ctx context.Context, opts shed.CreateOptions, p shed.Progress) (*shed.Shed, error) {
	if err := f.begin(ctx, "create", opts.Name, p); err != nil {
		return nil, err
	}
	if err := shed.ValidateName(opts.Name); err != nil {
		return nil, err
	}
	if _, err := f.Get(ctx, opts.Name); err == nil {
		return nil, shed.Errorf(shed.CodeExists, "there is a shed %q already", opts.Name).WithHint("delete it, or take another name")
	}
	sh := shed.Shed{
		Name: opts.Name, Backend: opts.Backend, Status: shed.StatusRunning, Image: opts.Image,
		CPUs: opts.CPUs, MemoryMB: opts.MemoryMB, UpperSize: opts.UpperSize, DiskUsed: 3 << 20,
		Repo: opts.Repo, Workspace: "/home/shed", CreatedAt: Created,
	}
	f.Add(sh)
	return &sh, nil
}

func (f *Fake) List(ctx context.Context) ([]*shed.Shed, error) {
	if err := f.begin(ctx, "list", "", nil); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []*shed.Shed
	for _, sh := range f.sheds {
		c := *sh
		list = append(list, &c)
	}
	return list, nil
}

func (f *Fake) Get(ctx context.Context, name string) (*shed.Shed, error) {
	if err := f.begin(ctx, "get", name, nil); err != nil {
		return nil, err
	}
	return f.update(name, func(*shed.Shed) error { return nil })
}

func (f *Fake) Start(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	if err := f.begin(ctx, "start", name, p); err != nil {
		return nil, err
	}
	return f.update(name, func(sh *shed.Shed) error {
		sh.Status, sh.Reason = shed.StatusRunning, ""
		return nil
	})
}

func (f *Fake) Stop(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	if err := f.begin(ctx, "stop", name, p); err != nil {
		return nil, err
	}
	return f.update(name, func(sh *shed.Shed) error {
		sh.Status = shed.StatusStopped
		return nil
	})
}

func (f *Fake) Reset(ctx context.Context, name string) (*shed.Shed, error) {
	if err := f.begin(ctx, "reset", name, nil); err != nil {
		return nil, err
	}
	return f.update(name, func(sh *shed.Shed) error {
		if sh.Status != shed.StatusStopped {
			return shed.Errorf(shed.CodeConflict, "%s is %s", name, sh.Status).WithHint("stop it first: shed stop %s", name)
		}
		return nil
	})
}

func (f *Fake) Delete(ctx context.Context, name string, p shed.Progress) error {
	if err := f.begin(ctx, "delete", name, p); err != nil {
		return err
	}
	if _, err := f.update(name, func(*shed.Shed) error { return nil }); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sheds = slices.DeleteFunc(f.sheds, func(sh *shed.Shed) bool { return sh.Name == name })
	return nil
}

func (f *Fake) Logs(ctx context.Context, name string, follow bool) (io.ReadCloser, error) {
	if _, err := f.Get(ctx, name); err != nil {
		return nil, err
	}
	return f.Log(ctx, follow), nil
}

func (f *Fake) Exec(ctx context.Context, name string, cmd shed.Command) (net.Conn, error) {
	if err := f.begin(ctx, "exec", name, nil); err != nil {
		return nil, err
	}
	if _, err := f.Start(ctx, name, nil); err != nil {
		return nil, err
	}
	host, guest := net.Pipe()
	f.commands.Go(func() {
		defer guest.Close()
		out := agent.NewFrameWriter(guest)
		status := f.Run(cmd, agent.NewFrameReader(guest), out)
		if b, err := json.Marshal(status); err == nil {
			out.Write(agent.FrameExit, b)
		}
	})
	return host, nil
}

func (f *Fake) Dial(ctx context.Context, name string, to shed.Endpoint) (net.Conn, error) {
	if err := f.reach(ctx, "dial", name, to); err != nil {
		return nil, err
	}
	if to.Network != "accepted" {
		return f.Connect(ctx, to)
	}
	conn, err := f.accepted.Take(to.Address)
	if err != nil {
		return nil, shed.Errorf(shed.CodeConnect, "in shed %q: %w", name, err)
	}
	return conn, nil
}

func (f *Fake) Listen(ctx context.Context, name string, on shed.Endpoint) (net.Conn, error) {
	if err := f.reach(ctx, "listen", name, on); err != nil {
		return nil, err
	}
	l, err := f.Bind(ctx, on)
	if err != nil {
		return nil, shed.Errorf(shed.CodeConnect, "in shed %q: %w", name, err)
	}
	host, guest := net.Pipe()
	f.commands.Go(func() { f.accepted.Serve(guest, l) })
	return host, nil
}

func (f *Fake) reach(ctx context.Context, op, name string, at shed.Endpoint) error {
	if err := f.begin(ctx, op, name, nil); err != nil {
		return err
	}
	if err := at.Validate(); err != nil {
		return err
	}
	if at.NoStart {
		_, err := f.update(name, func(sh *shed.Shed) error {
			if sh.Status != shed.StatusRunning {
				return shed.Errorf(shed.CodeConflict, "shed %q is %s", name, sh.Status)
			}
			return nil
		})
		return err
	}
	_, err := f.Start(ctx, name, nil)
	return err
}
