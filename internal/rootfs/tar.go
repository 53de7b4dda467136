package rootfs

import (
	"archive/tar"
	"context"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// tarWriter writes the tar that tar2ext4 gets: one that it converts faithfully. It has
// clean relative names, no file twice, and OCI whiteouts as overlayfs has them. Directories and
// whiteouts come last, when all is known of them; tar2ext4 makes directories as it needs them, and takes their
// metadata then.
type tarWriter struct {
	*tar.Writer
	buf []byte
}

func newTarWriter(w io.Writer) *tarWriter {
	return &tarWriter{tar.NewWriter(w), make([]byte, 256<<10)}
}

// file writes a file of any type, with the content body if it is a regular one.
func (w *tarWriter) file(hdr *tar.Header, body io.Reader) error {
	if err := w.WriteHeader(hdr); err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.CopyBuffer(w.Writer, body, w.buf)
	return err
}

func (w *tarWriter) link(name, target string) error {
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Format: tar.FormatPAX})
}

// finish writes the directories and whiteouts of t, and the end of the tar.
func (w *tarWriter) finish(t *tree) error {
	if err := t.root.writeDirectories(w.Writer, "."); err != nil {
		return err
	}
	return w.Close()
}

// rewriteLayer writes the layer tar src to dst as tar2ext4 needs it, and returns the hash of all that src yielded.
func rewriteLayer(ctx context.Context, dst io.Writer, src io.Reader, limit int64) (v1.Hash, error) {
	t := newTree(0, nil)
	w := newTarWriter(dst)
	displaced := 0
	hash, err := readLayer(ctx, src, limit, func(e entry, body io.Reader) error {
		was, err := t.add(e)
		if err != nil || was == unchanged {
			return err
		}
		if was == replaced {
			displaced++
			if err := displace(t, w, e.name, displaced); err != nil {
				return err
			}
		}
		return w.file(e.hdr, body)
	})
	if err != nil {
		return v1.Hash{}, err
	}
	if err := t.settle(); err != nil {
		return v1.Hash{}, err
	}
	return hash, w.finish(t)
}

// displace gives what was written as name a second name, without which a file with content
// can't be replaced: its blocks would be nobody's.
func displace(t *tree, w *tarWriter, name string, n int) error {
	to := fmt.Sprintf("%s/repeated-%d", lostFound, n)
	taken, err := t.make(to)
	if err != nil {
		return err
	}
	if taken.kind != kindAbsent {
		return invalid("the tar repeats it, and %q is taken", to)
	}
	taken.kind, taken.origin = kindOther, origin{-1, n}
	return w.link(to, name)
}
