//go:build linux

package guest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func procFile(pid int, file string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), file)
}

// endTerminal ends the processes of a terminal's session, which is named by its leader: as the end of a
// terminal does, then by force.
func endTerminal(leader int) {
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGKILL} {
		for _, pid := range terminalProcesses(leader) {
			unix.Kill(pid, sig)
			unix.Kill(pid, unix.SIGCONT)
		}
		for end := time.Now().Add(hangUpGrace); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if len(terminalProcesses(leader)) == 0 {
				return
			}
		}
	}
}

// terminalProcesses returns the processes of a session that haven't ended.
func terminalProcesses(leader int) []int {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(procFile(pid, "stat"))
		if err != nil {
			continue
		}
		if session, state, ok := parseStat(string(b)); ok && session == leader && state != "Z" && state != "X" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// parseStat parses proc(5)'s stat. The name in it may be anything.
func parseStat(stat string) (session int, state string, ok bool) {
	end := strings.LastIndexByte(stat, ')')
	fields := strings.Fields(stat[end+1:])
	if end < 0 || len(fields) < 4 {
		return 0, "", false
	}
	session, err := strconv.Atoi(fields[3])
	return session, fields[0], err == nil
}
