package sshconfig

import (
	"bytes"
	"fmt"
	"slices"
)

// Diff returns the change in unified format, without lines of context: what the user has in
// the file is of no concern.
func (c Change) Diff() string {
	if !c.Changed() {
		return ""
	}
	name := func(text []byte) string {
		if text == nil {
			return "/dev/null"
		}
		return c.File
	}
	a, b := slices.Collect(bytes.Lines(c.Before)), slices.Collect(bytes.Lines(c.After))
	same := 0
	for same < len(a) && same < len(b) && bytes.Equal(a[same], b[same]) {
		same++
	}
	a, b = a[same:], b[same:]
	for len(a) > 0 && len(b) > 0 && bytes.Equal(a[len(a)-1], b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "--- %s\n+++ %s\n@@ -%s +%s @@\n", name(c.Before), name(c.After), lines(same, a), lines(same, b))
	for _, part := range []struct {
		sign  byte
		lines [][]byte
	}{{'-', a}, {'+', b}} {
		for _, line := range part.lines {
			out.WriteByte(part.sign)
			out.Write(line)
			if !bytes.HasSuffix(line, []byte("\n")) {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
	}
	return out.String()
}

// lines says which lines part is, of those that come after the first n.
func lines(n int, part [][]byte) string {
	if len(part) > 0 {
		n++
	}
	return fmt.Sprintf("%d,%d", n, len(part))
}
