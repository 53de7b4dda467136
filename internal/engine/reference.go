//go:build linux

package engine

import (
	"cmp"
	"context"
	"regexp"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/image"
	"github.com/charliek/shed/internal/preset"
)

// PullPolicy says when a create pulls the image that it names.
type PullPolicy string

const (
	PullMissing PullPolicy = "missing" // where it isn't here
	PullAlways  PullPolicy = "always"  // where the registry has a newer one, or it isn't here
	PullNever   PullPolicy = "never"
)

// imageFor returns the image that a user names for a shed, pulled if the backend's policy wants it, and keeps it from
// being removed until release is called.
func (e *Engine) imageFor(ctx context.Context, b Backend, name string, p shed.Progress) (img *shed.Image, release func(), err error) {
	ref := expand(b, name, e.Version)
	pullable := b.Pull != PullNever && Pullable(ref)
	if !pullable || b.Pull != PullAlways {
		img, release, err = e.Config.Images.Acquire(ref)
		if !pullable || shed.ErrorCode(err) != shed.CodeNoImage {
			return img, release, err
		}
	}
	if _, perr := e.Config.Images.Pull(ctx, shed.PullOptions{Ref: ref}, p); perr != nil {
		if err == nil || ctx.Err() != nil { // it was not looked for here
			return nil, nil, perr
		}
		both := shed.Errorf(shed.ErrorCode(perr), "%w here, and it can't be pulled: %v", err, perr)
		return nil, nil, both.WithHint("%s", cmp.Or(shed.ErrorHint(perr), shed.ErrorHint(err)))
	}
	return e.Config.Images.Acquire(ref)
}

// digest matches what names an image here and nothing at a registry.
var digest = regexp.MustCompile(`^(sha256:)?[0-9a-f]{12,64}$`)

// Pullable says whether a reference can be one at a registry. The name of a preset is not: presets are made
// here, and an image that has such a name there is somebody else's.
func Pullable(ref string) bool {
	tag, err := image.Familiar(ref)
	return err == nil && !digest.MatchString(ref) && !slices.Contains(preset.Names(), tag)
}

// expand returns the reference that a name in a command or the configuration stands for.
func expand(b Backend, name, version string) string {
	if ref, ok := b.Aliases[name]; ok {
		name = ref
	}
	return strings.ReplaceAll(name, "v{version}", "v"+strings.TrimPrefix(version, "v"))
}

// ConfiguredImages returns the references of the images that the configuration names, sorted. version is that
// of this program.
func ConfiguredImages(backends map[string]Backend, version string) []string {
	var refs []string
	for _, b := range backends {
		refs = append(refs, expand(b, b.Image, version))
		for alias := range b.Aliases {
			refs = append(refs, expand(b, alias, version))
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}
