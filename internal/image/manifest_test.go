package image

import (
	"runtime"
	"strings"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestWantedPlatform(t *testing.T) {
	for s, want := range map[string]v1.Platform{
		"":               {OS: "linux", Architecture: runtime.GOARCH},
		"linux/arm64":    {OS: "linux", Architecture: "arm64"},
		"linux/arm64/v8": {OS: "linux", Architecture: "arm64", Variant: "v8"},
	} {
		if got, err := wantedPlatform(s); err != nil || !got.Equals(want) {
			t.Errorf("%q is %+v, %v", s, got, err)
		}
	}
	for s, code := range map[string]shed.Code{
		"arm64": shed.CodeInvalid, "linux/": shed.CodeInvalid, "linux/arm/v7/x": shed.CodeInvalid, "windows/amd64": shed.CodeUnsupported,
	} {
		if got, err := wantedPlatform(s); shed.ErrorCode(err) != code {
			t.Errorf("%q is %+v, %v", s, got, err)
		}
	}
}

func TestCandidates(t *testing.T) {
	// Of each entry, the size is its name.
	entry := func(size int64, platform string, mediaType types.MediaType) v1.Descriptor {
		d := v1.Descriptor{Size: size, MediaType: mediaType}
		if platform != "" {
			p, err := v1.ParsePlatform(platform)
			if err != nil {
				t.Fatal(err)
			}
			d.Platform = p
		}
		return d
	}
	attestation := entry(9, "linux/arm64", types.OCIManifestSchema1)
	attestation.Annotations = map[string]string{referenceType: attestationManifest}
	index := &v1.IndexManifest{Manifests: []v1.Descriptor{
		entry(0, "unknown/unknown", types.OCIManifestSchema1),
		entry(1, "", types.OCIImageIndex),
		entry(2, "linux/amd64/v3", types.OCIManifestSchema1),
		entry(3, "linux/amd64", types.DockerManifestSchema2),
		entry(4, "linux/arm64/v8", types.OCIManifestSchema1),
		entry(5, "linux/arm/v7", types.OCIManifestSchema1),
		entry(6, "linux/arm/v6", types.OCIManifestSchema1),
		entry(7, "windows/amd64", types.OCIManifestSchema1),
		entry(8, "linux/arm64", "application/x-something"),
		attestation,
	}}
	for platform, want := range map[string][]int64{
		"linux/amd64":    {3, 2, 1},
		"linux/amd64/v3": {2, 1},
		"linux/arm64":    {4, 1},
		"linux/arm64/v8": {4, 1},
		"linux/arm/v6":   {6, 1},
		"linux/arm":      {5, 6, 1},
		"linux/s390x":    {1},
	} {
		p, err := wantedPlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		fitting, others := candidates(index, p)
		var got []int64
		for _, d := range fitting {
			got = append(got, d.Size)
		}
		if len(got) != len(want) || len(got)+len(others) != 7 {
			t.Errorf("for %s there are %v and %q, want %v", platform, got, others, want)
			continue
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("for %s there are %v, want %v", platform, got, want)
			}
		}
	}
}

func FuzzManifest(f *testing.F) {
	hash := `"sha256:` + strings.Repeat("0", 64) + `"`
	f.Add([]byte(`{"schemaVersion": 2, "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2, "digest": `+hash+`}, "layers": [
		{"mediaType": "application/vnd.oci.image.layer.v1.tar", "size": 1, "digest": `+hash+`}]}`), string(types.OCIManifestSchema1), []byte(`{"os": "linux", "rootfs": {"diff_ids": [`+hash+`]}}`))
	f.Add([]byte(`{"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": `+hash+`, "platform": {"os": "linux", "architecture": "arm64"}}]}`),
		string(types.OCIImageIndex), []byte(`{}`))
	f.Add([]byte(`{"schemaVersion": 1}`), "", []byte(`null`))
	f.Fuzz(func(t *testing.T, raw []byte, contentType string, config []byte) {
		m, index, mediaType, err := parseManifest(raw, contentType)
		if err != nil {
			if code := shed.ErrorCode(err); code != shed.CodeInvalid && code != shed.CodeUnsupported {
				t.Errorf("the code of %v is %s", err, code)
			}
			return
		}
		if (m == nil) == (index == nil) || mediaType.IsImage() != (m != nil) || mediaType.IsIndex() != (index != nil) {
			t.Fatalf("%q is %v and %v, %q", raw, m, index, mediaType)
		}
		want, _ := wantedPlatform("")
		if index != nil {
			fitting, _ := candidates(index, want)
			for _, d := range fitting {
				if !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
					t.Errorf("%+v is a candidate", d)
				}
			}
			return
		}
		cfg, err := parseConfig(config, m)
		if err != nil {
			return
		}
		if len(cfg.RootFS.DiffIDs) != len(m.Layers) {
			t.Errorf("there are %d diff IDs for %d layers", len(cfg.RootFS.DiffIDs), len(m.Layers))
		}
		_ = checkPlatform(cfg, want, "")
		for _, h := range append(blobsOf(m), cfg.RootFS.DiffIDs...) {
			_ = short(h)
		}
	})
}
