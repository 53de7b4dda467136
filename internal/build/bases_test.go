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
	dockerfile := "# debian:12" + digest + "\nARG D=" + digest + "\nFROM --platform=linux/amd64 \\\n  debian:12" + digest + " AS a\nFROM a\nFROM b$D\nFROM c"
	names := map[string]string{"debian:12" + digest: "localhost/x:1", "b" + digest: "localhost/x:2", "c": "localhost/x:3"}
	want := "# debian:12" + digest + "\nARG D=" + digest + "\nFROM --platform=linux/amd64 \\\n  localhost/x:1 AS a\nFROM a\nFROM localhost/x:2\nFROM c"
	g, err := parse([]byte(dockerfile), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := g.pinned(names)
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
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

func TestHeredocs(t *testing.T) {
	for _, tt := range []struct{ dockerfile, says string }{
		{"FROM a\nRUN <<EOF\necho hi\nFROM x\nEOF\nRUN true", `in line 2, "RUN <<EOF"`},
		{"FROM a\nRUN echo \\\n  <<-'X' >y\n\thi\n\tX\n", "in line 2"},
		{"FROM a\nRUN true\nCOPY <<EOF /x\nhi\nEOF", "in line 3"},
		{"FROM a\nONBUILD RUN <<EOF\nhi\nEOF", "in line 2"},
	} {
		_, err := basesOf([]byte(tt.dockerfile), shed.BuildOptions{})
		if shed.ErrorCode(err) != shed.CodeUnsupported || !strings.Contains(err.Error(), tt.says) || !strings.Contains(shed.ErrorHint(err), "RUN sh") {
			t.Errorf("%q gives %v, hint %q; want %s with %q", tt.dockerfile, err, shed.ErrorHint(err), shed.CodeUnsupported, tt.says)
		}
	}
	for _, dockerfile := range []string{"RUN cat <<<word", "RUN echo $((1<<3)) '<<EOF' \"<<EOF\"", `RUN ["echo", "<<EOF"]`, "ENV X=<<EOF", "# RUN <<EOF\nRUN true"} {
		if _, err := basesOf([]byte("FROM a\n"+dockerfile), shed.BuildOptions{}); err != nil {
			t.Errorf("%q, which has no here-document, gives %v", dockerfile, err)
		}
	}
}

func FuzzBases(f *testing.F) {
	f.Add([]byte("ARG V=1\nFROM a:$V AS b\nRUN --mount=from=c true\nFROM b\nCOPY --from=b / /"), "b")
	f.Fuzz(func(t *testing.T, dockerfile []byte, target string) {
		basesOf(dockerfile, shed.BuildOptions{Target: target})
	})
}
