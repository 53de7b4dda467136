//go:build linux

package guest

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"

	"github.com/charliek/shed"
)

func testScreen(t testing.TB, size shed.Size) *screen {
	s := newScreen(size, func([]byte) {})
	t.Cleanup(s.close)
	return s
}

// programs are what programs write, in pieces.
var programs = map[string][]string{
	"shell":       {"$ ls\r\n", "\x1b[0m\x1b[01;34mdir\x1b[0m  file\r\n", "$ \x1b[?2004h"},
	"colours":     {"\x1b[31mred \x1b[1;42mbold on green\x1b[0m \x1b[38;5;200mindexed\x1b[48;2;1;2;3mtrue\x1b[m \x1b[7mreverse\x1b[27;4mline\x1b[4:3m\x1b[58;5;9mcurly\x1b[m"},
	"background":  {"\x1b[44m\x1b[2J\x1b[5;5Hblue\x1b[K\x1b[m\x1b[10;1H\x1b[41m\x1b[K"},
	"wide":        {"日本語 テスト\r\n", "e\u0301 👍 👨‍👩‍👧 \x1b[1;79H本", "\x1b[2;80H語x"},
	"alternate":   {"before\r\n", "\x1b[?1049h\x1b[H", "inside\x1b[?1h\x1b=", "\x1b[5;10Hmore"},
	"back again":  {"before\r\n", "\x1b[?1049h\x1b[H", "inside", "\x1b[?1049l", "after"},
	"region":      {"\x1b[3;10r\x1b[10;1H", strings.Repeat("line\r\n", 20), "\x1b[r", "\x1b[5S\x1b[2T"},
	"editing":     {"hello world\x1b[6D\x1b[3P\x1b[2@__\x1b[1;1H\x1b[2L", "inserted\x1b[M\x1b[3X"},
	"lines":       {"\x1b(0lqqqk\r\nx   x\r\nmqqqj\x1b(B\r\n"},
	"scroll":      {strings.Repeat("a line of some length\r\n", 100), "end"},
	"modes":       {"\x1b[?1000h\x1b[?1006h\x1b[?1004h\x1b[?25l\x1b[4 q\x1b]2;a title\x07", "\x1b[?1000l"},
	"link":        {"\x1b]8;id=1;https://example.com/\x1b\\link\x1b]8;;\x1b\\ none"},
	"full reset":  {"\x1b[?1h\x1b[31mx\x1bc", "y"},
	"cut in two":  {"\x1b[3", "1mred\xe6", "\x97", "\xa5\x1b]2;ti", "tle\x1b", "\\"},
	"wrap":        {strings.Repeat("x", 80), "y" + strings.Repeat("z", 159), "\r\n"},
	"bottom line": {"\x1b[24;80H#", "\x1b[24;1Hprompt"},
}

// A terminal that was there from the start, and one that comes later, show what the screen has, whatever
// its programs have written between.
func TestPaint(t *testing.T) {
	sizes := []shed.Size{{Rows: 24, Cols: 80}, {Rows: 30, Cols: 100}, {Rows: 10, Cols: 31}}
	for name, pieces := range programs {
		for _, size := range sizes {
			t.Run(fmt.Sprintf("%s on %dx%d", name, size.Cols, size.Rows), func(t *testing.T) {
				s := testScreen(t, shed.Size{Rows: 24, Cols: 80})
				early := testScreen(t, size)
				p := newPainter(size, s)
				for _, piece := range pieces {
					s.write([]byte(piece))
					early.write(p.paint(s))
				}
				sameScreen(t, s, early)
				if b := p.paint(s); len(b) > 0 {
					t.Errorf("painted again, though nothing has changed: %q", b)
				}
				late := testScreen(t, size)
				late.write(newPainter(size, s).paint(s))
				sameScreen(t, s, late)
			})
		}
	}
}

// sameScreen compares what a terminal shows with the screen that it is to show.
func sameScreen(t *testing.T, s, terminal *screen) {
	t.Helper()
	want, got := make([]uv.Cell, terminal.size.Cols), make([]uv.Cell, terminal.size.Cols)
	for y := range int(terminal.size.Rows) {
		for x := range want {
			want[x] = uv.EmptyCell
		}
		if y < int(s.size.Rows) {
			s.row(y, want)
		}
		terminal.row(y, got)
		for x := range want {
			if want[x].Width > 0 && !want[x].Equal(&got[x]) {
				t.Fatalf("line %d, column %d: %+v, want %+v", y, x, got[x], want[x])
			}
		}
	}
	x, y, shown := s.cursor()
	inside := x < int(terminal.size.Cols) && y < int(terminal.size.Rows)
	gotX, gotY, gotShown := terminal.cursor()
	if gotShown != (shown && inside) || inside && (gotX != x || gotY != y) {
		t.Errorf("the cursor is at %d,%d (%v), want %d,%d (%v)", gotX, gotY, gotShown, x, y, shown)
	}
	for _, mode := range append([]int{keypadMode}, mirrored...) {
		if s.modes[mode] != terminal.modes[mode] {
			t.Errorf("mode %d is %v", mode, terminal.modes[mode])
		}
	}
	if s.title != terminal.title || s.cursorStyle() != terminal.cursorStyle() {
		t.Errorf("title %q, cursor %d; want %q, %d", terminal.title, terminal.cursorStyle(), s.title, s.cursorStyle())
	}
	if !terminal.e.IsAltScreen() {
		t.Error("the terminal's own screen was painted on")
	}
}

// What is detached from has left no mode behind, and its own screen.
func TestCloseTerminal(t *testing.T) {
	s := testScreen(t, shed.Size{})
	terminal := testScreen(t, shed.Size{})
	terminal.write([]byte("local$ "))
	for _, pieces := range programs {
		for _, piece := range pieces {
			s.write([]byte(piece))
		}
	}
	s.write([]byte("\x1b[?1h\x1b=\x1b[?9h\x1b[?1000h\x1b[?1002h\x1b[?1003h\x1b[?1004h\x1b[?1005h\x1b[?1006h\x1b[?1015h\x1b[?2004h\x1b[5 q\x1b[?25l"))
	terminal.write(newPainter(terminal.size, s).paint(s))
	terminal.write([]byte(closeTerminal + "x"))
	if text := textOf(terminal); text != "local$ x" {
		t.Errorf("%q", text)
	}
	for _, mode := range append([]int{keypadMode}, mirrored...) {
		if terminal.modes[mode] {
			t.Errorf("mode %d is set", mode)
		}
	}
	if _, _, shown := terminal.cursor(); !shown || !terminal.modes[7] || terminal.cursorStyle() != 0 {
		t.Error("the cursor is not shown, or not as it was, or lines don't wrap")
	}
}

func TestScreenResize(t *testing.T) {
	s := testScreen(t, shed.Size{Rows: 10, Cols: 40})
	s.write([]byte(strings.Repeat("line\r\n", 20) + "prompt$ "))
	s.resize(shed.Size{Rows: 4, Cols: 40})
	if x, y, _ := s.cursor(); textOf(s) != "line\nline\nline\nprompt$" || x != 8 || y != 3 {
		t.Errorf("%q, the cursor at %d,%d", textOf(s), x, y)
	}
	for _, size := range []shed.Size{{}, {Rows: 65535, Cols: 65535}, {Rows: 1, Cols: 1}} {
		s.resize(size)
		s.write([]byte("\x1b[?1049hx\x1b[999;999Hy\x1b[?1049l\x1b[999;999Hz"))
		newPainter(size, s).paint(s)
	}
}

func TestScreenReplies(t *testing.T) {
	replies := make(chan string, 10)
	s := newScreen(shed.Size{}, func(b []byte) { replies <- string(b) })
	s.write([]byte("ab\x1b[6n"))
	if got := <-replies; got != "\x1b[1;3R" {
		t.Errorf("%q", got)
	}
	s.close()
}

// The emulator is new, and not all of it may hold.
func TestScreenOutlivesEmulator(t *testing.T) {
	s := testScreen(t, shed.Size{})
	s.e.RegisterCsiHandler('~', func(ansi.Params) bool { panic("this one doesn't hold") })
	s.write([]byte("before\x1b[5~"))
	s.write([]byte("after"))
	if got := textOf(s); got != "after" {
		t.Errorf("%q", got)
	}
}

// What a screen keeps is bounded by its size, and not by what is written.
func TestScreenIsBounded(t *testing.T) {
	s := testScreen(t, shed.Size{Rows: 5, Cols: 10})
	for _, alternate := range []string{"\x1b[?1049l", "\x1b[?1049h"} {
		s.write([]byte(alternate + strings.Repeat("line\r\n", 1000) + "\x1b[2J"))
	}
	for i := range 2 {
		if b := screenOf(s.e, i).Scrollback(); b != nil {
			t.Errorf("screen %d keeps lines: %d", i, b.Len())
		}
	}
	s.write([]byte("\x1b[?60000h\x1b[60000h\x1b]2;" + strings.Repeat("t", 10000) + "\x07\x1b]8;;" + strings.Repeat("u", 10000) + "\x07x\x1b[65535b"))
	if s.modes[60000] || len(s.title) > maxTitle {
		t.Errorf("%v, a title of %d bytes", s.modes, len(s.title))
	}
	if c := s.e.CellAt(0, 0); len(c.Link.URL) > maxLink {
		t.Errorf("a link of %d bytes", len(c.Link.URL))
	}
}

func TestLastLine(t *testing.T) {
	s := testScreen(t, shed.Size{})
	if got := s.lastLine(); got != "" {
		t.Errorf("%q", got)
	}
	s.write([]byte("first\r\n  日本 last  \r\n\r\n   "))
	if got := s.lastLine(); got != "日本 last" {
		t.Errorf("%q", got)
	}
}

// A wide character doesn't fit where only one cell is left.
func TestWideWraps(t *testing.T) {
	for in, want := range map[string]string{
		"xxxxxxxxx日本":                "xxxxxxxxx\n日本",
		"xxxxxxxx日本":                 "xxxxxxxx日\n本",
		"xxxxxxxxxx日":                "xxxxxxxxxx\n日",
		"xxxxxxxxx👨‍👩‍👧.":            "xxxxxxxxx\n👨‍👩‍👧.",
		"日本語日本語":                     "日本語日本\n語",
		"\x1b[?7lxxxxxxxxx日\r\nnext": "xxxxxxxxx\nnext",
	} {
		s := testScreen(t, shed.Size{Rows: 4, Cols: 10})
		s.write([]byte(in))
		if got := textOf(s); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for _, test := range [][2]string{{"a\x1b[31mb\x00\u009bc\xff", "a[31mbc"}, {"日本語", "日本"}} {
		if got := printable(test[0], 8); got != test[1] {
			t.Errorf("%q: %q, want %q", test[0], got, test[1])
		}
	}
}

// Whatever programs write, the screen stands it, and terminals are sent nothing that moves them out of step.
func FuzzScreen(f *testing.F) {
	for _, pieces := range programs {
		f.Add([]byte(strings.Join(pieces, "")), uint16(24), uint16(80))
	}
	f.Add([]byte("\x1b[38;1mx"), uint16(50), uint16(80))
	f.Add([]byte("\x1b]8;id=1;https://\xab/\x1b\\link"), uint16(50), uint16(80))
	f.Add([]byte("\x1b[999999999b\x1b[65535L\x1b[65535@\x1b[65535S\x1b[?6h\x1b[3;4r\x1b[?69h\x1b[2;3s"), uint16(3), uint16(3))
	f.Fuzz(func(t *testing.T, b []byte, rows, cols uint16) {
		size := shed.Size{Rows: rows % 50, Cols: cols % 120}
		s := testScreen(t, shed.Size{Rows: 24, Cols: 80})
		terminal := testScreen(t, size)
		p := newPainter(size, s)
		for len(b) > 0 {
			n := min(len(b), 64)
			s.write(b[:n])
			out := p.paint(s)
			terminal.write(out)
			if !bytes.Equal(out, []byte(strings.ToValidUTF8(string(out), ""))) {
				t.Errorf("%q", out)
			}
			b = b[n:]
			if len(b)%2 == 0 {
				s.resize(size)
			}
		}
		s.lastLine()
		terminal.write(p.paint(s))
		sameScreen(t, s, terminal)
	})
}

// A terminal of a session is no larger than what its keeper can draw; that of another command is as its client says.
func TestTerminalSizes(t *testing.T) {
	huge, blind := shed.Size{Rows: 65535, Cols: 65535}, shed.Size{}
	session, other := &running{attached: true}, &running{}
	if got := session.ttySize(huge); got != (shed.Size{Rows: maxRows, Cols: maxCols}) {
		t.Errorf("%+v", got)
	}
	if got := session.ttySize(blind); got != (shed.Size{Rows: defaultRows, Cols: defaultCols}) {
		t.Errorf("%+v", got)
	}
	if got := other.ttySize(huge); got != huge {
		t.Errorf("%+v", got)
	}
}
