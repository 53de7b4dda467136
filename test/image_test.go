//go:build linux

package test

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/charliek/shed/internal/porttest"
)

// cmdMkimage is mkimage [FLAGS] ARCHIVE TAG DIR..., which makes an archive as docker save does, of an
// image with a layer of each directory, all root's.
func cmdMkimage(ts *testscript.TestScript, neg bool, args []string) {
	var config v1.Config
	set := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	set.StringVar(&config.User, "user", "", "")
	set.StringVar(&config.WorkingDir, "workdir", "", "")
	set.Func("env", "", func(s string) error { config.Env = append(config.Env, s); return nil })
	pad := set.Int("pad", 0, "layers to add, each of which replaces the file /pad")
	ts.Check(set.Parse(args))
	if set.NArg() < 2 || neg {
		ts.Fatalf("usage: mkimage [-user U] [-workdir D] [-env K=V] [-pad N] ARCHIVE TAG DIR...")
	}
	tag, err := name.NewTag(set.Arg(1))
	ts.Check(err)
	var layers []v1.Layer
	for _, dir := range set.Args()[2:] {
		layer, err := layerOf(ts.MkAbs(dir))
		ts.Check(err)
		layers = append(layers, layer)
	}
	for i := range *pad {
		layer, err := layerWith(func(w *tar.Writer) error {
			content := fmt.Sprintln(i + 1)
			return errors.Join(
				w.WriteHeader(&tar.Header{Name: "pad", Mode: 0o644, Size: int64(len(content))}),
				second(io.WriteString(w, content)))
		})
		ts.Check(err)
		layers = append(layers, layer)
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	ts.Check(err)
	file, err := img.ConfigFile()
	ts.Check(err)
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", runtime.GOARCH, config
	img, err = mutate.ConfigFile(img, file)
	ts.Check(err)
	ts.Check(tarball.WriteToFile(ts.MkAbs(set.Arg(0)), tag, img))
}

func second[T any](_ T, err error) error { return err }

func layerOf(dir string) (v1.Layer, error) {
	return layerWith(func(w *tar.Writer) error {
		return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || path == dir {
				return err
			}
			return addFile(w, dir, path, d)
		})
	})
}

func addFile(w *tar.Writer, dir, path string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	if h.Name, err = filepath.Rel(dir, path); err != nil {
		return err
	}
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "root", "root"
	if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

func layerWith(write func(*tar.Writer) error) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(write(w), w.Close()); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
}

// cmdRegistry is registry start [USER:PASSWORD], which runs Debian's docker-registry on a port of its own until the
// end of the script, and puts its address into REGISTRY.
func cmdRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 || args[0] != "start" || neg {
		ts.Fatalf("usage: registry start [USER:PASSWORD]")
	}
	port, err := porttest.Unused()
	ts.Check(err)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	dir := ts.MkAbs("registry")
	config := fmt.Sprintf("version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n", dir, addr)
	if len(args) > 1 {
		user, password, _ := strings.Cut(args[1], ":")
		out, err := exec.Command("htpasswd", "-Bbn", user, password).Output()
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs("htpasswd"), out, 0o600))
		config += fmt.Sprintf("auth: {htpasswd: {realm: registry, path: %s}}\n", ts.MkAbs("htpasswd"))
	}
	ts.Check(os.WriteFile(ts.MkAbs("registry.yml"), []byte(config), 0o600))
	log, err := os.Create(ts.MkAbs("registry.log"))
	ts.Check(err)
	defer log.Close()
	cmd := exec.Command("docker-registry", "serve", ts.MkAbs("registry.yml"))
	cmd.Stdout, cmd.Stderr = log, log
	ts.Check(cmd.Start())
	ts.Defer(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	ts.Check(eventually(func() error {
		resp, err := http.Get("http://" + addr + "/v2/")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}))
	ts.Setenv("REGISTRY", addr)
}
