package rootfs

import (
	"errors"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// nextData returns where the next data of f at or after pos is, and io.EOF if
// there is only a hole left. A file system that doesn't know holes has data throughout.
func nextData(f *os.File, pos int64) (start, end int64, err error) {
	start, err = f.Seek(pos, unix.SEEK_DATA)
	if errors.Is(err, syscall.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, err
	}
	end, err = f.Seek(start, unix.SEEK_HOLE)
	return start, end, err
}
