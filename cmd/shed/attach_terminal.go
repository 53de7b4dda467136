package main

import (
	"bytes"
	"io"
)

// saneTerminal ends what a program may have set in a terminal when the connection broke, in an order
// that leaves the cursor where it belongs: some of it moves the cursor, which is saved before
// that and put back.
const saneTerminal = "\x18\x1b\\" + // the sequence that was cut off, if one was
	"\x1b[?2026l" + // the display is not held back
	"\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1005l\x1b[?1006l\x1b[?1015l" + // mouse
	"\x1b[?1004l\x1b[?2004l" + // focus reports, bracketed paste
	"\x1b[>4m\x1b[=0u" + // modifyOtherKeys, and the kitty keyboard protocol on this screen
	"\x1b[?1l\x1b>" + // cursor keys and keypad
	"\x1b[4l\x1b[?7h\x1b(B\x0f" + // insert mode, wrapping, character sets
	"\x1b7\x1b[r\x1b8" + // scroll region
	"\x1b[m" +
	"\x1b7\x1b[?1049l" + // the alternate screen; each screen has its saved cursor
	"\x1b[=0u\x1b[m\x1b[0 q\x1b[?25h" // on the main screen, with the cursor shown as usual

// keyboard is what comes from a terminal, as it comes. It is closed when nothing more does.
type keyboard chan []byte

// startKeyboard reads from r for as long as the program runs: a read can't be interrupted. So
// it is done once, whatever connections come and go.
func startKeyboard(r io.Reader) keyboard {
	k := make(keyboard, 64) // so that what is typed while nobody takes it doesn't stay in the terminal
	go func() {
		defer close(k)
		buf := make([]byte, copyBuffer)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				k <- bytes.Clone(buf[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	return k
}

// discard drops what was typed so far.
func (k keyboard) discard() {
	for {
		select {
		case _, ok := <-k:
			if !ok {
				return
			}
		default:
			return
		}
	}
}

// keyReader reads from keys until ended is closed.
type keyReader struct {
	keys  keyboard
	ended <-chan struct{}
	rest  []byte
}

func (r *keyReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		select {
		case <-r.ended:
			return 0, io.EOF
		case keys, ok := <-r.keys:
			if !ok {
				return 0, io.EOF
			}
			r.rest = keys
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
