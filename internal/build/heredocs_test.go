package build

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// rewriteOf rewrites a Dockerfile whose bases have that configuration.
func rewriteOf(dockerfile string, opts shed.BuildOptions, base v1.Config) (*rewritten, error) {
	g, err := parse([]byte(dockerfile), opts.Args)
	if err != nil {
		return nil, err
	}
	images, err := g.bases(opts.Target)
	if err != nil {
		return nil, err
	}
	configs := map[string]v1.Config{}
	for _, name := range images {
		configs[name] = base
	}
	return g.rewrite(nil, configs)
}

// parsed returns the instructions of a Dockerfile, which must have no here-documents.
func parsed(t *testing.T, dockerfile []byte) []instructions.Command {
	t.Helper()
	result, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		t.Fatalf("%v, of\n%s", err, dockerfile)
	}
	stages, _, err := instructions.Parse(result.AST, nil)
	if err != nil {
		t.Fatalf("%v, of\n%s", err, dockerfile)
	}
	var all []instructions.Command
	for _, s := range stages {
		all = append(all, s.Commands...)
	}
	if slices.ContainsFunc(all, hasHeredocs) {
		t.Fatalf("there are still here-documents in\n%s", dockerfile)
	}
	return all
}

// What the shell gets of a RUN is what BuildKit gives it.
func TestRunHeredocs(t *testing.T) {
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script} }
	long := strings.Repeat(`\"'#é`, 10000)
	for _, tt := range []struct {
		name, dockerfile string
		want             []string
	}{
		{"whole", "RUN <<EOF\necho a\necho b\nEOF", sh("echo a\necho b\n")},
		{"quoted", "RUN <<'EOF'\necho $A\nEOF", sh("echo $A\n")},
		{"empty", "RUN <<EOF\nEOF", sh("")},
		{"what shells and JSON take for special", "RUN <<EOF\n'$A' \"$B\" `c` <&> \\n \\\\ \t\x01\x7f é\u2028\r\nEOF", sh("'$A' \"$B\" `c` <&> \\n \\\\ \t\x01\x7f é\u2028\r\n")},
		{"lines ending in backslashes", "RUN <<EOF\na \\\nb \\\\\n\\\n\\ \nEOF", sh("a \\\nb \\\\\n\\\n\\ \n")},
		{"comments and empty lines", "RUN <<EOF\n# one\n\n  # two\n\t#\n \na # b\nEOF", sh("# one\n\n  # two\n\t#\n \na # b\n")},
		{"instructions", "RUN <<EOF\nFROM x\nRUN y\nONBUILD\nEOF", sh("FROM x\nRUN y\nONBUILD\n")},
		{"tabs", "RUN <<-EOF\n\t\techo a\n\tEOF", sh("echo a\n")},
		{"no tabs", "RUN <<EOF\n\techo a\n\tEOF\nEOF", sh("\techo a\n\tEOF\n")},
		{"a space more", "RUN  <<EOF \ntrue\nEOF", sh("true\n")},
		{"of a command", "RUN cat <<EOF >/x && true\na $A\nEOF", sh("cat <<EOF >/x && true\na $A\nEOF")},
		{"of a command, quoted", "RUN cat <<'E F' >/x\na\nE F", sh("cat <<'E F' >/x\na\nE F")},
		{"of a command, with tabs", "RUN cat <<-EOF\n\ta\n\tEOF", sh("cat <<-EOF\n\ta\nEOF")},
		{"two commands in two lines", "RUN cat <<A >a; \\\n  cat <<B >b\n1\nA\n2\nB", sh("cat <<A >a;   cat <<B >b\n1\nA\n2\nB")},
		{"file descriptors", "RUN <<EOF 3<<IN awk -f -\nx\nEOF\ny\nIN", sh("<<EOF 3<<IN awk -f -\nx\nEOF\ny\nIN")},
		{"long", "RUN <<EOF\n" + long + "\nEOF", sh(long + "\n")},
		{"shell", "SHELL [\"/bin/bash\", \"-eo\", \"pipefail\", \"-c\"]\nRUN <<EOF\na\nEOF", []string{"/bin/bash", "-eo", "pipefail", "-c", "a\n"}},
		{"shell of the stage below", "SHELL [\"/bin/awk\"]\nFROM a\nRUN <<EOF\n{}\nEOF", []string{"/bin/awk", "{}\n"}},
	} {
		for _, escape := range []string{`\`, "`"} {
			t.Run(tt.name+" "+escape, func(t *testing.T) {
				source := "FROM base AS a\n" + tt.dockerfile
				want := tt.want
				if escape != `\` {
					source = "# escape=" + escape + "\n" + strings.ReplaceAll(source, "\\\n  cat", escape+"\n  cat")
				}
				r, err := rewriteOf(source+"\nUSER me", shed.BuildOptions{}, v1.Config{})
				if err != nil {
					t.Fatal(err)
				}
				all := parsed(t, r.text)
				run, ok := all[len(all)-2].(*instructions.RunCommand)
				if !ok || run.PrependShell || !slices.Equal(run.CmdLine, want) {
					t.Errorf("got %v\nwant %q\nin %s", run, want, r.text)
				}
				for i, line := range bytes.Split(r.text, []byte("\n")) {
					if len(line) >= 60<<10 {
						t.Errorf("line %d has %d bytes", i+1, len(line))
					}
				}
				if r.shown[0] != run.String() || !strings.HasPrefix(r.shown[1], "RUN ") || !strings.Contains(r.shown[1], "(line ") {
					t.Errorf("%.100q, which is %.100q, is shown as %q", run.String(), r.shown[0], r.shown[1:])
				}
			})
		}
	}
}

func TestHeredocScript(t *testing.T) {
	for _, tt := range []struct{ dockerfile, want string }{
		{"FROM a\nRUN --network=none --mount=type=tmpfs,target=/t <<EOF\n#!/bin/awk -f\n{ \\\n}\nEOF", "#!/bin/awk -f\n{ \\\n}\n"},
		{"FROM a\nRUN --network=none --mount=type=tmpfs,target=/t <<-'EOF'\n\t#!/bin/sh\n\t\xff\x00\n\tEOF", "#!/bin/sh\n\xff\x00\n"},
	} {
		r, err := rewriteOf(tt.dockerfile, shed.BuildOptions{}, v1.Config{})
		if err != nil {
			t.Fatal(err)
		}
		run := parsed(t, r.text)[0].(*instructions.RunCommand)
		if err := run.Expand(func(word string) (string, error) { return word, nil }); err != nil {
			t.Fatal(err)
		}
		mounts := instructions.GetMounts(run)
		if len(mounts) != 2 || mounts[1].From != heredocContext || mounts[1].Target != run.CmdLine[0] || !run.PrependShell {
			t.Fatalf("%s has %d mounts and runs %q", run, len(mounts), run.CmdLine)
		}
		if f := r.files[mounts[1].Source]; f.content != tt.want || f.mode != 0o755 {
			t.Errorf("the script is %+v, want %q", f, tt.want)
		}
	}
}

func TestCopyHeredocs(t *testing.T) {
	base := v1.Config{Env: []string{"FROMBASE=base", "PATH=/bin"}}
	opts := shed.BuildOptions{Args: map[string]string{"GIVEN": "given", "GLOBAL": "global", "FROMBASE": "no"}}
	const head = "ARG GLOBAL=no\nARG OTHER=other\nFROM base AS a\nARG GIVEN=no DEFAULT=d\nENV E=$GIVEN-e F='f g'\nFROM a\nARG GLOBAL OTHER UNSET FROMBASE\nENV E=new G=$E\n"
	for _, tt := range []struct {
		name, dockerfile, says string
		want                   []string // contents
	}{
		{"plain", "COPY <<EOF /x\nhi\n# no comment\n\\\nEOF", "/x", []string{"hi\n# no comment\n\n"}},
		{"variables", "COPY <<EOF /x\n$GIVEN ${DEFAULT} $E $F $G $GLOBAL $OTHER [$UNSET$NONE] $FROMBASE $PATH ${NONE:-dflt} ${E:+yes}\nEOF", "/x",
			[]string{"given d new f g given-e global other [] base /bin dflt yes\n"}},
		{"not escaped ones", "COPY <<EOF /x\n\\$E \\\\ \"$E\" '$E' \\n\nEOF", "/x", []string{"$E \\ \"new\" 'new' n\n"}},
		{"quoted", "COPY <<'EOF' /x\n$E \\$ \\\\ \\\n'\"\nEOF", "/x", []string{"$E \\$ \\\\ \\\n'\"\n"}},
		{"quoted twice", "COPY <<\"EOF\" /x\n$E\nEOF", "/x", []string{"$E\n"}},
		{"tabs", "COPY <<-EOF /x\n\t\ta\n\tb\n\tEOF", "/x", []string{"a\nb\n"}},
		{"several", "COPY <<a.txt <<'b' /dir/\n$E\na.txt\n$E\nb", "/dir/", []string{"new\n", "$E\n"}},
		{"flags", "COPY --chown=me:$GIVEN --chmod=755 <<EOF /$E\nEOF", "/$E", []string{""}},
		{"ADD", "ADD --chmod=600 <<EOF /x\nhi\nEOF", "/x", []string{"hi\n"}},
		{"bytes", "COPY <<'EOF' /x\n\xff\x00\nEOF", "/x", []string{"\xff\x00\n"}},
		{"link", "COPY --link <<EOF /x\nhi\nEOF", "/x", []string{"hi\n"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := rewriteOf(head+tt.dockerfile, opts, base)
			if err != nil {
				t.Fatal(err)
			}
			all := parsed(t, r.text)
			got := all[len(all)-1].(*instructions.CopyCommand)
			if got.From != heredocContext || got.DestPath != tt.says || len(got.SourcePaths) != len(tt.want) {
				t.Fatalf("got %s", got)
			}
			for i, want := range tt.want {
				if f := r.files[got.SourcePaths[i]]; f.content != want || f.mode != 0o644 {
					t.Errorf("%s is %q with mode %o, want %q", got.SourcePaths[i], f.content, f.mode, want)
				}
			}
			if tt.name == "several" && (path.Base(got.SourcePaths[0]) != "a.txt" || path.Base(got.SourcePaths[1]) != "b") {
				t.Errorf("the files are called %q", got.SourcePaths)
			}
			if tt.name == "flags" && (got.Chown != "me:$GIVEN" || got.Chmod != "755") {
				t.Errorf("got %s", got)
			}
		})
	}
}

// Each instruction is in the line that it was in.
func TestHeredocLines(t *testing.T) {
	const dockerfile = "FROM a\nRUN true \\\n  && cat <<EOF <<F\n# b\n\nEOF\nF\n\n# c\nENV A=1\nCOPY <<EOF /x\n1\n2\nEOF\nRUN <<EOF\nEOF\nUSER me\nRUN <<EOF\n#!/bin/sh\nEOF\nUSER you"
	r, err := rewriteOf(dockerfile, shed.BuildOptions{}, v1.Config{})
	if err != nil {
		t.Fatal(err)
	}
	got, want := parsed(t, r.text), []int{2, 10, 11, 15, 17, 18, 21}
	for i, cmd := range got {
		if line := cmd.Location()[0].Start.Line; line != want[i] {
			t.Errorf("%s is in line %d, want %d", cmd, line, want[i])
		}
	}
	if len(got) != len(want) {
		t.Errorf("there are %d instructions, want %d", len(got), len(want))
	}
}

// Nothing is known of the images that stages start from which aren't built, and nothing needed.
func TestHeredocsElsewhere(t *testing.T) {
	r, err := rewriteOf("FROM a\nCOPY <<EOF x /x\n${A:?}\nEOF\nFROM b\nUSER me\nFROM c\nRUN <<EOF\nRUN\nEOF", shed.BuildOptions{Target: "1"}, v1.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed(t, r.text); len(got) != 1 || got[0].Location()[0].Start.Line != 6 || len(r.files) > 0 {
		t.Errorf("got %v and %v", got, r.files)
	}
}

func TestHeredocErrors(t *testing.T) {
	for _, tt := range []struct {
		dockerfile, says, hint string
		code                   shed.Code
	}{
		{"FROM a\nONBUILD RUN <<EOF\nhi\nEOF", `in line 2, "ONBUILD RUN <<EOF"`, "RUN sh", shed.CodeUnsupported},
		{"FROM a\nRUN true\nRUN <<EOF\n\xff\nEOF", "in line 3", "RUN sh", shed.CodeUnsupported},
		{"FROM a\nRUN cat <<EOF\n\x00\nEOF", "not UTF-8 text", "RUN sh", shed.CodeUnsupported},
		{"FROM a\nCOPY <<EOF /x\n\xff\nEOF", "not UTF-8 text", "COPY that", shed.CodeUnsupported},
		{"FROM a\nCOPY <<EOF x /y/\nEOF", "other files", "another for the files", shed.CodeUnsupported},
		{"FROM a\nCOPY --from=b <<EOF /y\nEOF", "--chown and --chmod", "leave", shed.CodeUnsupported},
		{"FROM a\nADD --checksum=sha256:24454f830cdb571e2c4ad15481119c43b3cafd48dd869a9b2945d1036d1dc68d <<EOF /y\nEOF", "--chown and --chmod", "leave", shed.CodeUnsupported},
		{"FROM a\nCOPY <<../x /y/\n../x", `"../x"`, "EOF", shed.CodeUnsupported},
		{"FROM a\nCOPY <<'*' /y/\n*", `"*"`, "EOF", shed.CodeUnsupported},
		{"FROM a\nCOPY <<EOF /y\n${A:?missing}\nEOF", "missing", "<<'EOF'", shed.CodeInvalid},
		{"FROM a\nCOPY <<EOF /y\n${A\nEOF", "in line 2", "<<'EOF'", shed.CodeInvalid},
	} {
		_, err := rewriteOf(tt.dockerfile, shed.BuildOptions{}, v1.Config{})
		if shed.ErrorCode(err) != tt.code || !strings.Contains(err.Error(), tt.says) || !strings.Contains(shed.ErrorHint(err), tt.hint) {
			t.Errorf("%q gives %v, hint %q; want %s with %q and %q", tt.dockerfile, err, shed.ErrorHint(err), tt.code, tt.says, tt.hint)
		}
	}
}

func TestNoHeredocs(t *testing.T) {
	for _, line := range []string{"RUN cat <<<word", "RUN echo $((1<<3)) '<<EOF' \"<<EOF\"", `RUN ["echo", "<<EOF"]`, "ENV X=<<EOF", "# RUN <<EOF\nRUN true"} {
		dockerfile := "FROM a\n" + line
		if r, err := rewriteOf(dockerfile, shed.BuildOptions{}, v1.Config{}); err != nil || string(r.text) != dockerfile {
			t.Errorf("%q, which has no here-document, gives %v, %v", dockerfile, r, err)
		}
	}
}

func TestHeredocFiles(t *testing.T) {
	r := &rewritten{files: map[string]file{}}
	one, two := r.add("EOF", file{0o644, "one"}), r.add("EOF", file{0o755, "two"})
	var b bytes.Buffer
	if err := r.writeFiles(&b); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for in := tar.NewReader(&b); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = fmt.Sprintf("%o %s", h.Mode, content)
	}
	if len(got) != 2 || got[one] != "644 one" || got[two] != "755 two" {
		t.Errorf("got %v", got)
	}
}

// An error has the instruction as it was, and not the script that the builder made of it.
func TestBudOutput(t *testing.T) {
	var reported []string
	o := &budOutput{readable: strings.NewReplacer(`RUN ["/bin/sh","-c","a\nb\n"]`, "RUN <<EOF (line 3)"), report: func(line string) { reported = append(reported, line) }}
	for _, line := range []string{`[1/2] STEP 1/2: FROM x`, `[1/2] STEP 2/2: RUN ["/bin/sh","-c","a\nb\n"]`, "a: not found", `Error: building at STEP "RUN /bin/sh -c a`, "b", `": exit status 127`} {
		o.add(line)
	}
	want := "[1/2] STEP 1/2: FROM x\n[1/2] STEP 2/2: RUN <<EOF (line 3)\na: not found"
	if got := strings.Join(reported, "\n"); got != want {
		t.Errorf("reported %q, want %q", got, want)
	}
	if got := o.failure(); got != want+"\n"+`Error: building at STEP "RUN <<EOF (line 3)": exit status 127` {
		t.Errorf("the failure is %q", got)
	}
	o = &budOutput{readable: strings.NewReplacer(), report: func(string) {}}
	o.add(`Error: building at STEP "RUN false": exit status 1`)
	if got := o.failure(); got != `Error: building at STEP "RUN false": exit status 1` {
		t.Errorf("the failure is %q", got)
	}
}

func FuzzRewrite(f *testing.F) {
	f.Add("ARG V=1\nFROM a AS b\nRUN cat <<A <<-B\n$\n# \\\nA\n\tB\nCOPY <<EOF /x\n${V}\nEOF\nRUN <<X\n#!/bin/sh\nX\nFROM b\nRUN <<X\nX")
	f.Fuzz(func(t *testing.T, dockerfile string) {
		r, err := rewriteOf(dockerfile, shed.BuildOptions{}, v1.Config{})
		if err == nil {
			parsed(t, r.text)
		}
	})
}
