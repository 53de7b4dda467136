package main

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

// screen returns what a terminal of height lines shows of what was written to it, and
// fails the test if something was written over that had scrolled away.
func screen(t *testing.T, written string, width, height int) []string {
	t.Helper()
	lines, row, col, top := []string{""}, 0, 0, 0
	put := func(s string) {
		r := []rune(lines[row])
		for len(r) < col {
			r = append(r, ' ')
		}
		for _, c := range s {
			if col == width {
				t.Errorf("a line is wider than the terminal: %q", string(r))
				return
			}
			r = append(r[:col], append([]rune{c}, r[min(col+1, len(r)):]...)...)
			col++
		}
		lines[row] = string(r)
	}
	for _, token := range regexp.MustCompile("\x1b\\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+").FindAllString(written, -1) {
		n, _ := strconv.Atoi(strings.Trim(token, "\x1b[A"))
		switch {
		case token == "\r":
			col = 0
		case token == "\n":
			row, col = row+1, 0
			if row == len(lines) {
				lines = append(lines, "")
			}
			top = max(top, row-height+1)
		case strings.HasSuffix(token, "A"):
			if row -= n; row < top {
				t.Fatalf("%d lines up from line %d, where the first to be seen is %d", n, row+n, top)
			}
		case token == "\x1b[K":
			lines[row] = string([]rune(lines[row])[:min(col, len([]rune(lines[row])))])
		case token == "\x1b[J":
			lines[row] = string([]rune(lines[row])[:min(col, len([]rune(lines[row])))])
			lines = lines[:row+1]
		case token[0] == '\x1b':
			t.Fatalf("an unknown sequence %q", token)
		default:
			put(token)
		}
	}
	return lines
}

// newTestDisplay returns a display that runs, on a terminal of that size, and what that shows.
func newTestDisplay(t *testing.T, width, height int) (d *display, shown func() []string, end func()) {
	var out bytes.Buffer
	d = &display{w: &out, operation: "pull x", start: time.Now(), size: func() (int, int) { return width, height }}
	shown = func() []string {
		t.Helper()
		d.mu.Lock()
		defer d.mu.Unlock()
		return screen(t, out.String(), width, height)
	}
	return d, shown, d.run()
}

func layer(i int) string { return fmt.Sprintf("sha256:%064d", i) }

func TestDisplayItems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, shown, end := newTestDisplay(t, 100, 24)
		d.report(shed.Event{Phase: "pull", Message: "pulling"})
		d.report(shed.Event{Phase: "pull", Item: "sha256:1111111111112222222222", Current: 10 << 20, Total: 40 << 20, Unit: "bytes"})
		d.report(shed.Event{Phase: "pull", Item: "sha256:3333333333334444444444", Current: 1 << 20, Unit: "bytes"})
		d.report(shed.Event{Phase: "pull", Item: "manifest\x1b[2J", Message: "two\nlines"})
		time.Sleep(4*time.Second + refresh/2)
		d.report(shed.Event{Phase: "pull", Item: "sha256:1111111111112222222222", Current: 30 << 20, Total: 40 << 20, Unit: "bytes"})
		time.Sleep(refresh)
		want := []string{
			"⠋ pull x: pulling  4.1s",
			"  sha256:111111111111  [###############     ]  30 MiB / 40 MiB  4.9 MiB/s", // what was there before isn't counted
			"  sha256:333333333333  1.0 MiB",
			"  manifest\uFFFD[2J: two lines",
		}
		got := shown()
		got[0] = "⠋" + strings.TrimLeft(got[0], spinner)
		if !slices.Equal(got, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		d.report(shed.Event{Phase: "pull", Item: "sha256:3333333333334444444444", Message: "already here", Done: true})
		d.report(shed.Event{Phase: "pull", Item: "sha256:1111111111112222222222", Current: 40 << 20, Total: 40 << 20, Unit: "bytes", Done: true})
		d.report(shed.Event{Phase: "pull", Done: true, Elapsed: 5 * time.Second}) // with an item left
		time.Sleep(refresh)
		want = []string{
			"✓ pull x: sha256:333333333333: already here  1.0 MiB  4.2s",
			"✓ pull x: sha256:111111111111  40 MiB  4.2s",
			"✓ pull x: pulling  5.0s",
		}
		if got := shown(); len(got) != 4 || !slices.Equal(got[:3], want) {
			t.Errorf("got\n%s", strings.Join(got, "\n"))
		}
		end()
		if got := shown(); !slices.Equal(got, append(want, "")) {
			t.Errorf("at the end\n%s", strings.Join(got, "\n"))
		}
	})
}

// Whatever the size of the terminal, nothing wraps or scrolls out of reach.
func TestDisplayManyItems(t *testing.T) {
	for _, size := range []struct{ width, height int }{{80, 24}, {200, 60}, {30, 5}, {10, 2}, {80, 1}} {
		synctest.Test(t, func(t *testing.T) {
			d, shown, end := newTestDisplay(t, size.width, size.height)
			d.report(shed.Event{Phase: "pull", Message: "pulling"})
			for i := range 200 {
				d.report(shed.Event{Phase: "pull", Item: layer(i), Current: 5, Total: 40 << 20, Unit: "bytes"})
			}
			time.Sleep(time.Second)
			got := shown()
			if len(got) > size.height || size.height == 24 && (len(got) != 23 || got[22] != "  and 179 more") {
				t.Errorf("%v: %d lines, the last is %q", size, len(got), got[len(got)-1])
			}
			for i := range 200 {
				d.report(shed.Event{Phase: "pull", Item: layer(i), Done: true})
				time.Sleep(refresh / 3)
			}
			end()
			if got := shown(); len(got) != 201 || !strings.HasPrefix(got[199], "✓ ") || got[200] != "" {
				t.Errorf("%v: %d lines at the end", size, len(got))
			}
		})
	}
}

// The lines of a build stay, above what is under way.
func TestDisplayLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, shown, end := newTestDisplay(t, 80, 24)
		d.report(shed.Event{Phase: "build", Message: "building"})
		for i := range 3 {
			time.Sleep(time.Second)
			d.report(shed.Event{Phase: "build", Message: fmt.Sprintf("10%%\r  step %d\x1b[2J\r\n", i)})
		}
		d.report(shed.Event{Phase: "build", Done: true, Elapsed: 3 * time.Second})
		end()
		want := []string{"  step 0\uFFFD[2J", "  step 1\uFFFD[2J", "  step 2\uFFFD[2J", "✓ pull x: building  3.0s", ""}
		if got := shown(); !slices.Equal(got, want) {
			t.Errorf("got\n%s", strings.Join(got, "\n"))
		}
	})
}

// In a pipe an item has two lines, however often it is counted.
func TestProgressLinesOfItems(t *testing.T) {
	fake := &apitest.Fake{Before: func(_ context.Context, _, _ string, p shed.Progress) error {
		done := p.Phase("pull", "pulling")
		for i := range 2 {
			for n := range int64(100) {
				p.Report(shed.Event{Phase: "pull", Item: layer(i), Current: n << 20, Total: 99 << 20, Unit: "bytes"})
			}
		}
		p.Report(shed.Event{Phase: "pull", Item: layer(1), Done: true})
		p.Report(shed.Event{Phase: "pull", Item: layer(0), Done: true})
		p.Report(shed.Event{Phase: "pull", Item: "c", Message: "already here", Done: true})
		done()
		return nil
	}}
	serve(t, fake)
	_, _, stderr := shedCLI("image", "pull", "x")
	stderr = regexp.MustCompile(`[0-9.]+s\n`).ReplaceAllString(stderr, "T\n")
	want := "pull x: sha256:000000000000\npull x: sha256:000000000000\n" +
		"pull x: sha256:000000000000  99 MiB ... T\npull x: sha256:000000000000  99 MiB ... T\npull x: c: already here ... T\n" +
		"pull x: pulling ... T\npulled " + apitest.Digest("b2") + ", 207 MiB\n"
	if stderr != want {
		t.Errorf("got\n%s\nwant\n%s", stderr, want)
	}
}

// A phase that takes long is seen in a pipe too before it ends, and one that doesn't is said once.
func TestLinesOfLongPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := &lines{c: &cli{err: &out}, operation: "build x"}
		l.report(shed.Event{Phase: "boot", Message: "booting"})
		time.Sleep(longPhase / 2)
		l.report(shed.Event{Phase: "boot", Done: true, Elapsed: longPhase / 2})
		l.report(shed.Event{Phase: "base", Message: "sending base"})
		time.Sleep(longPhase / 2)
		l.report(shed.Event{Phase: "base", Current: 1, Unit: "bytes"})
		time.Sleep(longPhase)
		l.report(shed.Event{Phase: "base", Done: true, Elapsed: 2 * longPhase})
		l.report(shed.Event{Phase: "last", Message: "storing"})
		l.end()
		time.Sleep(2 * longPhase)
		want := "build x: booting ... 2.5s\nbuild x: sending base ...\nbuild x: sending base ... 10.0s\n"
		if got := out.String(); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}
