package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/charliek/shed"
)

// item is a part of a phase that goes on beside others, such as a layer.
type item struct {
	phase, name string
	message     string
	// counted is when the first count came, and before what it was: all of it may
	// be older than this operation.
	counted                time.Time
	before, current, total int64
	unit                   string
	start                  time.Time
}

// items are the parts that are under way, oldest first.
type items []*item

// update takes in e, which is about an item. It returns the item, and whether e begins it.
func (s *items) update(e shed.Event) (it *item, begins bool) {
	i := slices.IndexFunc(*s, func(it *item) bool { return it.phase == e.Phase && it.name == e.Item })
	if i < 0 {
		i, begins = len(*s), true
		*s = append(*s, &item{phase: e.Phase, name: e.Item, start: time.Now()})
	}
	it = (*s)[i]
	if e.Message != "" {
		it.message = oneLine(e.Message)
	}
	if e.Current > 0 || e.Total > 0 {
		if it.counted.IsZero() {
			it.counted, it.before = time.Now(), e.Current
		}
		it.current, it.total, it.unit = e.Current, e.Total, e.Unit
	}
	if e.Done {
		*s = slices.Delete(*s, i, i+1)
	}
	return it, begins
}

// end forgets what is left of a phase that has ended.
func (s *items) end(phase string) {
	*s = slices.DeleteFunc(*s, func(it *item) bool { return it.phase == phase })
}

// title names the item. A digest is cut to what tells it from others.
func (it *item) title() string {
	title := oneLine(it.name)
	if strings.HasPrefix(title, "sha256:") {
		title = shortDigest(title)
	}
	if it.message != "" {
		title += ": " + it.message
	}
	return title
}

// summary says what an item that has ended was, and how long it took.
func (it *item) summary() (line string, took time.Duration) {
	line = it.title()
	if n := it.amount(it.current); n != "" {
		line += "  " + n
	}
	return line, time.Since(it.start)
}

func (it *item) amount(n int64) string {
	if n <= 0 {
		return ""
	}
	if it.unit == "bytes" {
		return byteSize(n)
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", n, oneLine(it.unit)))
}

const (
	barCells  = 20
	titleWide = len("sha256:") + 12
)

// line shows an item that is under way in width cells.
func (it *item) line(width int) string {
	line := fmt.Sprintf("%-*s", titleWide, it.title())
	if it.total > 0 && width >= titleWide+barCells+40 {
		full := int(barCells * min(max(it.current, 0), it.total) / it.total)
		line += "  [" + strings.Repeat("#", full) + strings.Repeat(" ", barCells-full) + "]"
	}
	if it.total > 0 && it.unit == "bytes" {
		line += "  " + byteSize(it.current) + " / " + byteSize(it.total)
	} else if it.total > 0 {
		line += fmt.Sprintf("  %d / %s", it.current, it.amount(it.total))
	} else if n := it.amount(it.current); n != "" {
		line += "  " + n
	}
	if elapsed := time.Since(it.counted); it.unit == "bytes" && elapsed >= time.Second && it.current > it.before {
		line += "  " + byteSize(int64(float64(it.current-it.before)/elapsed.Seconds())) + "/s"
	}
	return truncate(strings.TrimRight(line, " "), width)
}

// lines shows the items in at most height lines.
func (s items) lines(width, height int) []string {
	show, rest := s, 0
	if len(s) > max(height, 0) {
		show = s[:max(height-1, 0)]
		rest = len(s) - len(show)
	}
	var lines []string
	for _, it := range show {
		lines = append(lines, it.line(width))
	}
	if rest > 0 && height > 0 {
		lines = append(lines, truncate(fmt.Sprintf("and %d more", rest), width))
	}
	return lines
}
