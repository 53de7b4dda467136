//go:build linux

package main

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/stream"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// slowRuns bounds how often what takes many seconds is measured.
const slowRuns = 3

// lacks leaves out what, if a program for it is missing, which the Debian package pkg has.
func (b *bench) lacks(what, program, pkg string) bool {
	if _, err := exec.LookPath(program); err == nil {
		return false
	}
	b.leaveOut("%s: there is no %s, which is in Debian's package %s", what, program, pkg)
	return true
}

// pulls measures pulls from a registry on this machine by a server that has nothing of the image, in turn with other
// tools. The registry has the image as shed pushes it and, if umoci can't read that, compressed with gzip.
func (b *bench) pulls() error {
	if b.lacks("pulls", "docker-registry", "docker-registry") {
		return nil
	}
	host, stop, err := startRegistry(filepath.Join(b.dir, "registry"))
	if err != nil {
		return err
	}
	defer stop()
	asPushed := host + "/bench/image:pushed"
	if _, err := b.shed("image", "push", b.image, asPushed); err != nil {
		return err
	}
	img, err := b.stored(b.image)
	if err != nil {
		return err
	}
	zstd, err := hasZstd(img)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.dir, "puller")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	puller, err := startServer(b.bin, dir, b.home)
	if err != nil {
		return err
	}
	defer puller.close()
	other := !b.lacks("`skopeo copy` beside pulls", "skopeo", "skopeo")
	unpack := other && !b.lacks("`umoci unpack` beside pulls", "umoci", "umoci")
	if err := b.pull(puller, asPushed, other, unpack && !zstd); err != nil {
		return err
	}
	if !zstd || !unpack {
		return nil
	}
	asGzip := host + "/bench/image:gzip"
	if err := pushGzip(img, asGzip); err != nil {
		return err
	}
	return b.pull(puller, asGzip, other, unpack)
}

// pull measures pulls of ref to ready to boot, beside skopeo's to an OCI layout, and umoci's unpacking of that.
func (b *bench) pull(puller *server, ref string, skopeo, umoci bool) error {
	oci, bundle := filepath.Join(b.dir, "pulled"), filepath.Join(b.dir, "bundle")
	unpack := []string{"unpack", "--image", oci + ":it", bundle}
	if os.Geteuid() != 0 {
		unpack = append([]string{"unpack", "--rootless"}, unpack[1:]...)
	}
	var pulls, copies, unpacks, sums []time.Duration
	runs := min(b.runs, slowRuns)
	var what string
	for range runs {
		if err := cold(puller); err != nil {
			return err
		}
		unix.Sync() // what was written before is not to be waited for
		d, err := puller.shed("image", "pull", ref)
		if err != nil {
			return err
		}
		pulls = append(pulls, d)
		if what, err = puller.describe(ref); err != nil {
			return err
		}
		if !skopeo {
			continue
		}
		unix.Sync()
		_, copied, err := timed(exec.Command("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "docker://"+ref, "oci:"+oci+":it"))
		if err != nil {
			return err
		}
		copies = append(copies, copied)
		if umoci {
			_, unpacked, err := timed(exec.Command("umoci", unpack...))
			if err != nil {
				return err
			}
			unpacks = append(unpacks, unpacked)
			sums = append(sums, copied+unpacked)
		}
		if err := errors.Join(os.RemoveAll(oci), os.RemoveAll(bundle)); err != nil {
			return err
		}
	}
	beside := ""
	switch {
	case umoci:
		beside = fmt.Sprintf("`skopeo copy` to an OCI directory and `umoci unpack`: %s (%s and %s)", ms(mid(sums)), ms(mid(copies)), ms(mid(unpacks)))
	case skopeo:
		beside = "`skopeo copy` to an OCI directory, nothing unpacked: " + ms(mid(copies))
	}
	row(fmt.Sprintf("`shed image pull` of `%s`, %s, from a registry on this machine, until ready to boot; medians of %d", b.image, what, runs), ms(mid(pulls)), beside, "")
	return nil
}

// cold takes from the server all images, and makes sure that nothing is left that a pull could take.
func cold(s *server) error {
	ctx := context.Background()
	images, err := s.client.Images(ctx)
	if err != nil {
		return err
	}
	for _, img := range images {
		if _, err := s.shed("image", "rm", "--force", img.Digest); err != nil {
			return err
		}
	}
	if _, err := s.shed("image", "prune", "--force"); err != nil {
		return err
	}
	for _, dir := range []string{"images/blobs/sha256", "layers/sha256", "layers/chain/sha256"} {
		left, err := os.ReadDir(filepath.Join(s.state, dir))
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("all images are pruned, and %s still has %s", dir, left[0].Name())
		}
	}
	return nil
}

// describe returns how much a pulled image is, and how it is compressed. An image that isn't ready to boot is an error.
func (s *server) describe(ref string) (string, error) {
	d, err := s.client.InspectImage(context.Background(), ref)
	if err != nil {
		return "", err
	}
	var size int64
	for _, l := range d.Layers {
		if l.BlockImage == 0 {
			return "", fmt.Errorf("%s was pulled, and its layer %s has no block image", ref, l.Digest)
		}
		size += l.Size
	}
	img, err := s.stored(ref)
	if err != nil {
		return "", err
	}
	zstd, err := hasZstd(img)
	if err != nil {
		return "", err
	}
	compression := "gzip"
	if zstd {
		compression = "zstd"
	}
	return mb(size) + " " + compression, nil
}

// stored returns an image from the server's store.
func (s *server) stored(ref string) (v1.Image, error) {
	d, err := s.client.InspectImage(context.Background(), ref)
	if err != nil {
		return nil, err
	}
	digest, err := v1.NewHash(d.Digest)
	if err != nil {
		return nil, err
	}
	return layout.Path(filepath.Join(s.state, "images")).Image(digest)
}

func hasZstd(img v1.Image) (bool, error) {
	m, err := img.Manifest()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(m.Layers, func(l v1.Descriptor) bool { return strings.HasSuffix(string(l.MediaType), "zstd") }), nil
}

// pushGzip pushes an image with its layers compressed with gzip.
func pushGzip(img v1.Image, to string) error {
	ref, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil // of the layers to come
	out := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if out, err = mutate.ConfigFile(out, config); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		tar, err := l.Uncompressed()
		if err != nil {
			return err
		}
		defer tar.Close()
		out, err = mutate.AppendLayers(out, stream.NewLayer(tar, stream.WithMediaType(types.OCILayer), stream.WithCompressionLevel(gzip.BestSpeed)))
		if err != nil {
			return err
		}
	}
	return remote.Write(ref, out)
}

// startRegistry runs a registry that keeps what it has in dir, until stop is called.
func startRegistry(dir string) (host string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	host = l.Addr().String()
	if err := l.Close(); err != nil {
		return "", nil, err
	}
	config := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n", dir, host)
	if err := os.WriteFile(dir+".yml", []byte(config), 0o600); err != nil {
		return "", nil, err
	}
	log, err := os.Create(dir + ".log")
	if err != nil {
		return "", nil, err
	}
	defer log.Close()
	cmd := exec.Command("docker-registry", "serve", dir+".yml")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	err = eventually(func() error {
		resp, err := http.Get("http://" + host + "/v2/")
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return errors.Join(err, resp.Body.Close())
	})
	if err != nil {
		stop()
		text, _ := os.ReadFile(log.Name())
		return "", nil, fmt.Errorf("the registry did not start: %w\n%s", err, text)
	}
	return host, stop, nil
}
