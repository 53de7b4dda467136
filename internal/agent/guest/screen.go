//go:build linux

package guest

import (
	"image/color"
	"io"
	"reflect"
	"strings"
	"unicode"
	"unicode/utf8"
	"unsafe"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/vt"

	"github.com/charliek/shed"
)

// What programs may make a screen hold. Sizes are in cells, strings in bytes.
const (
	maxRows, maxCols         = 200, 640
	defaultRows, defaultCols = 24, 80

	maxTitle   = 200
	maxLink    = 2048
	maxContent = 64    // of a cell
	maxMode    = 10000 // the emulator remembers every mode that was ever set
)

// screen is what a session's programs have drawn. It answers what they ask of their terminal: whoever is attached,
// nobody else does. It isn't safe for concurrent use.
type screen struct {
	e     *vt.Emulator
	reply func([]byte)
	size  shed.Size

	modes map[int]bool // DEC's private modes that are set
	title string
	bells int

	asked chan struct{} // closed when no more replies come
}

// newScreen returns an empty screen. reply is called with answers to the programs. It must not block,
// nor use the screen. The screen must be closed.
func newScreen(size shed.Size, reply func([]byte)) *screen {
	s := &screen{reply: reply, size: limitSize(size)}
	s.reset()
	return s
}

// limitSize returns the size of a screen for a terminal of that size, which may not know its own.
func limitSize(size shed.Size) shed.Size {
	if size.Rows == 0 || size.Cols == 0 {
		size = shed.Size{Rows: defaultRows, Cols: defaultCols}
	}
	return shed.Size{Rows: min(size.Rows, maxRows), Cols: min(size.Cols, maxCols)}
}

// reset starts with a new emulator.
func (s *screen) reset() {
	e := vt.NewEmulator(int(s.size.Cols), int(s.size.Rows))
	s.e, s.modes, s.title = e, map[int]bool{int(ansi.ModeAutoWrap): true}, ""
	for i := range 2 {
		screenOf(e, i).SetScrollback(nil)
	}
	e.SetCallbacks(vt.Callbacks{
		Bell:        func() { s.bells++ },
		Title:       func(title string) { s.title = printable(title, maxTitle) },
		EnableMode:  func(m ansi.Mode) { s.setMode(m, true) },
		DisableMode: func(m ansi.Mode) { s.setMode(m, false) },
	})
	s.limit()
	asked := make(chan struct{})
	s.asked = asked
	go func() {
		defer close(asked)
		b := make([]byte, 1024)
		for {
			n, err := e.Read(b)
			if n > 0 {
				s.reply(b[:n])
			}
			if err != nil {
				return
			}
		}
	}()
}

// screenOf returns the main or the alternate screen of an emulator. The library keeps 10,000 lines that have left
// the alternate one, which nothing shows, and has no way to limit these.
func screenOf(e *vt.Emulator, i int) *vt.Screen {
	f := reflect.ValueOf(e).Elem().FieldByName("scrs").Index(i)
	return (*vt.Screen)(unsafe.Pointer(f.UnsafeAddr()))
}

// limit keeps from the emulator what costs it far more time or memory than it took to send.
func (s *screen) limit() {
	swallow := func(cmd int, tooMuch func(int) bool) {
		s.e.RegisterCsiHandler(cmd, func(params ansi.Params) bool {
			for _, p := range params {
				if tooMuch(p.Param(0)) {
					return true
				}
			}
			return false
		})
	}
	for _, final := range []byte{'h', 'l'} {
		for _, prefix := range []byte{0, '?'} {
			swallow(ansi.Command(prefix, 0, final), func(mode int) bool { return mode > maxMode })
		}
	}
	swallow('b', func(times int) bool { return times > int(s.size.Cols) })
	s.e.RegisterOscHandler(8, func(data []byte) bool { return len(data) > maxLink })
	for _, cmd := range []int{10, 11, 12} {
		// The colours of the terminals that show the session aren't known.
		s.e.RegisterOscHandler(cmd, func([]byte) bool { return true })
	}
	s.e.RegisterEscHandler('c', func() bool {
		clear(s.modes)
		return false
	})
}

func (s *screen) setMode(m ansi.Mode, on bool) {
	if m, ok := m.(ansi.DECMode); ok {
		if on {
			s.modes[m.Mode()] = true
		} else {
			delete(s.modes, m.Mode())
		}
	}
}

// survive, deferred, starts the screen anew if the emulator has failed.
func (s *screen) survive() {
	if r := recover(); r != nil {
		s.close()
		s.reset()
	}
}

// write draws what programs write. If the emulator fails at that, the screen starts anew.
func (s *screen) write(p []byte) {
	defer s.survive()
	for i := 0; i < len(p); {
		if p[i] < utf8.RuneSelf {
			i++
			continue
		}
		cluster, width := ansi.FirstGraphemeCluster(p[i:], ansi.GraphemeWidth)
		i += max(len(cluster), 1)
		if width == 2 {
			s.e.Write(p[:i-len(cluster)])
			s.writeWide(cluster)
			p, i = p[i:], 0
		}
	}
	s.e.Write(p)
}

// writeWide writes a character of two cells. The emulator would lose it where the line has only one
// cell left, and, by the next one, where it has two: there the next one is to wrap.
func (s *screen) writeWide(char []byte) {
	wraps := (*bool)(unsafe.Pointer(reflect.ValueOf(s.e).Elem().FieldByName("atPhantom").UnsafeAddr()))
	last := int(s.size.Cols) - 1
	x, _, _ := s.cursor()
	canWrap := s.modes[int(ansi.ModeAutoWrap)] && last > 0
	if canWrap && x == last && !*wraps {
		s.e.Write([]byte(" "))
	}
	s.e.Write(char)
	if after, _, _ := s.cursor(); canWrap && x == last-1 && after == last {
		*wraps = true
	}
}

// close lets go of the emulator.
func (s *screen) close() {
	if pipe, ok := s.e.InputPipe().(io.Closer); ok {
		pipe.Close()
	}
	<-s.asked
}

// resize keeps the lines around the cursor.
func (s *screen) resize(size shed.Size) {
	size = limitSize(size)
	if size == s.size {
		return
	}
	s.size = size
	defer s.survive()
	for i := range 2 {
		scr := screenOf(s.e, i)
		_, y := scr.CursorPosition()
		if below := y - int(size.Rows) + 1; below > 0 {
			region := scr.ScrollRegion()
			if region == scr.Bounds() {
				scr.ScrollUp(below)
			}
		}
	}
	s.e.Resize(int(size.Cols), int(size.Rows))
}

// cursor returns where it is, and whether it is shown.
func (s *screen) cursor() (x, y int, shown bool) {
	pos := s.e.CursorPosition()
	return pos.X, pos.Y, !s.e.CursorHidden()
}

// cursorStyle returns DECSCUSR's number of the cursor's shape, 0 for the terminal's own.
func (s *screen) cursorStyle() int {
	style, blinks := s.e.CursorStyle()
	n := 2*int(style) + 2
	if blinks {
		n--
	}
	if n == 1 {
		return 0
	}
	return n
}

// row fills the cells of a line, as a terminal of that width shows them: a wide character is followed by cells
// of no width. What is outside of the screen is blank.
func (s *screen) row(y int, cells []uv.Cell) {
	cols := min(len(cells), int(s.size.Cols))
	for x := 0; x < cols; {
		c := s.e.CellAt(x, y)
		if c == nil {
			cells[x] = uv.EmptyCell
			x++
			continue
		}
		cell := *c
		if cell.Width < 1 || cell.Content == "" || x+cell.Width > cols || !showable(cell.Content) {
			cell.Content, cell.Width = " ", 1
		}
		for _, c := range []*color.Color{&cell.Style.Fg, &cell.Style.Bg, &cell.Style.UnderlineColor} {
			if *c != nil {
				if _, _, _, alpha := (*c).RGBA(); alpha == 0 { // there are sequences for that, and terminals have none
					*c = nil
				}
			}
		}
		if printable(cell.Link.URL, maxLink) != cell.Link.URL || printable(cell.Link.Params, maxLink) != cell.Link.Params {
			cell.Link = uv.Link{}
		}
		cells[x] = cell
		for i := range cell.Width - 1 {
			cells[x+1+i] = uv.Cell{Style: cell.Style, Link: cell.Link}
		}
		x += cell.Width
	}
	for x := cols; x < len(cells); x++ {
		cells[x] = uv.EmptyCell
	}
}

// lastLine returns the last line that has something in it.
func (s *screen) lastLine() string {
	cells := make([]uv.Cell, s.size.Cols)
	for y := int(s.size.Rows) - 1; y >= 0; y-- {
		s.row(y, cells)
		var b strings.Builder
		for _, c := range cells {
			b.WriteString(c.Content)
		}
		if line := strings.TrimSpace(b.String()); line != "" {
			return line
		}
	}
	return ""
}

// showable says whether a cell's content is one that a terminal only shows.
func showable(content string) bool {
	if len(content) > maxContent || !utf8.ValidString(content) {
		return false
	}
	return !strings.ContainsFunc(content, unicode.IsControl)
}

// printable returns what can be shown of s, cut to at most n bytes.
func printable(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return -1
		}
		return r
	}, s)
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
