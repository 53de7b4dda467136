package shed

import (
	"context"
	"io"
	"time"
)

// ImageSource says why an image is in a server's store.
type ImageSource string

const (
	SourceConfig   ImageSource = "config"   // the server's configuration names it
	SourceUser     ImageSource = "user"     // somebody pulled, built, loaded or tagged it
	SourceDangling ImageSource = "dangling" // it has no tag: only sheds may use it
)

// Image is an OCI image in the server's store.
type Image struct {
	Ref       string      `json:"ref"`    // tag, or "" where it has lost its
	Digest    string      `json:"digest"` // of the manifest: sha256:...
	Source    ImageSource `json:"source"`
	Platform  string      `json:"platform"` // "linux/amd64", as the image says
	Size      int64       `json:"size"`     // bytes on disk: blobs and block images
	InUse     []string    `json:"in_use"`   // names of sheds
	CreatedAt time.Time   `json:"created_at"`
	Layers    []Layer     `json:"layers"` // bottom first
	// Problem says what is damaged or missing of an image. One that can't be read has no platform and no layers.
	Problem string `json:"problem,omitempty"`
}

// Layer is one read-only layer of an image.
type Layer struct {
	Digest     string `json:"digest"`      // of the blob as stored
	DiffID     string `json:"diff_id"`     // of the uncompressed tar
	Size       int64  `json:"size"`        // bytes, of the blob
	BlockImage int64  `json:"block_image"` // bytes on disk, of the block image; 0 if not made yet
}

// ImageDetail is all that is known of an image.
type ImageDetail struct {
	Image
	MediaType string         `json:"media_type"` // of the manifest
	Config    ImageConfig    `json:"config"`
	History   []ImageHistory `json:"history"` // oldest first
}

// ImageConfig is what an image says about the programs that run in it.
type ImageConfig struct {
	User         string            `json:"user,omitempty"`
	WorkingDir   string            `json:"working_dir,omitempty"`
	Env          []string          `json:"env,omitempty"`
	Entrypoint   []string          `json:"entrypoint,omitempty"`
	Cmd          []string          `json:"cmd,omitempty"`
	ExposedPorts []string          `json:"exposed_ports,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
}

// ImageHistory is one step of how an image was made.
type ImageHistory struct {
	CreatedAt time.Time `json:"created_at,omitzero"`
	CreatedBy string    `json:"created_by,omitempty"`
	Comment   string    `json:"comment,omitempty"`
	Layer     *Layer    `json:"layer,omitempty"` // nil where the step made none
}

// PullOptions says which image to pull.
type PullOptions struct {
	Ref      string `json:"ref"`                // [REGISTRY/]REPOSITORY[:TAG][@DIGEST]
	Platform string `json:"platform,omitempty"` // "linux/arm64"; default: the server's own
}

// PushOptions says which image to push, and where to.
type PushOptions struct {
	Image string `json:"image"`        // as Resolve takes it
	To    string `json:"to,omitempty"` // [REGISTRY/]REPOSITORY[:TAG]; default: the image's tag
}

// Pushed is an image at a registry.
type Pushed struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"` // of the manifest there, which is the one here
}

// BuildOptions says how to build an image from a context with a Dockerfile.
type BuildOptions struct {
	Tag        string            `json:"tag"`
	Dockerfile string            `json:"dockerfile,omitempty"` // path in the context; default "Dockerfile"
	Target     string            `json:"target,omitempty"`     // stage; default: the last
	Args       map[string]string `json:"args,omitempty"`
	NoCache    bool              `json:"no_cache,omitempty"`
}

// Removed is what a removal took away, or would.
type Removed struct {
	Items []RemovedItem `json:"items"`
	Freed int64         `json:"freed"` // bytes on disk
}

// RemovedItem is one thing that a removal took away.
type RemovedItem struct {
	Kind string `json:"kind"` // "tag", "image", "blob", "block image", "partial download"
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes on disk
}

// Images is what a server does with images. The engine implements it, and so
// does the HTTP client.
//
// A method that takes an image's name takes a tag, a digest, or at least 12 digits of one;
// it returns CodeNoImage for one that no image has.
type Images interface {
	// Images returns all images, sorted by reference.
	Images(ctx context.Context) ([]*Image, error)

	InspectImage(ctx context.Context, name string) (*ImageDetail, error)

	// BuildPreset makes the named preset ("base", "extensions", "full") and tags it with its name.
	BuildPreset(ctx context.Context, preset string, p Progress) (*Image, error)

	// Build makes an image from a Dockerfile. buildContext is a tar of the context, as docker(1) sends it.
	// Lines that the build prints come as events of phase "build".
	Build(ctx context.Context, opts BuildOptions, buildContext io.Reader, p Progress) (*Image, error)

	// Pull gets an image from a registry, and its layers ready to boot from. What a pull
	// that fails has got is kept for the next.
	Pull(ctx context.Context, opts PullOptions, p Progress) (*Image, error)

	// Push copies an image to a registry, byte for byte.
	Push(ctx context.Context, opts PushOptions, p Progress) (*Pushed, error)

	// Save writes the named images as an OCI archive.
	Save(ctx context.Context, names []string, w io.Writer) error

	// Load takes in all images of an OCI archive, or of one by docker save; it returns them. On error there are none.
	Load(ctx context.Context, archive io.Reader, p Progress) ([]*Image, error)

	// Tag gives an image one more tag, which it takes from the image that had it.
	Tag(ctx context.Context, name, tag string) (*Image, error)

	// RemoveImage removes a tag or, given a digest, an image with all its tags; what nothing else needs goes
	// with it. CodeConflict if sheds use the image, unless force is set: then
	// only its tags go, and the rest with the last shed and a prune.
	RemoveImage(ctx context.Context, name string, force bool) (*Removed, error)

	// PruneImages removes what no tag, shed or running operation needs. With dryRun
	// it only says what that is. CodeConflict if it can't be told what a shed needs.
	PruneImages(ctx context.Context, dryRun bool) (*Removed, error)
}

// Info describes a server.
type Info struct {
	Name     string   `json:"name"`
	Version  string   `json:"version"`
	Backend  string   `json:"default_backend"`
	Backends []string `json:"backends"`
	Accel    string   `json:"accel"` // "kvm", "tcg", "hvf"
	StateDir string   `json:"state_dir"`
	SSH      string   `json:"ssh"` // HOST:PORT that the SSH server listens on
}

// HostKey is the public key that a server's SSH server proves itself with.
type HostKey struct {
	Key         string `json:"key"`         // as in a file of authorized keys: TYPE BASE64
	Fingerprint string `json:"fingerprint"` // SHA256:...
}
