package state

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// unreadable makes dir one that can be written to and can't be opened, until the function that is returned is
// called. So it can't be synced.
func unreadable(t *testing.T, dir string) (restore func()) {
	t.Helper()
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // of this thread
	var caps, fewer [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	fewer = caps
	fewer[0].Effective &^= 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH // or root may do all
	if err := errors.Join(unix.Capset(&header, &fewer[0]), os.Chmod(dir, 0o300)); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(unix.Capset(&header, &caps[0]), os.Chmod(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
		runtime.UnlockOSThread()
	}
}

func TestSaveThatFailsLeavesTheRecord(t *testing.T) {
	d := openDir(t, t.TempDir())
	create(t, d, record("web"))
	second := record("web")
	second.Phase = Deleting
	restore := unreadable(t, d.Shed("web"))
	err := d.Save(second)
	restore()
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v", err)
	}
	if records, damaged := load(t, d); len(damaged) != 0 || !reflect.DeepEqual(records, []Record{record("web")}) {
		t.Errorf("%+v, %+v", records, damaged)
	}
	if left, err := filepath.Glob(d.Shed("web") + "/.tmp-*"); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	d := openDir(t, t.TempDir())
	restore := unreadable(t, d.Path("sheds"))
	err := d.Create(record("web"))
	restore()
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v", err)
	}
	create(t, d, record("web"))
}
