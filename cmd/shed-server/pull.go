//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/engine"
	"github.com/charliek/shed/internal/state"
)

// puller is what pulls an image: the store or, where a server has it, the server.
type puller interface {
	Pull(ctx context.Context, opts shed.PullOptions, p shed.Progress) (*shed.Image, error)
}

// pullImages pulls the images that the configuration names, and prints what it has got. The failure of one
// doesn't keep it from the others.
func pullImages(ctx context.Context, cfg config, stdout, stderr io.Writer) error {
	images, done, err := openPuller(cfg)
	if err != nil {
		return err
	}
	defer done()
	var failed error
	for _, ref := range engine.ConfiguredImages(map[string]engine.Backend{"qemu": cfg.QEMU.backend()}, version) {
		if !engine.Pullable(ref) {
			fmt.Fprintf(stderr, "%s is made here: shed image build %s\n", ref, ref)
			continue
		}
		fmt.Fprintf(stderr, "pulling %s\n", ref)
		img, err := images.Pull(ctx, shed.PullOptions{Ref: ref}, nil)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		fmt.Fprintln(stdout, img.Ref, img.Digest)
	}
	return failed
}

func openPuller(cfg config) (images puller, done func(), err error) {
	dir, err := state.Open(cfg.StateDir)
	if shed.ErrorCode(err) == shed.CodeConflict { // a server runs
		client := api.NewUnixClient(cfg.Socket, "the server at "+cfg.Socket)
		return client, client.Close, nil
	}
	if err != nil {
		return nil, nil, err
	}
	store, err := openImages(cfg, dir)
	if err != nil {
		dir.Close()
		return nil, nil, err
	}
	return store, func() { store.Close(); dir.Close() }, nil
}
