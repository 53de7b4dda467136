package vm

import (
	"io"
	"os"
	"strings"
)

// LastLines returns at most the last n lines of a monitor's log or a machine's console, for an
// error to show, and "" where there is none. What comes before the offset from, in bytes, is of
// an earlier run. Carriage returns are dropped.
func LastLines(file string, from int64, n int) string {
	const tail = 16 << 10
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil {
		f.Seek(max(from, fi.Size()-tail), io.SeekStart)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
