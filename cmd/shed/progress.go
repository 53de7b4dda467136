package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/dustin/go-humanize"
	"golang.org/x/term"
)

// progress returns what shows the events of an operation, such as "create web",
// on stderr, and a function that ends it.
func (c *cli) progress(operation string) (report shed.Progress, end func()) {
	fd, tty := terminal(c.err)
	if tty && os.Getenv("TERM") != "dumb" && c.verbose < 2 {
		d := &display{w: c.err, operation: operation, color: c.color(), start: time.Now(), width: func() int {
			width, _, err := term.GetSize(fd)
			if err != nil || width <= 0 {
				return 80
			}
			return width
		}}
		return d.report, d.run()
	}
	l := &lines{c: c, operation: operation, all: c.verbose >= 2}
	return l.report, func() {}
}

// phase is what is known about the phase that is under way.
type phase struct {
	name, message  string
	current, total int64
	unit           string
	start          time.Time
}

// update takes in e. It says whether e ends the phase.
func (p *phase) update(e shed.Event) (done bool) {
	if e.Phase != p.name {
		*p = phase{name: e.Phase, start: time.Now()}
	}
	if e.Message != "" {
		p.message = e.Message
	}
	if e.Current > 0 || e.Total > 0 {
		p.current, p.total, p.unit = e.Current, e.Total, e.Unit
	}
	return e.Done
}

func (p *phase) title() string {
	return strings.Join(strings.Fields(printable(p.name+" "+p.message)), " ")
}

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
	s := humanize.Bytes(uint64(max(p.current, 0)))
	if !rate {
		return s
	}
	if p.total > 0 {
		s += "/" + humanize.Bytes(uint64(p.total))
	}
	if elapsed >= time.Second {
		s += " " + humanize.Bytes(uint64(float64(max(p.current, 0))/elapsed.Seconds())) + "/s"
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

// lines shows progress where stderr is no terminal: one line for each phase.
type lines struct {
	c         *cli
	operation string
	all       bool // every event
	phase     phase
}

func (l *lines) report(e shed.Event) {
	if l.all && !e.Done {
		l.phase.update(e)
		l.c.message("%s: %s", l.operation, strings.TrimSpace(l.phase.title()+" "+l.phase.count(0, true)))
	} else if l.phase.update(e) {
		l.c.message("%s: %s ... %s", l.operation, l.phase.title(), duration(e.Elapsed))
		l.phase = phase{}
	}
}

// display shows progress on a terminal: a line for each phase that has ended,
// and one, rewritten, for what is under way.
type display struct {
	w         io.Writer
	operation string
	color     bool
	width     func() int
	start     time.Time

	mu    sync.Mutex
	phase phase
	frame int
}

const (
	clearLine = "\r\x1b[K"
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
		io.WriteString(d.w, clearLine)
	}
}

func (d *display) report(e shed.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.phase.update(e) {
		return
	}
	line := d.phase.title()
	if count := d.phase.count(e.Elapsed, false); count != "" {
		line += "  " + count
	}
	elapsed := duration(e.Elapsed)
	line = truncate(line, d.width()-len(elapsed)-5)
	fmt.Fprintf(d.w, "%s%s %s  %s\n", clearLine, d.paint("32", "✓"), line, d.paint("2", elapsed))
	d.phase = phase{}
}

func (d *display) draw() {
	if time.Since(d.start) < quiet {
		return
	}
	line, start := d.operation, d.start
	if d.phase.name != "" {
		line, start = d.operation+": "+d.phase.title(), d.phase.start
	}
	elapsed := time.Since(start)
	if count := d.phase.count(elapsed, true); count != "" {
		line += "  " + count
	}
	frames := []rune(spinner)
	d.frame = (d.frame + 1) % len(frames)
	line = truncate(line+"  "+duration(elapsed), d.width()-3)
	fmt.Fprintf(d.w, "%s%s %s", clearLine, d.paint("36", string(frames[d.frame])), line)
}

func (d *display) paint(color, s string) string {
	if !d.color {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

// truncate shortens s to width runes.
func truncate(s string, width int) string {
	r := []rune(s)
	if len(r) <= max(width, 1) {
		return s
	}
	return string(r[:max(width, 1)-1]) + "…"
}
