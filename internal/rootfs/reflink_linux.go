package rootfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// reflink makes dst share all blocks of src. File systems that can't do it, and
// two different ones, return an error and leave dst as it was.
func reflink(dst, src *os.File) error {
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
}
