package shed

import (
	"context"
	"time"
)

// Image is an OCI image in the server's store.
type Image struct {
	Ref       string    `json:"ref"`    // tag, or "" where only a shed uses it
	Digest    string    `json:"digest"` // of the manifest: sha256:...
	Size      int64     `json:"size"`   // bytes on disk: blobs and block images
	InUse     []string  `json:"in_use"` // names of sheds
	CreatedAt time.Time `json:"created_at"`
	Layers    []Layer   `json:"layers"` // bottom first
}

// Layer is one read-only layer of an image.
type Layer struct {
	Digest     string `json:"digest"`      // of the blob as stored
	DiffID     string `json:"diff_id"`     // of the uncompressed tar
	Size       int64  `json:"size"`        // bytes, of the blob
	BlockImage int64  `json:"block_image"` // bytes on disk, of the block image; 0 if not made yet
}

// Images is what a server does with images.
type Images interface {
	// Images returns all images, sorted by reference.
	Images(ctx context.Context) ([]*Image, error)

	// BuildPreset makes the named preset ("base") and tags it with its name.
	BuildPreset(ctx context.Context, preset string, p Progress) (*Image, error)
}

// Info describes a server.
type Info struct {
	Name     string   `json:"name"`
	Version  string   `json:"version"`
	Backend  string   `json:"default_backend"`
	Backends []string `json:"backends"`
	Accel    string   `json:"accel"` // "kvm", "tcg", "hvf"
	StateDir string   `json:"state_dir"`
}
