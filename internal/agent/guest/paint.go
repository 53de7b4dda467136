//go:build linux

package guest

import (
	"bytes"
	"fmt"
	"slices"

	uv "github.com/charmbracelet/ultraviolet"

	"github.com/charliek/shed"
)

// mirrored are DEC's private modes in which the terminal that shows a session is to be when the session's screen
// is: which keys and mouse events it sends, and how.
var mirrored = []int{
	1,                                     // cursor keys of applications
	9, 1000, 1002, 1003, 1005, 1006, 1015, // the mouse
	1004, // focus
	2004, // bracketed paste
}

// keypadMode is of applications too. It has sequences of its own.
const keypadMode = 66

const (
	// openTerminal puts a terminal into the state that a painter expects: its other screen, with the title kept,
	// and nothing that moves the cursor unasked.
	openTerminal = "\x1b[?1049h\x1b[22;0t\x1b[?7l\x1b(B\x1b[m\x1b[r"
	// closeTerminal undoes that, and all that a painter may have set.
	closeTerminal = "\x1b]8;;\x1b\\\x1b[m\x1b[?1l\x1b>\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1005l\x1b[?1006l\x1b[?1015l" +
		"\x1b[?1004l\x1b[?2004l\x1b[0 q\x1b[?7h\x1b[?25h\x1b[23;0t\x1b[?1049l"
)

// painter makes a terminal show a screen: it knows what the terminal shows, and sends what
// differs, in absolute terms. So it may be as late as the terminal needs, and what programs
// write never gets to the terminal itself.
type painter struct {
	size   shed.Size // of the terminal
	opened bool
	cells  []uv.Cell // what the terminal shows, row by row; nil where that isn't known

	x, y   int
	shown  bool // the cursor
	style  int
	modes  map[int]bool
	keypad bool
	title  string
	bells  int

	pen  uv.Style
	link uv.Link
	buf  bytes.Buffer
}

func newPainter(size shed.Size, s *screen) *painter {
	return &painter{size: limitSize(size), modes: map[int]bool{}, shown: true, bells: s.bells}
}

// resize makes the next paint a full one.
func (p *painter) resize(size shed.Size) {
	p.size, p.cells = limitSize(size), nil
}

// paint returns what makes the terminal show s. It is valid until the next call.
func (p *painter) paint(s *screen) []byte {
	p.buf.Reset()
	p.paintModes(s)
	p.paintCells(s)
	p.paintCursor(s)
	return p.buf.Bytes()
}

func (p *painter) paintModes(s *screen) {
	if !p.opened {
		p.opened = true
		p.buf.WriteString(openTerminal)
	}
	for _, mode := range mirrored {
		if on := s.modes[mode]; on != p.modes[mode] {
			p.modes[mode] = on
			fmt.Fprintf(&p.buf, "\x1b[?%d%c", mode, setOrReset(on))
		}
	}
	if on := s.modes[keypadMode]; on != p.keypad {
		p.keypad = on
		p.buf.WriteString(map[bool]string{true: "\x1b=", false: "\x1b>"}[on])
	}
	if s.title != p.title {
		p.title = s.title
		fmt.Fprintf(&p.buf, "\x1b]2;%s\x1b\\", s.title)
	}
	if s.bells != p.bells {
		p.bells = s.bells
		p.buf.WriteByte('\a')
	}
}

func setOrReset(on bool) byte {
	if on {
		return 'h'
	}
	return 'l'
}

func (p *painter) paintCells(s *screen) {
	rows, cols := int(p.size.Rows), int(p.size.Cols)
	if p.cells == nil {
		p.hideCursor()
		p.buf.WriteString("\x1b[m\x1b[2J")
		p.cells = slices.Repeat([]uv.Cell{uv.EmptyCell}, rows*cols)
	}
	row := make([]uv.Cell, cols)
	for y := range rows {
		s.row(y, row)
		p.paintRow(y, row)
	}
}

// paintRow sends what differs in a row, from the first cell to the last.
func (p *painter) paintRow(y int, row []uv.Cell) {
	old := p.cells[y*len(row) : (y+1)*len(row)]
	first, last := 0, len(row)-1
	for first <= last && row[first].Equal(&old[first]) {
		first++
	}
	if first > last {
		return
	}
	for last > first && row[last].Equal(&old[last]) {
		last--
	}
	for first > 0 && row[first].Width == 0 {
		first-- // to the begin of a wide character
	}
	blank := len(row) // where what is blank to the end begins
	for blank > 0 && row[blank-1].Equal(&uv.EmptyCell) {
		blank--
	}
	p.hideCursor()
	p.moveTo(first, y)
	for x := first; x <= last; {
		if x >= blank && last-x > 8 {
			p.setStyle(uv.Style{}, uv.Link{})
			p.buf.WriteString("\x1b[K")
			break
		}
		c := row[x]
		p.setStyle(c.Style, c.Link)
		p.buf.WriteString(c.Content)
		x += max(c.Width, 1)
		if len(c.Content) > 1 && x <= last {
			// Terminals disagree about the width of some characters.
			p.moveTo(x, y)
		}
	}
	p.setStyle(uv.Style{}, uv.Link{})
	copy(old, row)
}

func (p *painter) setStyle(style uv.Style, link uv.Link) {
	if !style.Equal(&p.pen) {
		p.pen = style
		p.buf.WriteString("\x1b[m")
		if !style.IsZero() {
			p.buf.WriteString(style.String())
		}
	}
	if link != p.link {
		p.link = link
		fmt.Fprintf(&p.buf, "\x1b]8;%s;%s\x1b\\", link.Params, link.URL)
	}
}

func (p *painter) moveTo(x, y int) {
	p.x, p.y = -1, -1 // it moves on
	fmt.Fprintf(&p.buf, "\x1b[%d;%dH", y+1, x+1)
}

func (p *painter) hideCursor() {
	if p.shown {
		p.shown = false
		p.buf.WriteString("\x1b[?25l")
	}
}

func (p *painter) paintCursor(s *screen) {
	if style := s.cursorStyle(); style != p.style {
		p.style = style
		fmt.Fprintf(&p.buf, "\x1b[%d q", style)
	}
	x, y, shown := s.cursor()
	if x >= int(p.size.Cols) || y >= int(p.size.Rows) {
		p.hideCursor()
		return
	}
	if x != p.x || y != p.y {
		p.moveTo(x, y)
		p.x, p.y = x, y
	}
	if shown && !p.shown {
		p.shown = true
		p.buf.WriteString("\x1b[?25h")
	}
	if !shown {
		p.hideCursor()
	}
}
