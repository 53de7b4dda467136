package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// maxDockerfile bounds a Dockerfile that isn't in the context, in bytes.
const maxDockerfile = 1 << 20

// buildContext is a directory that an image is built from.
type buildContext struct {
	dir        string
	dockerfile string // where it is in the tar
	contents   []byte // of a Dockerfile that is no file of the directory
	ignore     *patternmatcher.PatternMatcher
	skipped    []string // by write: files of a kind that a build can't use, and which
}

// newBuildContext returns the context in dir with the Dockerfile in file, which
// may be anywhere; "" is dir's own, and "-" is stdin.
func newBuildContext(dir, file string, stdin io.Reader) (*buildContext, error) {
	dir, err := realPath(dir)
	if err != nil {
		return nil, err
	}
	if file == "" {
		file = filepath.Join(dir, "Dockerfile")
	}
	b := &buildContext{dir: dir}
	if file == "-" {
		err = b.takeDockerfile(stdin, "stdin")
	} else {
		err = b.findDockerfile(file)
	}
	if err != nil {
		return nil, err
	}
	return b, b.readIgnore(file)
}

// realPath returns the absolute path of path without symbolic links.
func realPath(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", shed.Errorf(shed.CodeInvalid, "%w", err)
	}
	return path, nil
}

func (b *buildContext) findDockerfile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return shed.Errorf(shed.CodeInvalid, "there is no Dockerfile: %w", err).WithHint("name one with --file")
	}
	defer f.Close()
	parent, err := realPath(filepath.Dir(file))
	if err != nil {
		return err
	}
	path := filepath.Join(parent, filepath.Base(file))
	info, err := os.Lstat(path)
	if err != nil {
		return shed.Errorf(shed.CodeInvalid, "%w", err)
	}
	if rel, err := filepath.Rel(b.dir, path); err == nil && filepath.IsLocal(rel) && info.Mode().IsRegular() {
		b.dockerfile = filepath.ToSlash(rel)
		return nil
	}
	return b.takeDockerfile(f, file)
}

// takeDockerfile reads a Dockerfile that is sent along under a name of its own.
func (b *buildContext) takeDockerfile(r io.Reader, from string) error {
	contents, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
	if err != nil {
		return shed.Errorf(shed.CodeInvalid, "the Dockerfile in %s: %w", from, err)
	}
	if len(contents) > maxDockerfile {
		return shed.Errorf(shed.CodeInvalid, "the Dockerfile in %s is over the limit of %d bytes", from, maxDockerfile)
	}
	b.contents, b.dockerfile = contents, ".dockerfile."+strings.ToLower(rand.Text())
	return nil
}

// readIgnore reads what not to send: from FILE.dockerignore if there is one, else from .dockerignore.
func (b *buildContext) readIgnore(file string) error {
	candidates := []string{filepath.Join(b.dir, ".dockerignore")}
	if file != "-" {
		candidates = append([]string{file + ".dockerignore"}, candidates...)
	}
	var patterns []string
	for _, path := range candidates {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return shed.Errorf(shed.CodeInvalid, "%w", err)
		}
		if patterns, err = ignorefile.ReadAll(bytes.NewReader(text)); err != nil {
			return shed.Errorf(shed.CodeInvalid, "%s: %w", path, err)
		}
		break
	}
	var err error
	if b.ignore, err = patternmatcher.New(patterns); err != nil {
		return shed.Errorf(shed.CodeInvalid, ".dockerignore: %w", err)
	}
	return nil
}

// write writes the context as a tar. Its files are root's, as COPY makes them.
func (b *buildContext) write(ctx context.Context, w io.Writer) error {
	buffered := bufio.NewWriterSize(w, 64<<10)
	out := tar.NewWriter(buffered)
	err := filepath.WalkDir(b.dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || path == b.dir {
			return err
		}
		rel, err := filepath.Rel(b.dir, path)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel)
		if name != b.dockerfile {
			ignored, err := b.ignore.MatchesOrParentMatches(rel)
			if err != nil {
				return fmt.Errorf(".dockerignore: %w", err)
			}
			if ignored && entry.IsDir() && !b.ignore.Exclusions() && !strings.HasPrefix(b.dockerfile, name+"/") {
				return filepath.SkipDir
			}
			if ignored {
				return nil
			}
		}
		return b.add(out, path, name, entry)
	})
	if err != nil {
		return err
	}
	if b.contents != nil {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: b.dockerfile, Mode: 0o644, Size: int64(len(b.contents))}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := out.Write(b.contents); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

func (b *buildContext) add(out *tar.Writer, path, name string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	link, kind := "", ""
	switch info.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	case fs.ModeSocket:
		kind = "socket"
	case fs.ModeNamedPipe:
		kind = "pipe"
	default:
		kind = "device"
	}
	if kind != "" {
		b.skipped = append(b.skipped, fmt.Sprintf("%s is a %s", name, kind))
		return nil
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
	}
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	h.ModTime, h.AccessTime, h.ChangeTime = info.ModTime().Truncate(time.Second), time.Time{}, time.Time{}
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyN(out, f, h.Size); errors.Is(err, io.EOF) {
		return fmt.Errorf("%s became shorter while it was sent", path)
	} else if err != nil {
		return err
	}
	return nil
}
