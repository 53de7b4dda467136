package preset

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/charliek/shed"
)

// Layer calls read with the uncompressed tar of a layer. It may be called more than once.
type Layer func(read func(io.Reader) error) error

// Bootstrap makes the preset's system, and calls take with its tar, which ends only when all went well. It reports what
// goes on as phase "bootstrap". CodeUnsupported where mmdebstrap is missing.
func (p Preset) Bootstrap(ctx context.Context, suite string, progress shed.Progress, take func(io.Reader) error) error {
	done := progress.Phase("bootstrap", "bootstrapping Debian "+suite)
	boot, err := startBootstrap(ctx, p.base.args(suite), os.Environ(), nil, message(progress, "bootstrap"))
	if err != nil {
		return err
	}
	if err := stopped(ctx, boot, take(count(boot, progress, "bootstrap"))); err != nil {
		return err
	}
	done()
	return nil
}

// Make makes the step's layer upon lower, bottom first, and returns what writes its tar. It reports what goes on as phase
// "packages", where anything does. scratch is an empty file, which has to be there until the tar is written.
func (st Step) Make(ctx context.Context, suite string, lower []Layer, scratch *os.File, progress shed.Progress) (write func(io.Writer) error, err error) {
	if st.hook == "" {
		return func(w io.Writer) error { return writeFiles(w, st.files) }, nil
	}
	done := progress.Phase("packages", "installing "+st.Comment)
	say := message(progress, "packages")
	say("unpacking the layers below")
	var files []file
	env := os.Environ()
	if st.npm {
		if files, env, err = npmConfig(env, globalNpmrc); err != nil {
			return nil, err
		}
	}
	layers := make([]*layer, len(lower))
	for i, l := range lower {
		if err := l(func(r io.Reader) error {
			layers[i], err = readLayer(r)
			return err
		}); err != nil {
			return nil, err
		}
	}
	merged := merge(layers)
	boot, err := startBootstrap(ctx, st.args(suite), env, func(w io.Writer) error {
		return writeTree(w, lower, layers, merged, files)
	}, say)
	if err != nil {
		return nil, err
	}
	// A layer has a file with all its names or not at all, so the tar is read twice.
	upper, err := readLayer(bufio.NewReaderSize(io.TeeReader(count(boot, progress, "packages"), scratch), 1<<20))
	if err = stopped(ctx, boot, err); err != nil {
		return nil, err
	}
	done()
	return func(w io.Writer) error {
		if _, err := scratch.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return diff(w, merged, upper, bufio.NewReaderSize(scratch, 1<<20))
	}, nil
}

func message(progress shed.Progress, phase string) func(string) {
	return func(message string) { progress.Report(shed.Event{Phase: phase, Message: message}) }
}

func count(r io.Reader, progress shed.Progress, phase string) io.Reader {
	return progress.Reader(r, shed.Event{Phase: phase})
}

// stopped stops boot, the reading of which ended with err, and returns why the step failed, if it did.
func stopped(ctx context.Context, boot *bootstrap, err error) error {
	err = errors.Join(err, boot.stop(err))
	if err != nil && ctx.Err() != nil {
		return ctx.Err() // that the program died of it is no news
	}
	return err
}

// writeTree writes one tar of the layers, which lower yields the content of, and files that only root can read. It leaves
// out what mmdebstrap has put into the tree by then, and takes from the host.
func writeTree(w io.Writer, lower []Layer, layers []*layer, merged map[string]*inode, files []file) error {
	tw := tar.NewWriter(w)
	for i, l := range layers {
		err := lower[i](func(r io.Reader) error {
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
