package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/mattn/go-runewidth"
	"golang.org/x/term"
)

// progress returns what shows the events of an operation, such as "create web",
// on stderr, and a function that ends it.
func (c *cli) progress(operation string) (report shed.Progress, end func()) {
	fd, tty := terminal(c.err)
	if tty && os.Getenv("TERM") != "dumb" && c.verbose < 2 {
		d := &display{w: c.err, operation: operation, color: c.color(), start: time.Now(), size: func() (width, height int) {
			width, height, err := term.GetSize(fd)
			if err != nil || width <= 0 || height <= 0 {
				return 80, 24
			}
			return width, height
		}}
		return d.report, d.run()
	}
	l := &lines{c: c, operation: operation, all: c.verbose >= 2}
	return l.report, l.end
}

// linesPhase is the phase whose messages, but for the first, are lines that were
// printed somewhere else: all of them are shown.
const linesPhase = "build"

// isLine says whether e is such a line of p.
func (p *phase) isLine(e shed.Event) bool {
	return e.Phase == linesPhase && p.name == linesPhase && e.Item == "" && e.Message != "" && !e.Done
}

// lastPrinted returns what a terminal would show of a line that was printed over itself.
func lastPrinted(line string) string {
	line = strings.TrimRight(line, "\r\n")
	return line[strings.LastIndexByte(line, '\r')+1:]
}

// phase is what is known about the phase that is under way.
type phase struct {
	name           string
	title          string // what its first event called it, or its name
	message        string // what has been said since
	current, total int64
	unit           string
	start          time.Time
}

// update takes in e. It says whether e ends the phase.
func (p *phase) update(e shed.Event) (done bool) {
	if e.Item != "" {
		return false
	}
	message := oneLine(e.Message)
	if e.Phase != p.name {
		*p = phase{name: e.Phase, title: message, start: time.Now()}
		if message == "" {
			p.title = oneLine(e.Phase)
		}
	} else if message != "" {
		p.message = message
	}
	if e.Current > 0 || e.Total > 0 {
		p.current, p.total, p.unit = e.Current, e.Total, e.Unit
	}
	return e.Done
}

// now says what goes on in the phase.
func (p *phase) now() string {
	if p.message == "" {
		return p.title
	}
	return p.title + ": " + p.message
}

func oneLine(s string) string { return strings.Join(strings.Fields(printable(s)), " ") }

// count returns how far the phase is, with a rate for bytes that are still moving.
func (p *phase) count(elapsed time.Duration, rate bool) string {
	if p.current == 0 && p.total == 0 {
		return ""
	}
	if p.unit != "bytes" {
		if p.total > 0 && rate {
			return fmt.Sprintf("%d/%d %s", p.current, p.total, printable(p.unit))
		}
		return fmt.Sprintf("%d %s", p.current, printable(p.unit))
	}
	s := byteSize(p.current)
	if !rate {
		return s
	}
	if p.total > 0 {
		s += "/" + byteSize(p.total)
	}
	if elapsed >= time.Second {
		s += " " + byteSize(int64(float64(p.current)/elapsed.Seconds())) + "/s"
	}
	return s
}

// duration formats d for people, in seconds or minutes.
func duration(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// longPhase is how long a phase takes of which more than its end is said.
const longPhase = 5 * time.Second

// lines shows progress where stderr is no terminal: one line for each phase, another
// before it where that takes long, and two for each item.
type lines struct {
	c         *cli
	operation string
	all       bool // every event

	mu    sync.Mutex
	phase phase
	items items
	begun *time.Timer // for the line of a phase that takes long
}

// end is for the end of the operation.
func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.begun != nil {
		l.begun.Stop()
	}
	l.phase = phase{}
}

// begin is for the begin of a phase.
func (l *lines) begin() {
	begun := l.phase.start
	if l.begun != nil {
		l.begun.Stop()
	}
	l.begun = time.AfterFunc(longPhase, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.phase.start.Equal(begun) {
			l.c.message("%s: %s ...", l.operation, l.phase.title)
		}
	})
}

func (l *lines) report(e shed.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.phase.isLine(e) {
		l.c.message("%s", lastPrinted(e.Message))
		return
	}
	if e.Item != "" {
		it, begins := l.items.update(e)
		if e.Done {
			line, took := it.summary()
			l.c.message("%s: %s ... %s", l.operation, line, duration(took))
		} else if l.all {
			l.c.message("%s: %s", l.operation, it.line(math.MaxInt))
		} else if begins {
			l.c.message("%s: %s", l.operation, it.title())
		}
		return
	}
	before := l.phase.start
	if l.all && !e.Done {
		l.phase.update(e)
		l.c.message("%s: %s", l.operation, strings.TrimSpace(l.phase.now()+" "+l.phase.count(0, true)))
	} else if l.phase.update(e) {
		l.c.message("%s: %s ... %s", l.operation, l.phase.title, duration(e.Elapsed))
		l.phase = phase{}
		l.items.end(e.Phase)
	} else if !l.phase.start.Equal(before) {
		l.begin()
	}
}

// display shows progress on a terminal: a line for each phase and item that has
// ended, and below them a block, rewritten, of what is under way.
type display struct {
	w         io.Writer
	operation string
	color     bool
	size      func() (width, height int)
	start     time.Time

	mu    sync.Mutex
	phase phase
	items items
	frame int
	below int // lines of the block below its first; the cursor is in the last
}

const (
	clearDown = "\x1b[J"
	clearLine = "\x1b[K"
	spinner   = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
	refresh   = 100 * time.Millisecond
	// quiet is how long an operation may take without any display.
	quiet = 200 * time.Millisecond
)

// run redraws the display until the returned function is called, which also clears it.
func (d *display) run() (end func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(refresh)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				d.mu.Lock()
				d.draw()
				d.mu.Unlock()
			case <-stop:
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-done
		io.WriteString(d.w, d.top()+clearDown)
	}
}

// top moves the cursor to where the block begins.
func (d *display) top() string {
	if d.below == 0 {
		return "\r"
	}
	return fmt.Sprintf("\r\x1b[%dA", d.below)
}

// above writes a line that stays above the block.
func (d *display) above(line string) {
	io.WriteString(d.w, d.top()+clearDown+line+"\n")
	d.below = 0
}

func (d *display) report(e shed.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.phase.isLine(e) {
		d.above(printable(lastPrinted(e.Message)))
		return
	}
	if e.Item != "" {
		if it, _ := d.items.update(e); e.Done {
			line, took := it.summary()
			d.finished(line, took)
		}
		return
	}
	if !d.phase.update(e) {
		return
	}
	line := d.phase.title
	if count := d.phase.count(e.Elapsed, false); count != "" {
		line += "  " + count
	}
	d.finished(line, e.Elapsed)
	d.phase = phase{}
	d.items.end(e.Phase)
}

// finished writes the line of what has ended.
func (d *display) finished(line string, took time.Duration) {
	elapsed := duration(took)
	width, _ := d.size()
	line = truncate(d.operation+": "+line, width-len(elapsed)-5)
	d.above(d.paint("32", "✓") + " " + line + "  " + d.paint("2", elapsed))
}

func (d *display) draw() {
	if time.Since(d.start) < quiet {
		return
	}
	line, start := d.operation, d.start
	if d.phase.name != "" {
		line, start = d.operation+": "+d.phase.now(), d.phase.start
	}
	elapsed := time.Since(start)
	if count := d.phase.count(elapsed, true); count != "" {
		line += "  " + count
	}
	frames := []rune(spinner)
	d.frame = (d.frame + 1) % len(frames)
	width, height := d.size()
	line = truncate(line+"  "+duration(elapsed), width-3)
	var b strings.Builder
	b.WriteString(d.top() + clearLine + d.paint("36", string(frames[d.frame])) + " " + line)
	below := d.items.lines(width-3, height-2)
	for _, line := range below {
		b.WriteString("\n" + clearLine + "  " + line)
	}
	b.WriteString(clearDown)
	d.below = len(below)
	io.WriteString(d.w, b.String())
}

func (d *display) paint(color, s string) string {
	if !d.color {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

// truncate shortens s to what fits width cells of a terminal.
func truncate(s string, width int) string { return runewidth.Truncate(s, max(width, 1), "…") }
