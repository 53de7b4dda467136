//go:build linux

package proclock

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const patience = 5 * time.Second

// takeEnv names a file that a process of its own is to take the lock on.
const takeEnv = "SHED_TEST_TAKE"

func TestMain(m *testing.M) {
	if file := os.Getenv(takeEnv); file != "" {
		unix.Close(FD) // the next file could get that
		lock, err := Take(file, patience)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("taken")
		time.Sleep(time.Hour)
		lock.Close()
	}
	os.Exit(m.Run())
}

// start starts a process that runs until it is killed, which the test does in its end.
func start(t *testing.T, lock *os.File) *Process {
	t.Helper()
	p, err := Start(exec.Command("sleep", "infinity"), lock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, p) })
	return p
}

func end(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Kill(); err != nil {
		t.Error(err)
	}
	<-p.Ended()
}

func take(t *testing.T, file string) *os.File {
	t.Helper()
	lock, err := Take(file, patience)
	if err != nil {
		t.Fatal(err)
	}
	return lock
}

func checkHeld(t *testing.T, file string, want bool) {
	t.Helper()
	if held, err := Held(file); held != want || err != nil {
		t.Errorf("Held: %v, %v; want %v", held, err, want)
	}
}

// Only the process that has the lock is found, not one that has its file open as the same descriptor.
func TestFind(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	checkHeld(t, file, false)
	lock := take(t, file)
	defer lock.Close()
	checkHeld(t, file, true)
	unlocked, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer unlocked.Close()
	other := start(t, unlocked)
	child := start(t, lock)
	lock.Close()
	checkHeld(t, file, true)
	if _, err := Take(file, 0); !errors.Is(err, ErrHeld) {
		t.Errorf("Take: %v, want ErrHeld", err)
	}

	found, err := Find(file, patience)
	if err != nil || found.PID() != child.PID() {
		t.Fatalf("Find: %+v, %v; want process %d", found, err, child.PID())
	}
	select {
	case <-found.Ended():
		t.Error("it runs, and Ended says that it doesn't")
	default:
	}
	end(t, found)
	<-child.Ended()
	checkHeld(t, file, false)
	if _, err := Find(file, patience); !errors.Is(err, ErrNotHeld) {
		t.Errorf("Find after the end: %v, want ErrNotHeld", err)
	}
	for _, p := range []*Process{child, found} {
		if err := p.Kill(); err != nil {
			t.Errorf("Kill after the end: %v", err)
		}
	}
	select {
	case <-other.Ended():
		t.Error("another process was killed")
	default:
	}
	take(t, file).Close()
}

// A lock that somebody holds otherwise than by inheritance isn't taken for nobody's, nor for that of who
// has only taken it.
func TestHolderCannotBeFound(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	// A process that is about to start another.
	starter := exec.Command(os.Args[0])
	starter.ExtraFiles = []*os.File{os.Stdin} // FD
	starter.Env = append(os.Environ(), takeEnv+"="+file)
	starter.Stderr = os.Stderr
	out, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		starter.Process.Kill()
		starter.Wait()
	}()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the lock was not taken: %v", err)
	}
	if p, err := Find(file, 0); err == nil || errors.Is(err, ErrNotHeld) {
		t.Errorf("Find: %+v, %v", p, err)
	}
}

// Who looks for a lock must not keep another from taking it.
func TestLookingWhileTaking(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	looking, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(looking.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	checkHeld(t, file, false)
	time.AfterFunc(10*time.Millisecond, func() { looking.Close() })
	take(t, file).Close()
}

// That it can't be told isn't taken for no.
func TestErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	if err := os.Symlink(file, file); err != nil { // a loop
		t.Fatal(err)
	}
	if held, err := Held(file); err == nil {
		t.Errorf("Held: %v, and no error", held)
	}
	if _, err := Find(file, patience); err == nil || errors.Is(err, ErrNotHeld) {
		t.Errorf("Find: %v", err)
	}
	if _, err := Take(file, patience); err == nil || errors.Is(err, ErrHeld) {
		t.Errorf("Take: %v", err)
	}
}
