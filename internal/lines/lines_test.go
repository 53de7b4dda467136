package lines

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
)

func TestLines(t *testing.T) {
	var got []string
	l := New(2, func(line string) { got = append(got, line) })
	out, err := l.Writer(), l.Writer()
	for _, part := range []string{"one\nt", "wo\r\n", "10%\r", "\n 20%  \r", "end"} {
		fmt.Fprint(out, part)
	}
	fmt.Fprint(err, "apart\n")
	if want := []string{"one", "two", "10%", "20%", "apart"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if last := l.Last(); last != "apart\nend" {
		t.Errorf("the last are %q", last)
	}
}

// A line that doesn't end is not kept whole, and nothing of it is lost.
func TestLongLine(t *testing.T) {
	var got strings.Builder
	l := New(1, func(line string) { got.WriteString(line) })
	long := strings.Repeat("x", 3*longest+1)
	io.WriteString(l.Writer(), long)
	if n := got.Len(); n != 3*longest {
		t.Errorf("%d bytes were reported", n)
	}
	if l.Last() != "x" || got.String() != long {
		t.Errorf("%d bytes in the end, %q the last", got.Len(), l.Last())
	}
}
