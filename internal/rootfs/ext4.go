package rootfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/charliek/shed"
)

// errConverted is what writing of the tar fails with when nobody reads it any more.
var errConverted = errors.New("the conversion has ended")

// writeImage writes to f the file system of the tar that produce writes, in at most limit bytes. The tar
// must be one of a tarWriter.
func writeImage(f *os.File, limit int64, produce func(io.Writer) error) error {
	pr, pw := io.Pipe()
	produced := make(chan error, 1)
	go func() {
		buf := bufio.NewWriterSize(pw, 1<<20)
		err := produce(buf)
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err)
		produced <- err
	}()

	out := &sparseWriter{f: f}
	err := tarToExt4(bufio.NewReaderSize(pr, 1<<20), out, limit)
	if err == nil {
		// The end of the tar ends the conversion, not what produces it.
		_, err = io.Copy(io.Discard, pr)
	}
	pr.CloseWithError(errConverted)
	if perr := <-produced; perr != nil && !errors.Is(perr, errConverted) {
		return perr
	}
	if err != nil {
		return fmt.Errorf("converting to ext4: %w", err)
	}
	if err := out.finish(); err != nil {
		return err
	}
	return padInodeBitmaps(f)
}

// tarToExt4 returns CodeInvalid for what the library can't convert, some of which it reports by a panic.
func tarToExt4(r io.Reader, w io.ReadWriteSeeker, limit int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = invalid("%v", p)
		}
	}()
	err = tar2ext4.ConvertTarToExt4(r, w, tar2ext4.MaximumDiskSize(limit))
	if pathErr := (*fs.PathError)(nil); err != nil && !errors.As(err, &pathErr) {
		err = shed.Errorf(shed.CodeInvalid, "%w", err)
	}
	return err
}
