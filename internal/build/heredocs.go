package build

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

const (
	// heredocContext is the build context with the files that here-documents have become.
	heredocContext = "shed-here-documents"
	// scriptPath is where a here-document is while it runs as a script. Nothing of it stays in the image.
	scriptPath = "/run/here-document"
)

// rewritten is a Dockerfile as buildah takes it: the one of Debian 12 knows no here-documents, and needs its bases by the names that
// they have in the builder. Each instruction begins in the line that it did.
type rewritten struct {
	text  []byte
	files map[string]file // of heredocContext, by path
	shown []string        // pairs of what buildah calls an instruction, and what it was
}

type file struct {
	mode    int64
	content string
}

// rewrite rewrites the Dockerfile after a call of bases. names has what images are called in the builder, and configs the
// configurations of those that stages start from, both by the names that the Dockerfile has for them.
func (g *graph) rewrite(names map[string]string, configs map[string]v1.Config) (*rewritten, error) {
	lines := strings.SplitAfter(string(g.dockerfile), "\n")
	if err := g.pin(lines, names); err != nil {
		return nil, err
	}
	r := &rewritten{files: map[string]file{}}
	scopes := make([]scope, len(g.stages))
	for n, s := range g.stages {
		ref, err := g.expand(s.BaseName)
		if err != nil {
			return nil, err
		}
		if i, ok := g.stage(ref, n); ok {
			scopes[n] = scopes[i].clone()
		} else {
			scopes[n] = newScope(configs[ref])
		}
		for _, cmd := range s.Commands {
			if err := g.follow(&scopes[n], cmd); err != nil {
				return nil, err
			}
			if !hasHeredocs(cmd) {
				continue
			}
			text := ""
			if g.seen[n] { // of other stages, nothing is built
				if text, err = g.replacement(r, cmd, scopes[n]); err != nil {
					return nil, err
				}
			}
			where := cmd.Location()
			place(lines[where[0].Start.Line-1:where[len(where)-1].End.Line], text)
		}
	}
	r.text = []byte(strings.Join(lines, ""))
	return r, nil
}

// hasHeredocs says whether there are here-documents in a stage that is built.
func (g *graph) hasHeredocs() bool {
	for n, s := range g.stages {
		if g.seen[n] && slices.ContainsFunc(s.Commands, hasHeredocs) {
			return true
		}
	}
	return false
}

func hasHeredocs(cmd instructions.Command) bool {
	switch cmd := cmd.(type) {
	case *instructions.RunCommand:
		return len(cmd.Files) > 0
	case *instructions.CopyCommand:
		return len(cmd.SourceContents) > 0
	case *instructions.AddCommand:
		return len(cmd.SourceContents) > 0
	}
	return false
}

// place puts text in the room that lines have.
func place(room []string, text string) {
	for i := range room {
		room[i] = "\n"
	}
	parts := strings.SplitAfterN(text, "\n", len(room))
	parts[len(parts)-1] += "\n"
	copy(room, parts)
}

// replacement returns what does the same as an instruction with here-documents. It has no use for --link, which says
// how a layer may be kept.
func (g *graph) replacement(r *rewritten, cmd instructions.Command, sc scope) (text string, err error) {
	var says string
	switch cmd := cmd.(type) {
	case *instructions.RunCommand:
		says, text, err = r.run(cmd, sc, g.escape)
	case *instructions.CopyCommand:
		plain := cmd.From == "" && !cmd.Parents && len(cmd.ExcludePatterns) == 0
		says, err = r.copy(cmd.SourcesAndDest, cmd.Chown, cmd.Chmod, plain, sc)
		text = says
	case *instructions.AddCommand:
		plain := cmd.KeepGitDir == nil && cmd.Checksum == "" && cmd.Unpack == nil && len(cmd.ExcludePatterns) == 0
		says, err = r.copy(cmd.SourcesAndDest, cmd.Chown, cmd.Chmod, plain, sc)
		text = says
	}
	line := cmd.Location()[0].Start.Line
	if err != nil {
		return "", heredocError(line, cmd, err)
	}
	r.shown = append(r.shown, says, fmt.Sprintf("%s (line %d)", cmd, line))
	return text, nil
}

// run returns what runs a RUN's here-documents: what buildah calls it, and how it is written.
func (r *rewritten) run(cmd *instructions.RunCommand, sc scope, escape rune) (says, text string, err error) {
	line := cmd.CmdLine[0]
	flags := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(cmd.String()), line))
	if whole := parser.MustParseHeredoc(line); whole == nil { // the shell has here-documents of its own
		for _, f := range cmd.Files {
			line += "\n" + f.Data + f.Name
		}
	} else {
		line = cmd.Files[0].Data
		if cmd.Files[0].Chomp {
			line = parser.ChompHeredocContent(line)
		}
		if strings.HasPrefix(line, "#!") {
			source := r.add("script", file{mode: 0o755, content: line})
			says = fmt.Sprintf("%s --mount=type=bind,from=%s,source=%s,target=%s %s", flags, heredocContext, source, scriptPath, scriptPath)
			return says, says, nil
		}
	}
	if err := checkText(line); err != nil {
		return "", "", err
	}
	array := execForm(append(slices.Clone(sc.shell), line), escape)
	continuation := string(escape) + "\n"
	return flags + " " + strings.ReplaceAll(array, continuation, ""), flags + " " + array, nil
}

// checkText says whether a here-document is one that goes through a shell or the expansion of variables unchanged.
func checkText(s string) error {
	if utf8.ValidString(s) && !strings.ContainsRune(s, 0) {
		return nil
	}
	return shed.Errorf(shed.CodeUnsupported, "it is not UTF-8 text").WithHint("put it in a file of the context and COPY that; if it is commands, RUN sh on it")
}

// nameRE is what the names of files made from here-documents are like: buildah takes others for patterns, or for several.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// copy returns what copies here-documents to where they go.
func (r *rewritten) copy(sd instructions.SourcesAndDest, chown, chmod string, plain bool, sc scope) (string, error) {
	if len(sd.SourcePaths) > 0 {
		return "", shed.Errorf(shed.CodeUnsupported, "it has other files too").
			WithHint("write one COPY for the here-documents, and another for the files")
	}
	if !plain {
		return "", shed.Errorf(shed.CodeUnsupported, "of its flags, only --chown and --chmod work with a here-document").WithHint("leave the others out")
	}
	words := []string{"COPY", "--from=" + heredocContext}
	if chown != "" {
		words = append(words, "--chown="+chown)
	}
	if chmod != "" {
		words = append(words, "--chmod="+chmod)
	}
	for _, src := range sd.SourceContents {
		if !nameRE.MatchString(src.Path) {
			return "", shed.Errorf(shed.CodeUnsupported, "%q, which ends it, can't be the name of the file", src.Path).
				WithHint("end it with a word of letters and digits, like EOF")
		}
		if src.Expand {
			err := checkText(src.Data)
			if err != nil {
				return "", err
			}
			if src.Data, err = sc.expandDocument(src.Data); err != nil {
				return "", shed.Errorf(shed.CodeInvalid, "%w", err).WithHint(`write \$ for a $ that is to stay, or quote the word that ends it: <<'EOF'`)
			}
		}
		words = append(words, r.add(src.Path, file{mode: 0o644, content: src.Data}))
	}
	return strings.Join(append(words, sd.DestPath), " "), nil
}

// add adds a file and returns its path. It is another for another content, so that no cache takes one for the other.
func (r *rewritten) add(name string, f file) (source string) {
	sum := sha256.Sum256([]byte(f.content))
	source = path.Join(hex.EncodeToString(sum[:16]), name)
	r.files[source] = f
	return source
}

// writeFiles writes a tar of the files.
func (r *rewritten) writeFiles(w io.Writer) error {
	out := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(r.files)) {
		f := r.files[name]
		err := out.WriteHeader(&tar.Header{Name: name, Mode: f.mode, Size: int64(len(f.content)), ModTime: time.Now()})
		if err != nil {
			return err
		}
		if _, err := io.WriteString(out, f.content); err != nil {
			return err
		}
	}
	return out.Close()
}

// execForm writes the arguments of an instruction as JSON. It goes on in the next line where an argument does, and where
// it would be longer than a parser takes.
func execForm(args []string, escape rune) string {
	const longest = 16 << 10 // bytes
	var b strings.Builder
	b.WriteByte('[')
	start := 0      // of the line, in b
	indent := false // whether there is only space in the line yet
	for i, arg := range args {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('"')
		for j, c := range arg {
			rest := j+utf8.RuneLen(c) < len(arg)
			switch {
			case c == '\n':
				b.WriteString(`\n`)
			case c == '"' || c == '\\':
				b.WriteByte('\\')
				b.WriteRune(c)
			case c < ' ' || c == 0x7f || c == '#' && indent: // a line that begins with # is a comment, in the midst of an instruction too
				fmt.Fprintf(&b, `\u%04x`, c)
			default:
				b.WriteRune(c)
			}
			indent = indent && (c == ' ' || c == '\t')
			// What is before the escape character must not be one too.
			long := b.Len()-start > longest && c != escape && c != '\\'
			if rest && (c == '\n' || long) {
				b.WriteRune(escape)
				b.WriteByte('\n')
				start, indent = b.Len(), true
			}
		}
		b.WriteByte('"')
	}
	b.WriteByte(']')
	return b.String()
}

// heredocError says where a Dockerfile has a here-document that can't be built.
func heredocError(line int, cmd any, err error) error {
	e := shed.Errorf(shed.ErrorCode(err), "the Dockerfile has a here-document in line %d, %.200q, that can't be built here: %w", line, fmt.Sprint(cmd), err)
	return e.WithHint("%s", shed.ErrorHint(err))
}
