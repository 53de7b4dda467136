//go:build linux

package engine

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/state"
)

func TestParseRepo(t *testing.T) {
	for repo, want := range map[string][2]string{
		"owner/repo":                            {"https://github.com/owner/repo.git", "repo"},
		"owner/repo.git":                        {"https://github.com/owner/repo.git", "repo"},
		"owner/.github":                         {"https://github.com/owner/.github.git", ".github"},
		"my-org/a.b_c-d":                        {"https://github.com/my-org/a.b_c-d.git", "a.b_c-d"},
		"https://example.org/a/b.git":           {"https://example.org/a/b.git", "b"},
		"https://example.org/a/b/":              {"https://example.org/a/b/", "b"},
		"https://user:pw@example.org:8443/a/b":  {"https://user:pw@example.org:8443/a/b", "b"},
		"http://localhost:3000/x":               {"http://localhost:3000/x", "x"},
		"ssh://git@example.org:22/~user/r.git":  {"ssh://git@example.org:22/~user/r.git", "r"},
		"git://example.org/r":                   {"git://example.org/r", "r"},
		"git@github.com:owner/repo.git":         {"git@github.com:owner/repo.git", "repo"},
		"git@host:repo":                         {"git@host:repo", "repo"},
		"git@host:/srv/git/deep/repo.git/":      {"git@host:/srv/git/deep/repo.git/", "repo"},
		"https://gitlab.com/g/sub/group/p.git/": {"https://gitlab.com/g/sub/group/p.git/", "p"},
	} {
		url, dir, err := parseRepo(repo)
		if err != nil || url != want[0] || dir != want[1] {
			t.Errorf("parseRepo(%q) = %q, %q, %v; want %q", repo, url, dir, err, want)
		}
	}
	for _, repo := range []string{
		"", "repo", "/abs/path", "./rel", "../up", "a/b/c", "-x/repo", "owner/", "/repo",
		"owner/..", "owner/.", "owner/.git", "owner/re po", "owner/repo\n", "--upload-pack=x",
		"ext::sh -c touch% /tmp/x", "file:///etc/passwd", "https://", "https://host", "https://host/", "https://host:8443",
		"https://-host/x", "https://host/..", "https://host/.git", "https://host/.git.git", "https://host/a b", "https://host/a?b=c", "https://host/$(x)",
		"ftp://host/x", "javascript:x/y", "git@host:", "git@host:a b", "git@-host", "@host:x", "https://host/x;y",
	} {
		if url, dir, err := parseRepo(repo); shed.ErrorCode(err) != shed.CodeInvalid || shed.ErrorHint(err) == "" {
			t.Errorf("parseRepo(%q) = %q, %q, %v; want it refused", repo, url, dir, err)
		}
	}
}

// FuzzParseRepo checks what git gets: never an option, and a directory of its own below home.
func FuzzParseRepo(f *testing.F) {
	for _, s := range []string{"owner/repo", "https://example.org/a/b.git", "git@host:a/b", "ssh://h/..", "ext::x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, repo string) {
		url, dir, err := parseRepo(repo)
		if err != nil {
			return
		}
		if dir == "" || dir == "." || dir == ".." || dir == ".git" || strings.ContainsAny(dir, "/ \t\n\x00\\") || dir[0] == '-' {
			t.Errorf("%q is cloned into %q", repo, dir)
		}
		if !strings.Contains(url, "://") && !strings.Contains(url, "@") || strings.Contains(url, "::") && !strings.Contains(url, "@") && !strings.Contains(url, "://") {
			t.Errorf("%q is cloned from %q", repo, url)
		}
	})
}

func TestValidateCommand(t *testing.T) {
	for _, c := range []shed.Command{
		{Args: []string{"ls", "", "-l"}}, {Script: "ls"}, {Login: true}, {Subsystem: "sftp"},
		{Args: []string{"x"}, Env: []string{"A=", "B=c=d"}, Dir: "~", User: "root", TTY: &shed.TTY{}},
	} {
		if err := c.Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, c := range []shed.Command{
		{Subsystem: "netconf"}, {Subsystem: "sftp", TTY: &shed.TTY{}}, {Subsystem: "sftp", Login: true},
		{}, {Args: []string{}}, {Args: []string{"x"}, Script: "x"}, {Script: "x", Login: true}, {Args: []string{"x"}, Login: true},
		{Args: []string{"a\x00b"}}, {Args: []string{"a\xffb"}}, {Script: "a\x00"}, {Login: true, Dir: "\x00"}, {Login: true, User: "\x00"}, {Login: true, Env: []string{"A=\x00"}},
		{Login: true, Env: []string{"A"}}, {Login: true, Env: []string{"=x"}}, {Login: true, Env: []string{""}},
	} {
		if err := c.Validate(); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("%+v: %v, want it refused", c, err)
		}
	}
}

func TestEnvironment(t *testing.T) {
	file := t.TempDir() + "/env"
	e := &Engine{Config: Config{ServerName: "here", EnvFile: file}}
	rec := state.Record{Name: "box", Workspace: "/home/shed/w"}
	own := []string{"SHED_NAME=box", "SHED_WORKSPACE=/home/shed/w", "SHED_SERVER=here"}
	check := func(want ...string) {
		t.Helper()
		got, err := e.environment(rec)
		if err != nil || !slices.Equal(got, append(slices.Clone(own), want...)) {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	check() // there is no such file
	long := strings.Repeat("x", 100_000)
	write(t, file, strings.Join([]string{
		"A=1", "", "  # a comment", "export B=two words ", `C="quoted # value"`, `D='it"s'`, `E="`, `F=""`, "G=", "H=a=b", "I=\"x'", "J=" + long, "  K=indented\r", "L=last, no newline",
	}, "\n"))
	check("A=1", "B=two words", "C=quoted # value", `D=it"s`, `E="`, "F=", "G=", "H=a=b", "I=\"x'", "J="+long, "K=indented", "L=last, no newline")
	for content, want := range map[string]string{
		"A=1\n\nnonsense\n": file + ":3:", "=x": file + ":1:", "A B=c": file + ":1:", "export =x": file + ":1:",
		strings.Repeat("x", maxEnvLine): file, "A=1\nB=\x00": file + ":2:", "A=\xff": file + ":1:",
	} {
		write(t, file, content)
		if got, err := e.environment(rec); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %q, %v; want an error with %q", content, got, err, want)
		}
	}
	e.EnvFile = t.TempDir()
	if _, err := e.environment(rec); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), e.EnvFile) {
		t.Errorf("a directory: %v", err)
	}
	e.EnvFile = ""
	check()
}

func TestCopyFrom(t *testing.T) {
	file := t.TempDir() + "/log"
	var offset int64
	next := func(want string) {
		t.Helper()
		var b bytes.Buffer
		var err error
		offset, err = copyFrom(&b, file, offset)
		if err != nil || b.String() != want {
			t.Errorf("%q, %v; want %q", b.String(), err, want)
		}
	}
	next("")
	write(t, file, "one\n")
	next("one\n")
	next("")
	write(t, file, "one\ntwo\n")
	next("two\n")
	write(t, file, "new\n") // it was trimmed
	next("new\n")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	next("")
	write(t, file, "again\n")
	next("again\n")
}

// growing writes to a file whatever is read of it.
type growing struct {
	file   string
	copied int
}

func (g *growing) Write(b []byte) (int, error) {
	f, err := os.OpenFile(g.file, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if g.copied += len(b); g.copied > 1<<20 {
		return 0, errors.New("it has no end")
	}
	return f.Write(b)
}

// A log that grows faster than it is read is read to where it ended.
func TestCopyFromEnds(t *testing.T) {
	g := &growing{file: t.TempDir() + "/log"}
	write(t, g.file, "one\n")
	if offset, err := copyFrom(g, g.file, 0); err != nil || offset != 4 || g.copied != 4 {
		t.Errorf("%d bytes to %d, %v", g.copied, offset, err)
	}
}

// Who gives up on a shed that doesn't take a command isn't kept waiting.
func TestExecOnAFrozenShed(t *testing.T) {
	e := &Engine{}
	conn, shedEnd := net.Pipe()
	defer shedEnd.Close()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if err := e.execOn(ctx, conn, state.Record{}, shed.Command{Login: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
