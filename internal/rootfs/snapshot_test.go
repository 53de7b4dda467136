package rootfs

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// snapshotOf reads an image with debugfs.
func snapshotOf(t testing.TB, img string) snapshot {
	t.Helper()
	inodes := map[string]string{".": "2"}
	for level := []string{"."}; len(level) > 0; {
		var requests []string
		for _, dir := range level {
			requests = append(requests, fmt.Sprintf("ls -p <%s>", inodes[dir]))
		}
		var next []string
		for i, out := range debugfsAll(t, img, requests) {
			for line := range strings.Lines(out) {
				// /inode/mode/uid/gid/name/size/
				fields := strings.Split(line, "/")
				if len(fields) < 6 || fields[5] == "." || fields[5] == ".." || fields[5] == lostFound || fields[1] == "0" {
					continue
				}
				name := path.Join(level[i], fields[5])
				inodes[name] = fields[1]
				if strings.HasPrefix(fields[2], "04") {
					next = append(next, name)
				}
			}
		}
		level = next
	}

	tmp := t.TempDir()
	names := map[string][]string{}
	for name, inode := range inodes {
		names[inode] = append(names[inode], name)
	}
	var order, requests []string
	for inode := range names {
		slices.Sort(names[inode])
		order = append(order, inode)
		requests = append(requests, fmt.Sprintf("stat <%s>", inode))
	}
	states := debugfsAll(t, img, requests)
	requests = nil
	for i, inode := range order {
		if strings.Contains(states[i], "Type: regular") {
			requests = append(requests, fmt.Sprintf("dump <%s> %s", inode, filepath.Join(tmp, inode)))
		}
	}
	debugfsAll(t, img, requests)
	s := snapshot{}
	for i, inode := range order {
		f := parseStat(t, states[i])
		if f.typ == "regular" {
			b, err := os.ReadFile(filepath.Join(tmp, inode))
			if err != nil {
				t.Fatal(err)
			}
			f.content = string(b)
		}
		if f.typ != "directory" {
			f.names = strings.Join(names[inode], " ")
			if links := match(t, states[i], `Links: (\d+)`); links != strconv.Itoa(len(names[inode])) {
				t.Errorf("%s has %s links", f.names, links)
			}
		}
		for _, name := range names[inode] {
			s[name] = f.String()
		}
	}
	return s
}

func parseStat(t testing.TB, out string) fileState {
	t.Helper()
	number := func(pattern string, base int) int64 {
		n, err := strconv.ParseInt(match(t, out, pattern), base, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	f := fileState{
		typ:    match(t, out, `Type: (.*?)\s+Mode:`),
		mode:   number(`Mode:\s+(\d+)`, 8),
		uid:    int(number(`User:\s+(\d+)`, 10)),
		gid:    int(number(`Group:\s+(\d+)`, 10)),
		mtime:  number(`mtime: 0x([0-9a-f]+)`, 16),
		xattrs: map[string]string{},
	}
	switch f.typ {
	case "symlink":
		f.content = match(t, out, `Fast link dest: "(.*)"`)
	case "character special", "block special":
		f.content = fmt.Sprintf("%d:%d", number(`number: (\d+):`, 10), number(`number: \d+:(\d+)`, 10))
	}
	for _, m := range regexp.MustCompile(`(?m)^  (\S+) \(\d+\) = "(.*)"$`).FindAllStringSubmatch(out, -1) {
		f.xattrs[m[1]] = m[2]
	}
	return f
}

func match(t testing.TB, s, pattern string) string {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(s)
	if m == nil {
		t.Fatalf("nothing matches %s in\n%s", pattern, s)
	}
	return m[1]
}

// debugfsAll answers many requests about image at once.
func debugfsAll(t testing.TB, image string, requests []string) []string {
	t.Helper()
	if len(requests) == 0 {
		return nil
	}
	script := filepath.Join(t.TempDir(), "requests")
	if err := os.WriteFile(script, []byte(strings.Join(requests, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Before each answer stands "debugfs: " and the request.
	out := "\n" + e2fs(t, "debugfs", "-f", script, image)
	answers := strings.Split(out, "\ndebugfs: ")[1:]
	if len(answers) != len(requests) {
		t.Fatalf("debugfs gave %d answers to %d requests:\n%s", len(answers), len(requests), out)
	}
	for i, a := range answers {
		_, answers[i], _ = strings.Cut(a, "\n")
	}
	return answers
}
