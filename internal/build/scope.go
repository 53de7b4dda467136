package build

import (
	"maps"
	"slices"
	"strings"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// scope is what holds at one place of a stage: variables, as a shell.EnvGetter, and the shell of RUN.
type scope struct {
	env, args map[string]string // of ENV and the image, which win, and of ARG
	shell     []string
}

func newScope(base v1.Config) scope {
	sc := scope{env: map[string]string{}, args: map[string]string{}, shell: base.Shell}
	if len(sc.shell) == 0 {
		sc.shell = []string{"/bin/sh", "-c"}
	}
	for _, kv := range base.Env {
		key, value, _ := strings.Cut(kv, "=")
		sc.env[key] = value
	}
	return sc
}

func (sc scope) clone() scope {
	return scope{env: maps.Clone(sc.env), args: maps.Clone(sc.args), shell: sc.shell}
}

func (sc scope) Get(key string) (string, bool) {
	if value, ok := sc.env[key]; ok {
		return value, true
	}
	value, ok := sc.args[key]
	return value, ok
}

func (sc scope) Keys() []string {
	return slices.AppendSeq(slices.Collect(maps.Keys(sc.env)), maps.Keys(sc.args))
}

// expandDocument replaces the variables in a here-document.
func (sc scope) expandDocument(text string) (string, error) {
	lex := shell.NewLex('\\')
	lex.SkipProcessQuotes = true
	out, err := lex.ProcessWordWithMatches(text, sc)
	return out.Result, err
}

// follow does to the scope what an instruction does.
func (g *graph) follow(sc *scope, cmd instructions.Command) error {
	switch cmd := cmd.(type) {
	case *instructions.ShellCommand:
		sc.shell = cmd.Shell
	case *instructions.ArgCommand:
		for _, arg := range cmd.Args {
			value, ok := g.given[arg.Key]
			if !ok && arg.Value != nil {
				var err error
				if value, err = g.expandIn(*sc, *arg.Value); err != nil {
					return err
				}
			} else if !ok {
				if value, ok = shell.EnvsFromSlice(g.args).Get(arg.Key); !ok {
					continue
				}
			}
			sc.args[arg.Key] = value
		}
	case *instructions.EnvCommand:
		before := sc.clone() // none of these sees the others
		for _, kv := range cmd.Env {
			key, err := g.expandIn(before, kv.Key)
			if err != nil {
				return err
			}
			if sc.env[key], err = g.expandIn(before, kv.Value); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *graph) expandIn(env shell.EnvGetter, word string) (string, error) {
	out, err := g.lex.ProcessWordWithMatches(word, env)
	if err != nil {
		return "", shed.Errorf(shed.CodeInvalid, "the Dockerfile's %q: %w", word, err)
	}
	return out.Result, nil
}
