package sshconfig

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/charliek/shed"
)

// The block goes from the line beginMark to the line endMark.
const (
	beginMark = "# BEGIN shed ssh-config"
	endMark   = "# END shed ssh-config"
	aboutMark = `# Written by "shed ssh-config --install", which replaces all of it, and removed by --uninstall.`
	madeMark  = "# There was no file before."
	restMark  = "# What follows is for every host, as if nothing had been before it."
)

// document is a configuration file.
type document struct {
	text       []byte
	start, end int  // the block is text[start:end]; nothing of the top where there is none
	made       bool // the file has been made for the block
	hosts      []Host
}

// hostMark is what Render writes above a host.
var hostMark = regexp.MustCompile(`^# shed (\S+) on (\S+)$`)

// parse finds the block in text. A block that isn't whole, or one of several, is an error that
// says on which lines of the file called name the marks are.
func parse(name string, text []byte) (document, error) {
	d := document{text: text}
	var begins, ends []string // line numbers
	offset, number := 0, 0
	for line := range bytes.Lines(text) {
		number++
		switch string(bytes.TrimSpace(line)) {
		case beginMark:
			begins = append(begins, fmt.Sprint(number))
			d.start = offset
		case endMark:
			ends = append(ends, fmt.Sprint(number))
			d.end = offset + len(line)
		}
		offset += len(line)
	}
	switch {
	case len(begins) == 0 && len(ends) == 0:
		return d, nil
	case len(begins) != 1 || len(ends) != 1 || d.end < d.start:
		return d, shed.Errorf(shed.CodeInvalid, "the block of shed in %s is damaged: %s and %s", name,
			found(beginMark, begins), found(endMark, ends)).
			WithHint("remove these lines and what shed wrote between them by hand, and then run: shed ssh-config --install")
	}
	d.readBlock()
	return d, nil
}

func found(mark string, lines []string) string {
	if len(lines) == 0 {
		return fmt.Sprintf("there is no %q", mark)
	}
	return fmt.Sprintf("%q is on line %s", mark, strings.Join(lines, ", "))
}

// readBlock takes from the block what is to be known of it. What it doesn't know is not kept.
func (d *document) readBlock() {
	var next Host         // whose mark was the last line
	var open, marked bool // the last of hosts has begun; next is set
	for line := range bytes.Lines(d.text[d.start:d.end]) {
		s := string(bytes.TrimSpace(line))
		m := hostMark.FindStringSubmatch(s)
		switch keyword, _, _ := strings.Cut(s, " "); {
		case s == madeMark:
			d.made = true
		case m != nil && shed.ValidateName(m[1]) == nil && serverRE.MatchString(m[2]):
			next, open, marked = Host{Shed: m[1], Server: m[2]}, false, true
		case marked && strings.EqualFold(keyword, "Host"):
			d.hosts = append(d.hosts, next)
			open, marked = true, false
		case s == "" || s[0] == '#' || strings.EqualFold(keyword, "Host") || strings.EqualFold(keyword, "Match"):
			open, marked = false, false
		case open:
			h := &d.hosts[len(d.hosts)-1]
			h.options = append(h.options, s)
		}
	}
}

// with returns the text with a block for hosts in the place of the one that is there, or else at the
// top: ssh takes the first value that it finds. Without hosts there is no block.
func (d document) with(hosts []Host) []byte {
	var block []byte
	if len(hosts) > 0 {
		about := aboutMark
		if d.made {
			about += "\n" + madeMark
		}
		// What comes before the first host of a file is for all of them, and has to stay so.
		block = fmt.Appendf(nil, "%s\n%s\n%s\n%s\nHost *\n%s\n", beginMark, about, Render(hosts), restMark, endMark)
		if i := bytes.IndexByte(d.text, '\n'); i > 0 && d.text[i-1] == '\r' {
			block = bytes.ReplaceAll(block, []byte("\n"), []byte("\r\n"))
		}
	}
	return bytes.Join([][]byte{d.text[:d.start], block, d.text[d.end:]}, nil)
}

// include returns the number of the first line of text that includes other files for all hosts, or 0.
func include(text []byte) int {
	number := 0
	for line := range bytes.Lines(text) {
		number++
		word := bytes.TrimLeft(line, " \t\r\n\f\"")
		if i := bytes.IndexAny(word, " \t=\"\r\n"); i >= 0 {
			word = word[:i]
		}
		switch strings.ToLower(string(word)) {
		case "include":
			return number
		case "host", "match":
			return 0
		}
	}
	return 0
}
