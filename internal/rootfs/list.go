package rootfs

import (
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// BlockImage is a block image that has been made.
type BlockImage struct {
	ID   v1.Hash // diff ID of the layer, or chain ID of the layers that were merged
	Path string
}

// List returns all block images, sorted: those of single layers first. Whoever removes the file of one makes sure that no
// machine and no other call needs it.
func (l *Layers) List() ([]BlockImage, error) {
	var images []BlockImage
	for _, dir := range []string{l.dir, l.chains} {
		files, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			name, ok := strings.CutSuffix(f.Name(), ".img")
			id, err := v1.NewHash("sha256:" + name)
			if ok && err == nil && f.Type().IsRegular() {
				images = append(images, BlockImage{ID: id, Path: filepath.Join(dir, f.Name())})
			}
		}
	}
	return images, nil
}
