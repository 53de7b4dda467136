//go:build linux

package guest

import (
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runShutdown ends the machine: every process is killed, every file system
// unmounted. It is run by PID 1, either by systemd-shutdown, which has moved the system's
// root to /oldroot and gives the verb as the first argument, or by our own init.
func runShutdown(args []string) error {
	killAll()
	unix.Sync()
	unmountAll()
	unix.Sync()
	cmd := unix.LINUX_REBOOT_CMD_POWER_OFF
	if len(args) > 0 && (args[0] == "reboot" || args[0] == "kexec") {
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	}
	return unix.Reboot(cmd)
}

// killLimit is how long killed processes may take to end. One that waits for a device can't.
const killLimit = 10 * time.Second

// killAll kills every process but this one, PID 1, and waits for them. What they have written is on disk
// before that, however it goes on.
func killAll() {
	unix.Sync()
	unix.Kill(-1, unix.SIGKILL)
	awaitChildren(killLimit)
}

// awaitChildren returns when this process has no more children, or after limit.
func awaitChildren(limit time.Duration) {
	for end := time.Now().Add(limit); time.Now().Before(end); {
		switch pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); {
		case err == unix.ECHILD:
			return
		case pid == 0:
			time.Sleep(devicePoll)
		}
	}
}

// oldRoot is where systemd-shutdown has put the system's root.
const oldRoot = "/oldroot"

// unmountAll unmounts all that is below systemd-shutdown's old root, the last mounted first.
// Some can be unmounted only after others.
func unmountAll() {
	const rounds = 10
	for round := range rounds {
		busy := false
		for _, m := range slices.Backward(mountsOf("/proc/self/mountinfo")) {
			if m.target != oldRoot && !strings.HasPrefix(m.target, oldRoot+"/") {
				continue
			}
			if err := unix.Unmount(m.target, 0); err != nil {
				busy = true
				if round == rounds-1 {
					logf("unmounting %s: %v", m.target, err)
				}
			}
		}
		if !busy {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// mountsOf reads the mounts from a file in the format of proc(5)'s mountinfo.
func mountsOf(file string) []mount {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	return parseMounts(string(b))
}

func parseMounts(mountinfo string) []mount {
	var mounts []mount
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		// What is no space here is part of a name: the kernel escapes spaces in names.
		head, tail := strings.Split(before, " "), strings.Split(after, " ")
		if !ok || len(head) < 5 || len(tail) < 2 {
			continue
		}
		mounts = append(mounts, mount{source: tail[1], target: unescapeMount.Replace(head[4]), fstype: tail[0]})
	}
	return mounts
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
