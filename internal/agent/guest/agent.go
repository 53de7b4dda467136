//go:build linux

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

const (
	agentCgroup = "/sys/fs/cgroup/shed.agent"
	userCgroup  = "/sys/fs/cgroup/shed.user"
	keptDir     = "/run/shed"

	// How long a device may take to appear, and how often to look.
	deviceTimeout = 20 * time.Second
	devicePoll    = 2 * time.Millisecond
)

// machine is the state of the agent proper.
type machine struct {
	ready   *os.File // written to when the root file system is there; closed when an init may start
	entered *os.File // has a byte when disks can be mounted, and is at EOF when PID 1 has switched to it
	cgroup  string   // that commands run in; "" means the agent's own
	kept    string   // directory of the sessions that need no tmux

	mu      sync.Mutex
	setup   *agent.Setup    // nil before the first
	network <-chan struct{} // closed when the network is up, or can't be
	envs    loginEnvs

	commands atomic.Int32 // that are being started or run
	ahead    atomic.Bool  // the clock seemed to be ahead when the host last told the time
	accepted agent.Acceptances
}

// awaitNetwork waits until the network is there, without which nothing should start that may use it.
func (m *machine) awaitNetwork() {
	m.mu.Lock()
	network := m.network
	m.mu.Unlock()
	if network != nil {
		<-network
	}
}

func runAgent() error {
	// systemd gives every process a SIGTERM at shutdown, but spares this one by its name.
	// All that ends it is the end of the machine. The signals are caught and dropped, not
	// ignored: commands would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	if err := os.WriteFile(oomFile, []byte("-1000"), 0); err != nil {
		return err
	}
	// A command that has them too would keep the init waiting.
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	m := &machine{
		ready:   os.NewFile(3, "ready"),
		entered: os.NewFile(4, "entered"),
		cgroup:  userCgroup,
		kept:    keptDir,
	}
	go m.endUserAtShutdown()
	p, err := agent.OpenPort("shed", deviceTimeout)
	if err != nil {
		return err
	}
	return agent.ServePort(p, m.handle)
}

func (m *machine) handle(s *agent.Stream) {
	defer func() {
		if r := recover(); r != nil {
			logf("a request failed: %v", r)
			s.Reset()
		}
	}()
	var req agent.Request
	if err := agent.ReadMessage(s, &req); err != nil {
		s.Reset()
		return
	}
	switch {
	case req.Exec != nil:
		m.exec(s, *req.Exec)
		return
	case req.Dial != nil:
		m.dial(s, *req.Dial)
		return
	case req.Listen != nil:
		m.listen(s, *req.Listen)
		return
	case req.Sessions != nil:
		m.listSessions(s)
		return
	}
	var err error
	switch {
	case req.Setup != nil:
		err = m.runSetup(*req.Setup)
	case req.Clock != nil:
		err = m.followClock(*req.Clock)
	case req.PowerOff != nil:
		err = m.powerOff()
	case req.KillSession != nil:
		err = m.killSession(req.KillSession.Name)
	default:
		err = errors.New("the agent doesn't know this request: it may be older than the server")
	}
	if answer(s, err) {
		s.Close()
	}
}

// answer sends the reply to a request for which err stands, and closes s unless the request goes on.
func answer(s *agent.Stream, err error) (goesOn bool) {
	var reply agent.Reply
	if err != nil {
		reply.Error = err.Error()
		var coded *shed.Error
		if errors.As(err, &coded) {
			reply.Code = coded.Code
		}
	}
	if werr := agent.WriteMessage(s, reply); werr != nil {
		s.Reset()
		return false
	}
	if err != nil {
		s.Close()
	}
	return err == nil
}

// clockLimit is how far the clock may be off before it is stepped: programs are to see no jitter.
const clockLimit = 500 * time.Millisecond

// clockIsOff says whether the clock is to be stepped to c. Where the machine was paused, what the host says may have
// been under way for long, and the clock only seem to be ahead: so that counts if it is said twice in a row. The host
// has no more than one such request under way.
func (m *machine) clockIsOff(c agent.Clock) bool {
	behind := time.Until(time.Unix(0, c.UnixNano))
	ahead := behind < -clockLimit
	before := m.ahead.Swap(ahead)
	return behind > clockLimit || ahead && before
}

// followClock steps the clock if it is off.
func (m *machine) followClock(c agent.Clock) error {
	if !m.clockIsOff(c) {
		return nil
	}
	return setClock(c)
}

func setClock(c agent.Clock) error {
	tv := unix.NsecToTimeval(c.UnixNano)
	return unix.Settimeofday(&tv)
}

// powerOff ends the sessions' processes, which might ignore what an
// init sends them, and then asks the init, whichever it is.
func (m *machine) powerOff() error {
	endUser()
	sig := unix.SIGUSR2
	if _, ok := findSystemd(); ok {
		sig = unix.Signal(34 + 4) // SIGRTMIN+4: see systemd(1)
	}
	if err := unix.Kill(1, sig); err != nil {
		return err
	}
	// An init that is only just starting drops the signal. To get it again does no harm.
	go func() {
		for {
			time.Sleep(time.Second)
			unix.Kill(1, sig)
		}
	}()
	return nil
}

// endUserAtShutdown ends the sessions' processes when the shutdown was asked for inside.
// systemd-shutdown stops and continues every process, which is all that one
// with a name like ours notices of it.
func (m *machine) endUserAtShutdown() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCONT)
	for range c {
		if comm, err := os.ReadFile("/proc/1/comm"); err == nil && strings.HasPrefix(string(comm), "systemd-shutdo") {
			endUser()
		}
	}
}

// endUser hangs up on every process that the host started, and kills those
// that are still there a little later.
func endUser() {
	procs := userCgroup + "/cgroup.procs"
	pids := func() []string {
		b, err := os.ReadFile(procs)
		if err != nil {
			return nil
		}
		return strings.Fields(string(b))
	}
	for _, s := range pids() {
		var pid int
		if _, err := fmt.Sscan(s, &pid); err == nil {
			unix.Kill(pid, unix.SIGTERM)
			unix.Kill(pid, unix.SIGHUP)
			unix.Kill(pid, unix.SIGCONT)
		}
	}
	for range 40 {
		if len(pids()) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	os.WriteFile(userCgroup+"/cgroup.kill", []byte("1"), 0)
}
