package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// BuildPreset builds the named preset and gives it that tag; until then, the
// tag stays what it was. It reports phases "bootstrap", "packages", "layer" and "image".
//
// Presets are stacked: base; extensions upon it; full upon that. The bootstrapped system at the bottom is shared: base
// gets a new one, and the others take the newest that a preset image has, if there is one that was made in the same way.
//
// An unknown preset is CodeInvalid, another build under way CodeConflict, and a host that lacks what
// it takes CodeUnsupported.
func (s *Store) BuildPreset(ctx context.Context, name string, p shed.Progress) (*shed.Image, error) {
	preset, err := findPreset(name)
	if err != nil {
		return nil, err
	}
	if !s.building.TryLock() {
		return nil, shed.Errorf(shed.CodeConflict, "an image is being built already").WithHint("wait until it is done")
	}
	defer s.building.Unlock()
	img, err := s.build(ctx, preset, serialize(p))
	if err != nil {
		return nil, fmt.Errorf("building image %s: %w", name, err)
	}
	return img, nil
}

func (s *Store) build(ctx context.Context, preset preset, p shed.Progress) (_ *shed.Image, err error) {
	suite, err := hostSuite("/etc/os-release")
	if err != nil {
		return nil, err
	}
	added, err := s.newAddition()
	if err != nil {
		return nil, err
	}
	defer func() { err = added.end(err) }()
	b := &presetBuild{addition: added, preset: preset, suite: suite, progress: p}
	if err := b.base(ctx); err != nil {
		return nil, err
	}
	for _, st := range preset.upper {
		if st.hook == "" {
			err = b.add(ctx, st.comment, func(w io.Writer) error { return writeFiles(w, st.files) })
		} else {
			err = b.extend(ctx, st)
		}
		if err != nil {
			return nil, err
		}
	}
	desc, err := b.image()
	if err != nil {
		return nil, err
	}
	return s.image(withTag(desc, preset.name))
}

// presetBuild is the building of one preset.
type presetBuild struct {
	*addition
	preset   preset
	suite    string
	progress shed.Progress
	layers   []madeLayer // bottom first
}

// base makes the bootstrapped system the lowest layer, or takes one that is there.
func (b *presetBuild) base(ctx context.Context) error {
	r := b.preset.base
	if len(b.preset.upper) > 0 {
		base, release := b.store.built(r.version(b.suite))
		b.keep(release)
		if base != nil {
			done := b.progress.Phase("bootstrap", fmt.Sprintf("using the system of image %s, made %s", base.name, base.history.Created.Format(time.DateTime)))
			b.layers = append(b.layers, base.madeLayer)
			done()
			return nil
		}
	}
	done := b.progress.Phase("bootstrap", "bootstrapping Debian "+b.suite)
	boot, err := startBootstrap(ctx, r.args(b.suite), os.Environ(), nil, b.message("bootstrap"))
	if err != nil {
		return err
	}
	blob, l, err := b.layer(ctx, b.count(boot, "bootstrap"))
	if err = stopped(ctx, boot, err); err != nil {
		return err
	}
	done()
	return b.commit(blob, l, fmt.Sprintf("Debian %s, minbase, with %s", b.suite, strings.Join(append(r.packages, r.optional...), " ")))
}

func (b *presetBuild) message(phase string) func(string) {
	return func(message string) { b.progress.Report(shed.Event{Phase: phase, Message: message}) }
}

func (b *presetBuild) count(r io.Reader, phase string) io.Reader {
	return b.progress.Reader(r, shed.Event{Phase: phase})
}

// stopped stops boot, the reading of which ended with err, and returns why the step failed, if it did.
func stopped(ctx context.Context, boot *bootstrap, err error) error {
	err = errors.Join(err, boot.stop(err))
	if err != nil && ctx.Err() != nil {
		return ctx.Err() // that the program died of it is no news
	}
	return err
}

// extend runs the hook of st in a tree of the layers so far, and makes what it changed the next one.
func (b *presetBuild) extend(ctx context.Context, st step) (err error) {
	done := b.progress.Phase("packages", "unpacking the layers below")
	var files []file
	env := os.Environ()
	if st.npm {
		if files, env, err = npmConfig(env, globalNpmrc); err != nil {
			return err
		}
	}
	lower := make([]*layer, len(b.layers))
	for i, l := range b.layers {
		if err := b.store.withLayer(l.desc, func(r io.Reader) error {
			lower[i], err = readLayer(readerOf(ctx, r))
			return err
		}); err != nil {
			return err
		}
	}
	merged := merge(lower)
	// A layer has a file with all its names or not at all, so the tar is read twice.
	whole, err := b.store.createTemp()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, whole.Close(), os.Remove(whole.Name())) }()

	boot, err := startBootstrap(ctx, st.args(b.suite), env, func(w io.Writer) error {
		return b.writeTree(w, lower, merged, files)
	}, b.message("packages"))
	if err != nil {
		return err
	}
	upper, err := readLayer(bufio.NewReaderSize(io.TeeReader(b.count(boot, "packages"), whole), 1<<20))
	if err = stopped(ctx, boot, err); err != nil {
		return rootfs.NoSpace(err, b.store.dir)
	}
	done()
	return b.add(ctx, st.comment, func(w io.Writer) error {
		if _, err := whole.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return diff(w, merged, upper, bufio.NewReaderSize(readerOf(ctx, whole), 1<<20))
	})
}

// writeTree writes one tar of the layers, and files that only root can read. It leaves out what mmdebstrap has put
// into the tree by then, and takes from the host.
func (b *presetBuild) writeTree(w io.Writer, layers []*layer, merged map[string]*inode, files []file) error {
	tw := tar.NewWriter(w)
	for i, l := range layers {
		err := b.store.withLayer(b.layers[i].desc, func(r io.Reader) error {
			return l.copy(tw, r, func(ino *inode) []string {
				names := live(merged, ino)
				if len(names) > 0 && (strings.HasPrefix(names[0], "dev/") || names[0] == "etc/resolv.conf" || names[0] == "etc/hostname") {
					return nil
				}
				return names
			})
		})
		if err != nil {
			return err
		}
	}
	if err := addFiles(tw, files, 0o600); err != nil {
		return err
	}
	return tw.Close()
}

// withLayer calls f with the tar of the layer whose blob desc points to.
func (s *Store) withLayer(desc v1.Descriptor, f func(io.Reader) error) (err error) {
	r, err := s.unpackBlob(desc, nil, shed.Event{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := f(bufio.NewReaderSize(r, 1<<20)); err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return nil
}

// add makes the tar that write writes the next layer.
func (b *presetBuild) add(ctx context.Context, comment string, write func(io.Writer) error) error {
	done := b.progress.Phase("layer", "making the layer: "+comment)
	pr, pw := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		buf := bufio.NewWriterSize(pw, 1<<20)
		err := write(buf)
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err)
	}()
	blob, l, err := b.layer(ctx, pr)
	pr.CloseWithError(err) // lets a blocked write go
	<-written
	if err != nil {
		return err
	}
	if err := b.commit(blob, l, comment); err != nil {
		return err
	}
	done()
	return nil
}

func (b *presetBuild) commit(blob *os.File, l madeLayer, comment string) error {
	if err := rootfs.Commit(blob, b.store.blob(l.desc.Digest), 0o644); err != nil {
		return err
	}
	l.history = v1.History{
		Created:   v1.Time{Time: time.Now().UTC().Truncate(time.Second)},
		CreatedBy: "shed image build " + b.preset.name,
		Comment:   comment,
	}
	b.layers = append(b.layers, l)
	return nil
}

// image makes the layers an image and tags it.
func (b *presetBuild) image() (v1.Descriptor, error) {
	done := b.progress.Phase("image", "storing the image")
	now := time.Now().UTC().Truncate(time.Second)
	cfg := v1.ConfigFile{
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Created:      v1.Time{Time: now},
		Config:       b.preset.config,
		RootFS:       v1.RootFS{Type: "layers"},
	}
	cfg.Config.Labels = map[string]string{versionLabel: b.preset.base.version(b.suite)}
	manifest := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Annotations:   map[string]string{"org.opencontainers.image.created": now.Format(time.RFC3339)},
	}
	for _, l := range b.layers {
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, l.diffID)
		cfg.History = append(cfg.History, l.history)
		manifest.Layers = append(manifest.Layers, l.desc)
	}
	var err error
	if manifest.Config, err = b.writeJSON(cfg, types.OCIConfigJSON); err != nil {
		return v1.Descriptor{}, err
	}
	desc, err := b.writeJSON(manifest, types.OCIManifestSchema1)
	if err != nil {
		return v1.Descriptor{}, err
	}
	desc.Platform = &v1.Platform{Architecture: runtime.GOARCH, OS: "linux"}
	if err := b.store.tag(desc, b.preset.name); err != nil {
		return v1.Descriptor{}, err
	}
	done()
	return desc, nil
}

// serialize makes p fit for calls from several goroutines.
func serialize(p shed.Progress) shed.Progress {
	var mu sync.Mutex
	return func(e shed.Event) {
		mu.Lock()
		defer mu.Unlock()
		p.Report(e)
	}
}
