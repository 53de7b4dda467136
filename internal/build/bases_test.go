package build

import (
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func basesOf(dockerfile []byte, opts shed.BuildOptions) ([]string, error) {
	g, err := parse(dockerfile, opts.Args)
	if err != nil {
		return nil, err
	}
	return g.bases(opts.Target)
}

func TestBases(t *testing.T) {
	for _, tt := range []struct {
		name, dockerfile string
		opts             shed.BuildOptions
		want             []string
	}{
		{"one", "FROM base\nRUN true", shed.BuildOptions{}, []string{"base"}},
		{"scratch", "FROM scratch\nCOPY a /a", shed.BuildOptions{}, nil},
		{"stages", "FROM golang:1.26 AS build\nRUN true\nFROM debian:12\nCOPY --from=build /a /a\nCOPY --from=busybox /bin/sh /x", shed.BuildOptions{},
			[]string{"busybox", "debian:12", "golang:1.26"}},
		{"an unneeded stage", "FROM a AS a\nFROM b AS b\nFROM c", shed.BuildOptions{}, []string{"c"}},
		{"target", "FROM a AS one\nFROM one AS two\nFROM c", shed.BuildOptions{Target: "two"}, []string{"a"}},
		{"target in another case", "FROM a AS One\nFROM c", shed.BuildOptions{Target: "one"}, []string{"a"}},
		{"by number", "FROM a\nFROM b\nCOPY --from=0 / /", shed.BuildOptions{}, []string{"a", "b"}},
		{"default", "ARG V=12\nFROM debian:$V", shed.BuildOptions{}, []string{"debian:12"}},
		{"given", "ARG V=12\nFROM debian:${V}-slim", shed.BuildOptions{Args: map[string]string{"V": "13"}}, []string{"debian:13-slim"}},
		{"of another", "ARG A=x\nARG B=$A-y\nFROM r:$B", shed.BuildOptions{}, []string{"r:x-y"}},
		{"mount", "FROM a\nRUN --mount=type=bind,from=tools,target=/t true", shed.BuildOptions{}, []string{"a", "tools"}},
		{"a name that comes later is an image", "FROM b AS a\nFROM c AS b", shed.BuildOptions{Target: "a"}, []string{"b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := basesOf([]byte(tt.dockerfile), tt.opts)
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func TestPinned(t *testing.T) {
	const digest = "@sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
	dockerfile := "# debian:12" + digest + "\nARG D=" + digest + "\nARG B=base\nFROM --platform=linux/amd64 \\\n  debian:12" + digest +
		" AS a\nFROM a\nfrom b$D\nFROM c AS c\nFROM c\nRUN echo c\nfrom ${B:-other} as Base\nFROM unused"
	names := map[string]string{"debian:12" + digest: "localhost/x:1", "b" + digest: "localhost/x:2", "c": "localhost/x:3", "base": "localhost/x:4"}
	want := "# debian:12" + digest + "\nARG D=" + digest + "\nARG B=base\nFROM --platform=linux/amd64 localhost/x:1" +
		" AS a\n\nFROM a\nfrom localhost/x:2\nFROM localhost/x:3 AS c\nFROM c\nRUN echo c\nfrom localhost/x:4 as Base\nFROM unused"
	g, err := parse([]byte(dockerfile), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := g.rewrite(names, nil)
	if err != nil || string(got.text) != want {
		t.Errorf("got %q, %v\nwant %q", got.text, err, want)
	}
}

func TestBasesErrors(t *testing.T) {
	for _, tt := range []struct {
		name, dockerfile, target, says string
	}{
		{"empty", "", "", "no instructions"},
		{"only comments", "# nothing\n", "", "no instructions"},
		{"no FROM", "RUN true", "", "no build stage"},
		{"unknown instruction", "FROM a\nRUM true", "", "line 2"},
		{"no such target", "FROM a AS one", "two", `no stage "two"`},
		{"an argument without a value", "ARG V\nFROM $V", "", `"$V"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := basesOf([]byte(tt.dockerfile), shed.BuildOptions{Target: tt.target})
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v; want one with %q that says %q", err, shed.CodeInvalid, tt.says)
			}
		})
	}
}

func FuzzBases(f *testing.F) {
	f.Add([]byte("ARG V=1\nFROM a:$V AS b\nRUN --mount=from=c true\nFROM b\nCOPY --from=b / /"), "b")
	f.Fuzz(func(t *testing.T, dockerfile []byte, target string) {
		basesOf(dockerfile, shed.BuildOptions{Target: target})
	})
}
