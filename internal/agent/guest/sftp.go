//go:build linux

package guest

import (
	"errors"
	"io"
	"os"

	"github.com/pkg/sftp"
)

const (
	// sftpName is what the agent is called where it serves files, as a process of its own with
	// the rights of a user. Not every image has a server for that.
	sftpName = "shed-sftp"
	selfExe  = "/proc/self/exe"
)

// runSFTP serves files on stdin and stdout, and doesn't return unless that fails.
func runSFTP() error {
	s, err := sftp.NewServer(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	if err != nil {
		return err
	}
	if err := s.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	os.Exit(0)
	return nil
}
