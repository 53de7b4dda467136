package image

import (
	"bytes"
	"encoding/json"
	"mime"
	"runtime"
	"slices"
	"strings"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// maxManifest is what registries commonly allow a manifest or an index to have, in bytes.
	maxManifest = 4 << 20

	referenceType       = "vnd.docker.reference.type" // annotation of what buildx adds to an index for an image
	attestationManifest = "attestation-manifest"
)

// accepted are the kinds of manifests that are asked for.
var accepted = []string{
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2), string(types.OCIImageIndex), string(types.DockerManifestList),
}

// parseManifest reads an image's manifest or an index: one of them is not nil. The content decides
// which of the two it is, and may not leave it open. contentType is what the registry calls it.
func parseManifest(raw []byte, contentType string) (*v1.Manifest, *v1.IndexManifest, types.MediaType, error) {
	var outline struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		FSLayers      json.RawMessage `json:"fsLayers"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &outline); err != nil {
		return nil, nil, "", shed.Errorf(shed.CodeInvalid, "its manifest is no JSON document of that kind: %w", err).
			WithHint("is that the address of an image registry?")
	}
	mediaType := outline.MediaType
	if mediaType == "" {
		parsed, _, _ := mime.ParseMediaType(contentType) // what can't be parsed is no type that is known
		mediaType = types.MediaType(parsed)
	}
	index := outline.Manifests != nil
	switch {
	case outline.FSLayers != nil || outline.SchemaVersion == 1 || mediaType.IsSchema1():
		return nil, nil, "", shed.Errorf(shed.CodeUnsupported, "its manifest is of Docker's old schema 1, which says too little to check an image by").
			WithHint("push the image again with a current tool")
	case index && (outline.Layers != nil || outline.Config != nil):
		return nil, nil, "", shed.Errorf(shed.CodeInvalid, "its manifest is one of an image and an index at the same time")
	case index && !mediaType.IsIndex(), !index && !mediaType.IsImage():
		return nil, nil, "", shed.Errorf(shed.CodeUnsupported, "its manifest is a %q, which is no image", mediaType)
	}
	if index {
		parsed, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, nil, "", shed.Errorf(shed.CodeInvalid, "its index: %w", err)
		}
		return nil, parsed, mediaType, nil
	}
	parsed, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, "", shed.Errorf(shed.CodeInvalid, "its manifest: %w", err)
	}
	return parsed, nil, mediaType, checkManifest(parsed)
}

// checkManifest says whether an image's layers and configuration are of a kind that can be used.
func checkManifest(m *v1.Manifest) error {
	if !m.Config.MediaType.IsConfig() || m.ArtifactType != "" && !types.MediaType(m.ArtifactType).IsConfig() {
		kind := m.Config.MediaType
		if m.ArtifactType != "" {
			kind = types.MediaType(m.ArtifactType)
		}
		return shed.Errorf(shed.CodeUnsupported, "it is a %q, not a container image", kind)
	}
	if m.Config.Size < 0 || m.Config.Size > maxJSON {
		return shed.Errorf(shed.CodeInvalid, "its configuration has %d bytes, and %d are the limit", m.Config.Size, maxJSON)
	}
	return checkLayers(m)
}

// checkLayers says whether an image's layers can be converted.
func checkLayers(m *v1.Manifest) error {
	for _, l := range m.Layers {
		if _, ok := decompressors[l.MediaType]; !ok {
			return shed.Errorf(shed.CodeUnsupported, "layer %s is a %q; a layer must be a tar, plain or compressed with gzip or zstd", l.Digest, l.MediaType)
		}
		if l.Size < 0 {
			return shed.Errorf(shed.CodeInvalid, "layer %s has %d bytes", l.Digest, l.Size)
		}
	}
	return nil
}

// parseConfig reads the configuration that belongs to the manifest m.
func parseConfig(raw []byte, m *v1.Manifest) (*v1.ConfigFile, error) {
	var cfg v1.ConfigFile
	if err := json.Unmarshal(raw, &cfg); err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "its configuration: %w", err)
	}
	if len(m.Layers) != len(cfg.RootFS.DiffIDs) {
		return nil, shed.Errorf(shed.CodeInvalid, "its manifest has %d layers, its configuration %d", len(m.Layers), len(cfg.RootFS.DiffIDs))
	}
	for _, diffID := range cfg.RootFS.DiffIDs {
		if diffID.Algorithm != "sha256" {
			return nil, shed.Errorf(shed.CodeUnsupported, "its layer %s: only sha256 diff IDs are supported", diffID)
		}
	}
	return &cfg, nil
}

// wantedPlatform returns the platform that a user asked for, or the host's.
func wantedPlatform(s string) (v1.Platform, error) {
	if s == "" {
		return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
		return v1.Platform{}, shed.Errorf(shed.CodeInvalid, "%q is no platform", s).WithHint("write OS/ARCHITECTURE[/VARIANT], like linux/arm64")
	}
	p := v1.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	if p.OS != "linux" {
		return v1.Platform{}, shed.Errorf(shed.CodeUnsupported, "%s: sheds run Linux", s)
	}
	return p, nil
}

// platformName is what people call p, without what only Windows has.
func platformName(p v1.Platform) string {
	return v1.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}.String()
}

// fits says whether what is made for p is what was asked for.
func fits(p, want v1.Platform) bool {
	return p.OS == want.OS && p.Architecture == want.Architecture &&
		(want.Variant == "" || variant(p) == variant(want))
}

// variant returns p's variant, also where it goes without saying.
func variant(p v1.Platform) string {
	if p.Variant == "" && p.Architecture == "arm64" {
		return "v8"
	}
	return p.Variant
}

// candidates returns the entries of an index that may lead to the image that was asked for, best first, and
// the names of the platforms that it has. An entry that doesn't say its platform, as those of nested indexes may not, may lead there.
func candidates(index *v1.IndexManifest, want v1.Platform) (fitting []v1.Descriptor, others []string) {
	var exact, near, open []v1.Descriptor
	for _, d := range index.Manifests {
		p := d.Platform
		switch {
		case !d.MediaType.IsImage() && !d.MediaType.IsIndex(), d.Annotations[referenceType] == attestationManifest,
			p != nil && p.OS == "unknown" && p.Architecture == "unknown":
		case p == nil || p.OS == "" && p.Architecture == "":
			open = append(open, d)
		case fits(*p, want) && (p.Variant == "" || variant(*p) == variant(want)):
			exact = append(exact, d)
		case fits(*p, want):
			near = append(near, d)
		default:
			others = append(others, platformName(*p))
		}
	}
	return slices.Concat(exact, near, open), others
}
