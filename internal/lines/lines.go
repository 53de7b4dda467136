// Package lines takes what a program says: it passes it on line by line, and keeps the end for an error.
package lines

import (
	"bytes"
	"io"
	"strings"
	"sync"
)

// longest is where a line is cut that doesn't end, in bytes.
const longest = 64 << 10

// Lines are those of a program's output, whitespace at their ends cut off and empty ones left out. A carriage return ends
// a line too, as progress meters write it.
type Lines struct {
	most    int
	report  func(string)
	writers []*writer

	mu   sync.Mutex
	last []string
}

// New returns Lines that keep the last of them, as many as most. report, unless it is nil, is called with each line, once at
// a time.
func New(most int, report func(string)) *Lines { return &Lines{most: most, report: report} }

// Writer returns a writer for one of the program's streams. It never fails.
func (l *Lines) Writer() io.Writer {
	w := &writer{to: l}
	l.writers = append(l.writers, w)
	return w
}

// Last returns the last lines. It is for when nothing is written any more.
func (l *Lines) Last() string {
	for _, w := range l.writers {
		w.Write([]byte("\n"))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.last, "\n")
}

func (l *Lines) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.report != nil {
		l.report(line)
	}
	l.last = append(l.last, line)
	if len(l.last) > l.most {
		l.last = l.last[1:]
	}
}

type writer struct {
	to      *Lines
	partial []byte
}

func (w *writer) Write(b []byte) (int, error) {
	w.partial = append(w.partial, b...)
	for {
		i := bytes.IndexAny(w.partial, "\r\n")
		rest := i + 1
		if i < 0 && len(w.partial) > longest {
			i, rest = longest, longest
		}
		if i < 0 {
			return len(b), nil
		}
		if line := strings.TrimSpace(string(w.partial[:i])); line != "" {
			w.to.add(line)
		}
		w.partial = w.partial[rest:]
	}
}
