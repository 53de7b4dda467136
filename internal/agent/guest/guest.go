//go:build linux

// Package guest is the agent: the first program in every VM. It runs in five
// roles, told apart by how it is called.
//
// As init, PID 1 of the initramfs, it makes what programs expect of a
// Linux system, starts the agent proper and, when that has assembled the root
// file system, switches to it and hands over to the image's systemd. Where
// the image has none, it stays, to reap and to power off.
//
// As agent ("@shed-agent") it answers the host. systemd takes the leading @ for
// what it says in https://systemd.io/ROOT_STORAGE_DAEMONS: not to be killed at shutdown.
//
// As sftp server ("shed-sftp") it serves files to one client, with the rights of a user.
//
// As session ("shed-session") it keeps a named terminal where the image has no tmux, or shows one.
//
// As shutdown it is what systemd-shutdown runs last, from /run/initramfs (see
// systemd's bootup(7)): it unmounts what only now can be unmounted.
package guest

import (
	"fmt"
	"os"
	"path/filepath"
)

const (
	agentName    = "@shed-agent"
	exitrdDir    = "/run/initramfs"
	exitrdBinary = exitrdDir + "/shutdown"
	sysroot      = "/sysroot"
)

// Main runs the role that the program was called in, and doesn't return.
func Main() {
	var err error
	switch {
	case os.Args[0] == agentName:
		err = runAgent()
	case os.Args[0] == sftpName:
		err = runSFTP()
	case os.Args[0] == sessionName:
		err = runSession(os.Args[1:])
	case filepath.Base(os.Args[0]) == "shutdown":
		err = runShutdown(os.Args[1:])
	case os.Getpid() == 1:
		err = runInit()
	default:
		err = fmt.Errorf("this is the agent of a shed's VM: it runs as its init only")
	}
	logf("%v", err)
	os.Exit(1)
}

// logf writes to the kernel's log, which the console shows, and where there
// is none to stderr.
func logf(format string, args ...any) {
	msg := "shed-agent: " + fmt.Sprintf(format, args...) + "\n"
	// Level 3 (error) is shown on a console that is told to be quiet.
	if f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		defer f.Close()
		if _, err := f.WriteString("<3>" + msg); err == nil {
			return
		}
	}
	os.Stderr.WriteString(msg)
}
