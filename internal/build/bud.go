package build

import (
	"bytes"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/lines"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// input is what buildah builds from, all in the builder.
type input struct {
	dockerfile, context string
	heredocs            string            // directory of heredocContext, or "" if there are none
	bases               map[string]string // names of images, by those that the Dockerfile has for them
	shown               []string          // see rewritten
}

// prepare gives buildah what the Dockerfile says.
func (r run) prepare(g *graph, context string, bases map[string]string) (input, error) {
	in := input{dockerfile: path.Join(r.dir, "Dockerfile"), context: context, bases: bases}
	configs := map[string]v1.Config{}
	if g.hasHeredocs() {
		for ref, name := range bases {
			raw, err := r.config(name)
			if err != nil {
				return input{}, err
			}
			cfg, err := v1.ParseConfigFile(bytes.NewReader(raw))
			if err != nil {
				return input{}, shed.Errorf(shed.CodeInvalid, "the configuration of image %s: %w", ref, err)
			}
			configs[ref] = cfg.Config
		}
	}
	rewritten, err := g.rewrite(bases, configs)
	if err != nil {
		return input{}, err
	}
	in.shown = rewritten.shown
	if len(rewritten.files) > 0 {
		in.heredocs = path.Join(r.dir, heredocContext)
		var files bytes.Buffer
		if err := rewritten.writeFiles(&files); err != nil {
			return input{}, fmt.Errorf("packing the here-documents: %w", err)
		}
		if err := r.run(&files, nil, "sh", "-c", `mkdir "$1" && tar -x --no-same-owner -C "$1"`, "sh", in.heredocs); err != nil {
			return input{}, fmt.Errorf("sending the here-documents: %w", err)
		}
	}
	return in, r.write(bytes.NewReader(rewritten.text), in.dockerfile)
}

// config returns the configuration of an image of the builder, as it is.
func (r run) config(name string) ([]byte, error) {
	var config bytes.Buffer
	err := r.run(nil, &limitedWriter{w: &config, left: maxJSON}, "buildah", "inspect", "--type", "image", "--format", "{{.Config}}", name)
	return bytes.TrimSuffix(config.Bytes(), []byte("\n")), err
}

// bud runs buildah's build, of an image with that name in the builder. What it says is reported line by line.
func (r run) bud(opts shed.BuildOptions, in input, name string, p shed.Progress) error {
	// Only Docker's format has SHELL, HEALTHCHECK and ONBUILD. Of it, only the configuration leaves the builder.
	args := []string{"buildah", "bud", "--isolation", "chroot", "--layers", "--pull-never", "--format", "docker", "-f", in.dockerfile, "-t", name}
	known := slices.Concat(in.shown, []string{name, opts.Tag})
	for _, ref := range slices.Sorted(maps.Keys(in.bases)) {
		args = append(args, "--build-context", ref+"=container-image://"+in.bases[ref])
		known = append(known, in.bases[ref], ref)
	}
	if in.heredocs != "" {
		args = append(args, "--build-context", heredocContext+"="+in.heredocs)
	}
	for _, key := range slices.Sorted(maps.Keys(opts.Args)) {
		args = append(args, "--build-arg", key+"="+opts.Args[key])
	}
	if opts.Target != "" {
		args = append(args, "--target", opts.Target)
	}
	if opts.NoCache {
		args = append(args, "--no-cache")
	}
	done := p.Phase("build", "building "+opts.Tag)
	said := &budOutput{readable: strings.NewReplacer(known...), report: func(line string) { p.Report(shed.Event{Phase: "build", Message: line}) }}
	out := lines.New(0, said.add)
	status, err := r.stream(nil, out.Writer(), out.Writer(), append(args, in.context)...)
	if err != nil {
		return err
	}
	if status.Code != 0 {
		out.Last() // adds what doesn't end in a newline
		return shed.Errorf(shed.CodeCommand, "the build failed: %s%s", status.Error, said.failure())
	}
	done()
	return nil
}

// budOutput is what buildah says, and what it runs.
type budOutput struct {
	readable *strings.Replacer
	report   func(line string)
	step     string   // the last: an instruction
	last     []string // lines
	failed   []string // lines that say which step failed, one for each of its command's
}

var stepRE = regexp.MustCompile(`^(?:\[\d+/\d+\] )?STEP \d+/\d+: (.*)`)

// failedStep is followed by the instruction, which may have several lines, a quotation mark, and what was wrong.
const failedStep = `Error: building at STEP "`

func (o *budOutput) add(line string) {
	line = o.readable.Replace(line)
	if o.failed != nil || strings.HasPrefix(line, failedStep) {
		o.failed = append(o.failed, line)
		return
	}
	if found := stepRE.FindStringSubmatch(line); found != nil {
		o.step = found[1]
	}
	o.report(line)
	o.last = append(o.last, line)
	o.last = o.last[max(0, len(o.last)-lastLines):]
}

// failure returns the last lines, with a step of several written as one.
func (o *budOutput) failure() string {
	said := slices.Clone(o.last)
	if n := len(o.failed); n > 0 {
		end := o.failed[n-1]
		if i := strings.LastIndex(end, `": `); n > 1 && i >= 0 {
			end = failedStep + o.step + end[i:]
		}
		said = append(said, end)
	}
	return strings.Join(said, "\n")
}
