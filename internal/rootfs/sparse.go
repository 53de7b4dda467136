package rootfs

import (
	"bytes"
	"errors"
	"io"
	"os"
)

const blockSize = 4096

// sparseWriter writes a file front to back, with holes where whole blocks are
// zero. It can go back to read or change what it wrote.
type sparseWriter struct {
	f   *os.File
	pos int64
	end int64 // of all that was written; beyond it the file is a hole

	writeback int64 // where what the kernel was told to write to the disk ends
}

// writebackStep is how much is written, in bytes, before the disk begins with it.
const writebackStep = 16 << 20

func (w *sparseWriter) Write(p []byte) (n int, err error) {
	if w.end-w.writeback >= writebackStep && w.pos == w.end {
		startWriteback(w.f, w.writeback, w.end-w.writeback)
		w.writeback = w.end
	}
	for len(p) > 0 {
		chunk := p
		// Only what was never written may be skipped. A zero block that
		// replaces another one has to be written.
		if w.pos >= w.end && w.pos%blockSize == 0 {
			zero := zeroBlocks(p)
			w.pos += int64(zero)
			w.end = max(w.end, w.pos)
			n += zero
			p = p[zero:]
			chunk = p[:dataBlocks(p)]
		}
		m, err := w.f.WriteAt(chunk, w.pos)
		w.pos += int64(m)
		w.end = max(w.end, w.pos)
		n += m
		if err != nil {
			return n, err
		}
		p = p[m:]
	}
	return n, nil
}

var zeroBlock [blockSize]byte

// zeroBlocks returns the length of the whole zero blocks that p starts with.
func zeroBlocks(p []byte) int {
	n := 0
	for len(p)-n >= blockSize && bytes.Equal(p[n:n+blockSize], zeroBlock[:]) {
		n += blockSize
	}
	return n
}

// dataBlocks returns how much of p comes before its next whole zero block.
func dataBlocks(p []byte) int {
	for n := 0; len(p)-n >= blockSize; n += blockSize {
		if bytes.Equal(p[n:n+blockSize], zeroBlock[:]) {
			return n
		}
	}
	return len(p)
}

func (w *sparseWriter) Read(p []byte) (int, error) {
	n, err := w.f.ReadAt(p, w.pos)
	w.pos += int64(n)
	return n, err
}

func (w *sparseWriter) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += w.pos
	case io.SeekEnd:
		offset += w.end
	}
	if offset < 0 {
		return 0, errors.New("seek to before the start of the file")
	}
	w.pos = offset
	return offset, nil
}

// finish gives the file its length, which a hole at its end does not.
func (w *sparseWriter) finish() error { return w.f.Truncate(w.end) }
