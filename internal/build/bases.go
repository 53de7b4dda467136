package build

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/charliek/shed"
	"github.com/moby/buildkit/frontend/dockerfile/command"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// bases returns the images that building a target, or the last stage, takes: those of FROM, of COPY --from and
// of RUN --mount=from=, sorted. No such target is CodeInvalid.
func (g *graph) bases(target string) ([]string, error) {
	last := len(g.stages) - 1
	if target != "" {
		n, ok := g.stage(target, len(g.stages))
		if !ok {
			return nil, shed.Errorf(shed.CodeInvalid, "the Dockerfile has no stage %q", target).WithHint("stages: %s", g.names())
		}
		last = n
	}
	if err := g.visit(last); err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(g.images)), nil
}

func dockerfileError(err error) error {
	where := ""
	var located *parser.LocationError
	if errors.As(err, &located) && len(located.Locations) > 0 && len(located.Locations[0]) > 0 {
		if line := located.Locations[0][0].Start.Line; line > 0 {
			where = fmt.Sprintf(" in line %d", line)
		}
	}
	return shed.Errorf(shed.CodeInvalid, "the Dockerfile is wrong%s: %w", where, err)
}

// pin has the FROMs in the lines of the Dockerfile take their images by what names has, which is what they are called in the
// builder: buildah finds no base by its digest, nor by an argument's default.
func (g *graph) pin(lines []string, names map[string]string) error {
	for n, s := range g.stages {
		ref, err := g.expand(s.BaseName)
		if err != nil {
			return err
		}
		name, ok := names[ref]
		if _, isStage := g.stage(ref, n); isStage || !ok {
			continue
		}
		from := strings.Fields(s.SourceCode)
		if i := slices.Index(from[1:], s.BaseName); i >= 0 {
			from[1+i] = name
			place(lines[s.Location[0].Start.Line-1:s.Location[len(s.Location)-1].End.Line], strings.Join(from, " "))
		}
	}
	return nil
}

// graph is a Dockerfile, to walk over the stages that a target needs.
type graph struct {
	dockerfile []byte
	stages     []instructions.Stage
	lex        *shell.Lex
	escape     rune              // what its lines go on in the next with
	given      map[string]string // arguments
	args       []string          // K=V, of those before the first FROM
	images     map[string]bool
	seen       map[int]bool
}

// parse reads a Dockerfile that gets these arguments. CodeInvalid says what is wrong with it, and where, and CodeUnsupported
// what is right and can't be built.
func parse(dockerfile []byte, args map[string]string) (*graph, error) {
	parsed, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return nil, dockerfileError(err)
	}
	if err := refuseTriggers(parsed.AST); err != nil {
		return nil, err
	}
	stages, declared, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		return nil, dockerfileError(err)
	}
	if len(stages) == 0 {
		return nil, shed.Errorf(shed.CodeInvalid, "the Dockerfile has no FROM")
	}
	g := &graph{
		dockerfile: dockerfile, stages: stages, lex: shell.NewLex(parsed.EscapeToken), escape: parsed.EscapeToken, given: args,
		images: map[string]bool{}, seen: map[int]bool{},
	}
	return g, g.setArgs(declared)
}

// refuseTriggers says where a Dockerfile has an ONBUILD with a here-document: the image would have it, for builders that know none.
func refuseTriggers(dockerfile *parser.Node) error {
	for _, node := range dockerfile.Children {
		if len(node.Heredocs) > 0 && strings.EqualFold(node.Value, command.Onbuild) {
			return heredocError(node.StartLine, node.Original, shed.Errorf(shed.CodeUnsupported, "it is in an ONBUILD").
				WithHint("put its lines in a file of the context instead: COPY it and, if they are commands, ONBUILD RUN sh on it; a few commands go on one line with &&"))
		}
	}
	return nil
}

// setArgs settles the arguments that FROM may use.
func (g *graph) setArgs(declared []instructions.ArgCommand) error {
	platform := "linux/" + runtime.GOARCH
	for _, p := range []string{"BUILD", "TARGET"} {
		g.args = append(g.args, p+"PLATFORM="+platform, p+"OS=linux", p+"ARCH="+runtime.GOARCH)
	}
	for _, cmd := range declared {
		for _, arg := range cmd.Args {
			value, ok := g.given[arg.Key]
			if !ok && arg.Value != nil {
				var err error
				if value, err = g.expand(*arg.Value); err != nil {
					return err
				}
				ok = true
			}
			if ok {
				g.args = append(g.args, arg.Key+"="+value)
			}
		}
	}
	return nil
}

func (g *graph) expand(word string) (string, error) {
	return g.expandIn(shell.EnvsFromSlice(g.args), word)
}

// stage finds a stage before the given one by its name or, as COPY --from may, its number.
func (g *graph) stage(name string, before int) (int, bool) {
	for i, s := range g.stages[:before] {
		if strings.EqualFold(s.Name, name) && name != "" {
			return i, true
		}
	}
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < before {
		return n, true
	}
	return 0, false
}

func (g *graph) names() string {
	var names []string
	for _, s := range g.stages {
		if s.Name != "" {
			names = append(names, s.Name)
		}
	}
	if len(names) == 0 {
		return "none has a name: write FROM ... AS NAME"
	}
	return strings.Join(names, ", ")
}

func (g *graph) visit(n int) error {
	if g.seen[n] {
		return nil
	}
	g.seen[n] = true
	s := g.stages[n]
	if err := g.need(s.BaseName, n); err != nil {
		return err
	}
	for _, cmd := range s.Commands {
		switch cmd := cmd.(type) {
		case *instructions.CopyCommand:
			if err := g.need(cmd.From, n); err != nil {
				return err
			}
		case *instructions.RunCommand:
			for _, m := range instructions.GetMounts(cmd) {
				if err := g.need(m.From, n); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// need notes what stage n takes from: another stage, or an image.
func (g *graph) need(from string, n int) error {
	name, err := g.expand(from)
	if err != nil {
		return err
	}
	switch i, ok := g.stage(name, n); {
	case ok:
		return g.visit(i)
	case name == "":
		if from != "" {
			return shed.Errorf(shed.CodeInvalid, "the Dockerfile takes from %q, which is empty", from).
				WithHint("give the argument with --build-arg, or a default: ARG NAME=VALUE before the first FROM")
		}
	case name != "scratch":
		g.images[name] = true
	}
	return nil
}
