//go:build linux

// Package vmtest checks that a driver does what vm.Driver and vm.Machine promise. It
// boots real machines, with a guest of its own that says what it sees.
package vmtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/vmtest/guest"
)

// suite is what the checks have in common.
type suite struct {
	newDriver      func(testing.TB) vm.Driver
	test           string // matches the test that runs the suite
	kernel, initrd string
}

// Run runs the suite. Drivers that newDriver returns must share nothing but what is in the
// machines' directories, as if each were in a process of its own.
func Run(t *testing.T, newDriver func(testing.TB) vm.Driver) {
	if request := os.Getenv(startEnv); request != "" {
		startAndLeave(t, newDriver(t), request)
	}
	if os.Getenv("SHED_TEST_BUILD") != "1" {
		t.Skip("NOT TESTED: SHED_TEST_BUILD=1 is not set: it boots machines, and downloads their kernel if need be")
	}
	s := &suite{newDriver: newDriver, test: "^" + strings.ReplaceAll(regexp.QuoteMeta(t.Name()), "/", "$/^") + "$"}
	s.kernel, s.initrd = bootFiles(t)
	for name, check := range map[string]func(*testing.T){
		"Machine":       s.machine,
		"Restart":       s.restart,
		"Panic":         s.panic,
		"Kill":          s.kill,
		"StarterKilled": s.starterKilled,
		"GuestLeaves":   s.guestLeaves,
		"NotRunning":    s.notRunning,
		"StartFails":    s.startFails,
		"StartCanceled": s.startCanceled,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check(t)
		})
	}
}

// spec is a machine without disks and network, whose console is in dir.
func (s *suite) spec(dir string) vm.Spec {
	return vm.Spec{CPUs: 1, MemoryMB: 256, Kernel: s.kernel, Initrd: s.initrd, Console: filepath.Join(dir, "console.log")}
}

// dirs returns a machine's directory and one for other files.
func dirs(t *testing.T) (machine, files string) {
	t.Helper()
	root := t.TempDir()
	// Longer than the address of a socket can be.
	machine = filepath.Join(root, strings.Repeat("d", 100), strings.Repeat("d", 100))
	files = filepath.Join(root, "some files, and a=b")
	for _, dir := range []string{machine, files} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return machine, files
}

// machine checks what is in a machine with as many devices as there can be, which another
// process has started, until it turns itself off.
func (s *suite) machine(t *testing.T) {
	dir, files := dirs(t)
	d := s.newDriver(t)
	spec := s.spec(files)
	spec.CPUs, spec.MemoryMB, spec.MAC = 2, 300, "5a:94:ef:e4:0c:ee"
	for i := range d.Features().MaxDisks {
		disk := vm.Disk{Path: filepath.Join(files, fmt.Sprintf("disk%d.img", i)), ReadOnly: i%3 == 1}
		content := make([]byte, (i+1)<<20)
		copy(content, fmt.Sprintf("this is disk %d", i))
		if err := os.WriteFile(disk.Path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		spec.Disks = append(spec.Disks, disk)
	}
	m, l := s.bootElsewhere(t, d, dir, spec)

	if contains(t, spec.Console, "Fatal") {
		t.Errorf("the boot logs an error:\n%s", vm.LastLines(spec.Console, 0, 20))
	}
	facts := l.look(t)
	start := time.Now()
	least, most := l.ahead(t, start)
	if facts.CPUs != 2 {
		t.Errorf("%d CPUs, want 2", facts.CPUs)
	}
	if facts.MemoryMB > 300 || facts.MemoryMB < 200 {
		t.Errorf("%d MB of memory, want 300 less what the kernel takes", facts.MemoryMB)
	}
	if !slices.Equal(facts.MACs, []string{spec.MAC}) {
		t.Errorf("network cards %v, want %s", facts.MACs, spec.MAC)
	}
	checkDisks(t, l, spec, facts)

	marker := "a line for the console"
	l.must(t, guest.Request{Op: guest.Log, Data: []byte(marker + "\n")})
	for !contains(t, spec.Console, marker) {
		time.Sleep(time.Millisecond)
	}

	for range 3 {
		l.Close()
		l = relink(t, m)
		if again := l.look(t); again.BootID != facts.BootID {
			t.Fatal("the machine was started again")
		}
	}
	l.Close()
	checkCutLink(t, m)
	l = relink(t, m)
	l.must(t, guest.Request{Op: guest.Frames})
	for range 2 { // one connection after the other
		checkNetwork(t, m)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if exit, err := m.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait while it runs: %+v, %v", exit, err)
	}
	checkRunning(t, d, dir, true)
	checkRunning(t, s.newDriver(t), dir, true)
	checkHostShutdown(t, dir, m)

	least2, most2 := l.ahead(t, start)
	tolerated := time.Since(start) / 100
	if most2-least < -tolerated || least2-most > tolerated {
		t.Errorf("within %v, the guest's clock got ahead of the host's by %v to %v", time.Since(start), least2-most, most2-least)
	}
	l.send(t, guest.Request{Op: guest.PowerOff})
	checkEnded(t, d, dir, m, vm.PowerOff)
	<-l.Done()
}

// checkDisks wants the disks in their order, with their sizes and contents, and what is
// read-only to stay as it is.
func checkDisks(t *testing.T, l *link, spec vm.Spec, facts guest.Facts) {
	t.Helper()
	if len(facts.Disks) != len(spec.Disks) {
		t.Fatalf("%d disks, want %d", len(facts.Disks), len(spec.Disks))
	}
	for i, disk := range spec.Disks {
		want := guest.Disk{Name: "vd" + string(rune('a'+i)), Size: int64(i+1) << 20, ReadOnly: disk.ReadOnly}
		if facts.Disks[i] != want {
			t.Errorf("disk %d is %+v, want %+v", i, facts.Disks[i], want)
			continue
		}
		content := fmt.Sprintf("this is disk %d", i)
		if got := l.must(t, guest.Request{Op: guest.Read, Disk: want.Name, Length: len(content)}); string(got.Data) != content {
			t.Errorf("%s begins with %q, want %q", want.Name, got.Data, content)
		}
		// At the end, so that all of it is there.
		data := []byte("the guest was here")
		offset := want.Size - int64(len(data))
		reply := l.ask(t, guest.Request{Op: guest.Write, Disk: want.Name, Offset: offset, Data: data})
		if (reply.Error != "") != disk.ReadOnly {
			t.Errorf("writing to %s, read-only %v: error %q", want.Name, disk.ReadOnly, reply.Error)
		}
		b, err := os.ReadFile(disk.Path)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(b)) != want.Size || bytes.HasSuffix(b, data) == disk.ReadOnly {
			t.Errorf("the file of %s, read-only %v, has %d bytes and ends with %q", want.Name, disk.ReadOnly, len(b), b[offset:])
		}
	}
}

func contains(t *testing.T, file, text string) bool {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(b, []byte(text))
}

// checkCutLink breaks off a connection with data on its way in both directions.
func checkCutLink(t *testing.T, m vm.Machine) {
	t.Helper()
	l := relink(t, m)
	stream := l.send(t, guest.Request{Op: guest.Echo})
	var reply guest.Reply
	if err := agent.ReadMessage(stream, &reply); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := stream.Write(make([]byte, 100_000)); err != nil {
				return
			}
		}
	})
	if _, err := io.CopyN(io.Discard, stream, 1<<20); err != nil {
		t.Errorf("the link ended while it was in use: %v", err)
	}
	l.conn.Close()
	wg.Wait()
}

// checkNetwork sends frames to the guest, which sends them back.
func checkNetwork(t *testing.T, m vm.Machine) {
	t.Helper()
	conn, err := m.DialNetwork(t.Context())
	if err != nil {
		t.Fatalf("DialNetwork: %v", err)
	}
	defer conn.Close()
	for _, size := range []int{60, 1514} {
		frame := make([]byte, size)
		copy(frame, "\xff\xff\xff\xff\xff\xff\x5a\x94\xef\x00\x00\x01")
		binary.BigEndian.PutUint16(frame[12:], guest.EtherType)
		copy(frame[14:], fmt.Sprintf("%p", conn))
		if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(size)), frame...)); err != nil {
			t.Fatalf("sending a frame: %v", err)
		}
		for {
			got, err := readFrame(conn)
			if err != nil {
				t.Fatalf("receiving a frame: %v", err)
			}
			if bytes.Equal(got, frame) {
				break
			}
		}
	}
}

func readFrame(conn net.Conn) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > 1<<16 {
		return nil, fmt.Errorf("a frame of %d bytes", n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(conn, b)
	return b, err
}

func checkRunning(t *testing.T, d vm.Driver, dir string, want bool) {
	t.Helper()
	if got, err := d.Running(dir); got != want || err != nil {
		t.Errorf("Running: %v, %v; want %v", got, err, want)
	}
}

// checkEnded waits for a machine's end and checks what holds then.
func checkEnded(t *testing.T, d vm.Driver, dir string, m vm.Machine, causes ...vm.Cause) {
	t.Helper()
	for range 2 {
		if exit, err := m.Wait(t.Context()); err != nil || !slices.Contains(causes, exit.Cause) {
			t.Errorf("Wait: %+v, %v; want %v", exit, err, causes)
		}
	}
	if err := m.Kill(); err != nil {
		t.Errorf("Kill after the end: %v", err)
	}
	if conn, err := m.DialLink(t.Context()); err == nil {
		conn.Close()
		t.Error("DialLink works after the end")
	}
	checkRunning(t, d, dir, false)
	if _, err := d.Find(t.Context(), dir); !errors.Is(err, vm.ErrNotRunning) {
		t.Errorf("Find after the end: %v, want ErrNotRunning", err)
	}
}

// restart checks a reboot, and that a directory can be used again after each end.
func (s *suite) restart(t *testing.T) {
	dir, files := dirs(t)
	d := s.newDriver(t)
	spec := s.spec(files)
	bad := spec
	bad.Kernel += ".none"
	if _, err := d.Start(t.Context(), dir, bad); err == nil {
		t.Fatal("a machine without a kernel started")
	}
	m, l := boot(t, d, dir, spec)
	first := l.look(t).BootID
	marker := "from the first boot"
	l.must(t, guest.Request{Op: guest.Log, Data: []byte(marker + "\n")})
	l.send(t, guest.Request{Op: guest.Reboot})
	checkEnded(t, d, dir, m, vm.Reboot)

	m, l = boot(t, d, dir, spec)
	if l.look(t).BootID == first {
		t.Error("it was not booted again")
	}
	if !contains(t, spec.Console, marker) {
		t.Error("the console of the first boot is gone")
	}
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	checkEnded(t, d, dir, m, vm.Killed)
}

// panic checks that a kernel that gives up ends its machine. A monitor may not be able to tell this
// from a reboot.
func (s *suite) panic(t *testing.T) {
	dir, files := dirs(t)
	d := s.newDriver(t)
	spec := s.spec(files)
	m, l := boot(t, d, dir, spec)
	l.send(t, guest.Request{Op: guest.Panic})
	checkEnded(t, d, dir, m, vm.Panic, vm.Reboot)
	if !contains(t, spec.Console, "Kernel panic") {
		t.Error("the console says nothing of a panic")
	}
}

// kill checks that machines are ended one by one, whoever started them.
func (s *suite) kill(t *testing.T) {
	d := s.newDriver(t)
	dir, files := dirs(t)
	m, l := boot(t, d, dir, s.spec(files))
	otherDir, otherFiles := dirs(t)
	other, otherLink := s.bootElsewhere(t, d, otherDir, s.spec(otherFiles))

	// A machine may be in somebody's hands: then it is found, or the wait for it ends.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.newDriver(t).Find(ctx, dir); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Find while another has it: %v", err)
	}
	if _, err := s.newDriver(t).Start(t.Context(), dir, s.spec(files)); err == nil {
		t.Error("a second machine started where one runs")
	}
	l.look(t)

	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if exit, err := m.Wait(t.Context()); err != nil || exit.Cause != vm.Killed {
				t.Errorf("Wait during a Kill: %+v, %v", exit, err)
			}
		})
		wg.Go(func() {
			if err := m.Kill(); err != nil {
				t.Errorf("Kill: %v", err)
			}
			checkRunning(t, d, dir, false)
		})
	}
	wg.Wait()
	checkEnded(t, d, dir, m, vm.Killed)

	otherLink.look(t) // this one lives
	if err := other.Kill(); err != nil {
		t.Errorf("Kill: %v", err)
	}
	checkEnded(t, d, otherDir, other, vm.Killed)
}

// guestLeaves checks that the end of a guest's agent is noticed, while its machine runs on.
func (s *suite) guestLeaves(t *testing.T) {
	d := s.newDriver(t)
	dir, files := dirs(t)
	m, l := s.bootElsewhere(t, d, dir, s.spec(files))
	l.send(t, guest.Request{Op: guest.Leave})
	<-l.Done()
	for range 2 {
		conn, err := m.DialLink(t.Context())
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, vm.ErrLinkClosed) {
			t.Errorf("DialLink: %v, want ErrLinkClosed", err)
		}
	}
	checkRunning(t, d, dir, true)
}

func (s *suite) notRunning(t *testing.T) {
	d := s.newDriver(t)
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		checkRunning(t, d, dir, false)
		if m, err := d.Find(t.Context(), dir); !errors.Is(err, vm.ErrNotRunning) {
			t.Errorf("Find: %v, %v; want ErrNotRunning", m, err)
		}
	}
}

// startFails checks that an error says what the monitor said.
func (s *suite) startFails(t *testing.T) {
	d := s.newDriver(t)
	for name, tt := range map[string]struct {
		change func(*vm.Spec)
		want   string
	}{
		"no kernel": {func(spec *vm.Spec) { spec.Kernel = "/none/kernel" }, "/none/kernel"},
		"no initrd": {func(spec *vm.Spec) { spec.Initrd = "/none/initrd" }, "/none/initrd"},
		"no disk":   {func(spec *vm.Spec) { spec.Disks = []vm.Disk{{Path: "/none/disk"}} }, "/none/disk"},
		"no memory": {func(spec *vm.Spec) { spec.MemoryMB = 1 << 30 }, "memory"},
		"no place for the console": {
			func(spec *vm.Spec) { spec.Console = "/none/console" }, "/none/console",
		},
	} {
		dir, files := dirs(t)
		spec := s.spec(files)
		tt.change(&spec)
		m, err := d.Start(t.Context(), dir, spec)
		if err == nil {
			t.Errorf("%s: the machine started", name)
			m.Kill()
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %q doesn't say %q", name, err, tt.want)
		}
		checkRunning(t, d, dir, false)
		if _, err := d.Find(t.Context(), dir); !errors.Is(err, vm.ErrNotRunning) {
			t.Errorf("%s: Find: %v", name, err)
		}
	}
}

func (s *suite) startCanceled(t *testing.T) {
	dir, files := dirs(t)
	d := s.newDriver(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m, err := d.Start(ctx, dir, s.spec(files))
	if err == nil {
		m.Kill()
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v, want context.Canceled", err)
	}
	checkRunning(t, d, dir, false)
}
