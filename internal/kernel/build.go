package kernel

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// build makes a bundle. The caller holds the lock.
func (s *Store) build(ctx context.Context, p shed.Progress) (*Bundle, error) {
	b, err := s.buildIn(ctx, p)
	if err == nil {
		return b, nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if errors.Is(err, syscall.ENOSPC) {
		return nil, shed.Errorf(shed.CodeNoSpace, "building the kernel: %w", err).
			WithHint("building a kernel needs 1 GiB under %s, most of it only for the time being", s.dir)
	}
	return nil, fmt.Errorf("building the kernel: %w", err)
}

func (s *Store) buildIn(ctx context.Context, p shed.Progress) (_ *Bundle, err error) {
	tmp, err := os.MkdirTemp(s.dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()

	pkg, err := findPackage(ctx)
	if err != nil {
		return nil, err
	}
	done := p.Phase("kernel", "downloading "+pkg.name)
	deb, err := pkg.download(ctx, tmp)
	done()
	if err != nil {
		return nil, err
	}
	done = p.Phase("kernel", "unpacking "+pkg.name)
	tree := filepath.Join(tmp, "tree")
	release, err := unpack(ctx, deb, tree)
	done()
	if err != nil {
		return nil, fmt.Errorf("unpacking %s: %w", filepath.Base(deb), err)
	}
	defer p.Phase("kernel", "preparing Linux "+release)()
	bundle := filepath.Join(tmp, "bundle")
	if err := os.Mkdir(bundle, 0o755); err != nil {
		return nil, err
	}
	if err := fillBundle(ctx, bundle, tree, release, p); err != nil {
		return nil, err
	}
	m := manifest{Release: release, Package: pkg.name, Version: pkg.version}
	if m.Files, err = hashTree(bundle); err != nil {
		return nil, err
	}
	return s.keep(bundle, m)
}

// keep gives the filled bundle its manifest and its final place.
func (s *Store) keep(bundle string, m manifest) (*Bundle, error) {
	data, err := json.MarshalIndent(m, "", "\t") // maps are sorted by key
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(bundle, manifestFile), append(data, '\n'), 0o644); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	id := m.Release + "-" + hex.EncodeToString(sum[:6])
	if b, err := s.load(id); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return nil, err
		}
		now := time.Now()
		return b, os.Chtimes(filepath.Join(b.dir, manifestFile), now, now)
	}
	if err := syncTree(bundle); err != nil {
		return nil, err
	}
	if err := os.Rename(bundle, filepath.Join(s.dir, id)); err != nil {
		return nil, err
	}
	if err := rootfs.Sync(s.dir); err != nil {
		return nil, err
	}
	return s.load(id)
}

// fillBundle makes all of a bundle but the manifest from the unpacked package in tree.
func fillBundle(ctx context.Context, bundle, tree, release string, p shed.Progress) error {
	vmlinuz, err := os.ReadFile(filepath.Join(tree, "boot", "vmlinuz-"+release))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bundle, vmlinuzFile), vmlinuz, 0o644); err != nil {
		return err
	}
	vmlinux, err := uncompress(vmlinuz)
	if err != nil {
		// It boots nevertheless, where the monitor knows the format.
		p.Report(shed.Event{Phase: "kernel", Message: err.Error()})
	} else if err := os.WriteFile(filepath.Join(bundle, vmlinuxFile), vmlinux, 0o644); err != nil {
		return err
	}
	if err := depmod(ctx, tree, release); err != nil {
		return err
	}
	modules := filepath.Join(tree, "lib", "modules", release)
	if err := bootModules(filepath.Join(bundle, bootDir), modules); err != nil {
		return fmt.Errorf("choosing the modules that boot needs: %w", err)
	}
	if err := modulesImage(ctx, filepath.Join(bundle, modulesFile), modules); err != nil {
		return fmt.Errorf("making the image of the modules: %w", err)
	}
	return nil
}

func depmod(ctx context.Context, tree, release string) error {
	bin, err := rootfs.LookPath("depmod")
	if err != nil {
		return shed.Errorf(shed.CodeUnsupported, "depmod, which finds out how kernel modules depend on each other, is not installed").
			WithHint("`apt-get install kmod`")
	}
	// Where depmod looks below its base directory is fixed when it is built: /lib or /usr/lib.
	if err := os.Symlink(".", filepath.Join(tree, "usr")); err != nil {
		return err
	}
	_, err = run(ctx, tree, bin, "-b", tree, release)
	return err
}

// modulesImage writes the directory modules as an ext4 image to the file image.
func modulesImage(ctx context.Context, image, modules string) error {
	tmp := image + ".layers"
	layers, err := rootfs.OpenLayers(tmp)
	if err != nil {
		return err
	}
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(writeTar(w, modules))
	}()
	_, made, err := layers.Convert(ctx, r, v1.Hash{})
	r.Close()
	<-written
	if err != nil {
		return err
	}
	if err := os.Rename(made, image); err != nil {
		return err
	}
	return os.RemoveAll(tmp)
}

// writeTar writes what is in dir as root's, and the same bytes for the same names and contents.
func writeTar(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		hdr := &tar.Header{Name: rel, ModTime: time.Unix(0, 0)}
		if d.IsDir() {
			hdr.Typeflag, hdr.Mode, hdr.Name = tar.TypeDir, 0o755, rel+"/"
			return tw.WriteHeader(hdr)
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		hdr.Typeflag, hdr.Mode, hdr.Size = tar.TypeReg, 0o644, fi.Size()
		if err := tw.WriteHeader(hdr); err != nil {
			return err
		}
		_, err = io.Copy(tw, f)
		return err
	})
	return errors.Join(err, tw.Close())
}

// debPackage is a version of a package.
type debPackage struct{ name, version string }

var dependsRE = regexp.MustCompile(`(?m)^Depends: (linux-image-[a-z0-9.+-]+) \(= ([^)]+)\)`)

// findPackage returns the package of the distribution's current generic kernel.
func findPackage(ctx context.Context) (debPackage, error) {
	meta := "linux-image-" + runtime.GOARCH
	if _, err := exec.LookPath("apt-get"); err != nil {
		return debPackage{}, shed.Errorf(shed.CodeUnsupported, "apt-get is not there: kernels are made from Debian's package %s", meta).
			WithHint("build the kernel on a Debian machine of this architecture and copy it over")
	}
	out, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", meta)
	if ctx.Err() != nil {
		return debPackage{}, err
	}
	var m []string
	if err == nil {
		m = dependsRE.FindStringSubmatch(string(out))
	}
	if m == nil {
		if err == nil {
			err = fmt.Errorf("the package %s doesn't depend on one version of a kernel", meta)
		}
		return debPackage{}, shed.Errorf(shed.CodeUnsupported, "looking for Debian's kernel: %w", err).
			WithHint("run `apt-get update`")
	}
	return debPackage{m[1], m[2]}, nil
}

// download gets the package into dir and returns its path.
func (p debPackage) download(ctx context.Context, dir string) (string, error) {
	// Root can't hand the download to the user _apt, who must not write here.
	if _, err := run(ctx, dir, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", p.name+"="+p.version); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", shed.Errorf(shed.CodeUnsupported, "downloading %s: %w", p.name, err).
			WithHint("check the connection to the Debian mirror; if the version is gone from there, run `apt-get update`")
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	if len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d packages", p.name, len(debs))
	}
	return debs[0], nil
}

// unpack unpacks the kernel and the modules of a kernel package to boot/ and lib/modules/ in
// tree, and returns the kernel's release.
func unpack(ctx context.Context, deb, tree string) (release string, err error) {
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	cmd, stderr := command(ctx, "", "dpkg-deb", "--fsys-tarfile", deb)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	release, err = unpackTar(stdout, tree)
	// Read to its end, the child fails for its own reasons only, which come before ours.
	_, derr := io.Copy(io.Discard, stdout)
	if werr := cmd.Wait(); werr != nil {
		return "", childError(cmd, werr, stderr)
	}
	return release, errors.Join(err, derr)
}

func unpackTar(r io.Reader, tree string) (release string, err error) {
	root, err := os.OpenRoot(tree)
	if err != nil {
		return "", err
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
		name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
		name = strings.TrimPrefix(name, "usr/") // where a merged /usr has the modules
		kernel, isKernel := strings.CutPrefix(name, "boot/vmlinuz-")
		if hdr.Typeflag != tar.TypeReg || !isKernel && !strings.HasPrefix(name, "lib/modules/") {
			continue
		}
		if isKernel {
			release = kernel
		}
		if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return "", err
		}
		f, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o644)
		if err != nil {
			return "", err
		}
		_, err = io.Copy(f, tr)
		if err := errors.Join(err, f.Close()); err != nil {
			return "", err
		}
	}
	if release == "" {
		return "", errors.New("there is no boot/vmlinuz-* in it")
	}
	return release, nil
}
