package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	// partialDir is the directory of the layout that holds the beginnings of blobs. Readers of OCI
	// layouts know nothing of it.
	partialDir = ".partial"
	// watchInterval is how often a call that waits for another one's blob says how far that is.
	watchInterval = 100 * time.Millisecond
)

// ingests are the blobs that are coming in, by digest.
type ingests struct {
	mu   sync.Mutex
	busy map[v1.Hash]*ingestion
}

type ingestion struct {
	n    atomic.Int64  // bytes that are there
	done chan struct{} // closed at its end, good or bad
}

// lock returns the ingestion of digest that is now the caller's, to be ended with unlock, or else the one that is another's.
func (in *ingests) lock(digest v1.Hash) (own, other *ingestion) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if other, busy := in.busy[digest]; busy {
		return nil, other
	}
	if in.busy == nil {
		in.busy = make(map[v1.Hash]*ingestion)
	}
	own = &ingestion{done: make(chan struct{})}
	in.busy[digest] = own
	return own, nil
}

func (in *ingests) unlock(digest v1.Hash) {
	in.mu.Lock()
	defer in.mu.Unlock()
	close(in.busy[digest].done)
	delete(in.busy, digest)
}

// An opener returns a blob's bytes from offset on.
type opener func(ctx context.Context, offset int64) (io.ReadCloser, error)

// partial is where the beginning of a blob is that isn't there yet.
func (s *Store) partial(digest v1.Hash) string {
	return filepath.Join(s.dir, partialDir, digest.Algorithm+"-"+digest.Hex)
}

// ingest makes sure that the store has the blob that desc points to. If it hasn't, open is asked for
// the blob's bytes from offset on; they have been verified against desc when the blob appears. What came of a blob whose
// reader fails stays, also when the process is killed, and the next call goes on from there. Concurrent calls for
// one blob read it once: the others wait, and take over if the first one fails.
//
// While it works, report is told how many of the blob's bytes are there, in s.partial or s.blob. Should it
// be told less than before, the blob is being read anew.
//
// Content that doesn't have desc's digest is CodeInvalid, and removed. Errors of open and of what it returns are wrapped.
func (s *Store) ingest(ctx context.Context, desc v1.Descriptor, open opener, report func(n int64)) error {
	if desc.Digest.Algorithm != "sha256" || desc.Size < 0 {
		return shed.Errorf(shed.CodeUnsupported, "blob %s of %d bytes: only sha256 digests, and sizes from 0 on, are supported", desc.Digest, desc.Size)
	}
	for {
		own, other := s.ingests.lock(desc.Digest)
		if own != nil {
			defer s.ingests.unlock(desc.Digest)
			there, err := s.hasBlob(desc)
			if err == nil && !there {
				err = s.receive(ctx, desc, open, func(n int64) {
					own.n.Store(n)
					report(n)
				})
			}
			if err != nil {
				return fmt.Errorf("blob %s: %w", desc.Digest, err)
			}
			report(desc.Size)
			return nil
		}
		if err := other.wait(ctx, report); err != nil {
			return fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
	}
}

// wait waits for the end of an ingestion that is another caller's.
func (i *ingestion) wait(ctx context.Context, report func(n int64)) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-i.done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			report(i.n.Load())
		}
	}
}

// hasBlob says whether the store has the blob that desc points to. One of another size is CodeInvalid.
func (s *Store) hasBlob(desc v1.Descriptor) (bool, error) {
	fi, err := os.Lstat(s.blob(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if fi.Size() != desc.Size {
		return false, shed.Errorf(shed.CodeInvalid, "it has %d bytes, and its manifest says %d", fi.Size(), desc.Size)
	}
	return true, nil
}

// dropDamaged removes the blob that desc points to if it is there with another content, and says whether that is so.
func (s *Store) dropDamaged(ctx context.Context, desc v1.Descriptor) (bool, error) {
	path := s.blob(desc.Digest)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, readerOf(ctx, f)); err != nil {
		return false, err
	}
	if hex.EncodeToString(hash.Sum(nil)) == desc.Digest.Hex {
		return false, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return true, os.Remove(path)
}

// receive gets the blob's bytes that aren't there yet.
func (s *Store) receive(ctx context.Context, desc v1.Descriptor, open opener, report func(n int64)) error {
	path := s.partial(desc.Digest)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return rootfs.NoSpace(err, path)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return rootfs.NoSpace(err, path)
	}
	keep, err := resume(ctx, f, desc, open, report)
	if err == nil {
		return rootfs.Commit(f, s.blob(desc.Digest), 0o644)
	}
	err = errors.Join(rootfs.NoSpace(err, path), f.Close())
	if !keep {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// resume completes f, the beginning of a blob. Where it fails, it says whether what is in f then is of use.
func resume(ctx context.Context, f *os.File, desc v1.Descriptor, open opener, report func(n int64)) (keep bool, err error) {
	hash := sha256.New()
	had, err := io.Copy(hash, io.LimitReader(readerOf(ctx, f), desc.Size))
	if err != nil {
		return true, err
	}
	for {
		if err := f.Truncate(had); err != nil {
			return true, err
		}
		if _, err := f.Seek(had, io.SeekStart); err != nil {
			return true, err
		}
		report(had)
		n, err := fill(ctx, io.MultiWriter(f, hash), had, desc.Size, open, report)
		if err != nil {
			return n > 0, err
		}
		if hex.EncodeToString(hash.Sum(nil)) == desc.Digest.Hex {
			return true, nil
		}
		if had == 0 {
			return false, shed.Errorf(shed.CodeInvalid, "the %d bytes that came do not have that digest", desc.Size).
				WithHint("either the image is damaged where it comes from, or something on the way changes it")
		}
		// A crash of the machine may have spoilt what was there.
		had = 0
		hash.Reset()
	}
}

// fill copies the bytes from n to size from what open returns to w, and returns how far it got. It reads no more than these.
func fill(ctx context.Context, w io.Writer, n, size int64, open opener, report func(n int64)) (int64, error) {
	if n == size {
		return n, nil
	}
	r, err := open(ctx, n)
	if err != nil {
		return n, err
	}
	defer r.Close()
	buf := make([]byte, min(size-n, 256<<10))
	for n < size {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		k, err := r.Read(buf[:min(size-n, int64(len(buf)))])
		if k > 0 {
			if _, werr := w.Write(buf[:k]); werr != nil {
				return n, werr
			}
			n += int64(k)
			report(n)
		}
		if err != nil && n < size {
			if errors.Is(err, io.EOF) {
				return n, shed.Errorf(shed.CodeInvalid, "it ends after %d of %d bytes: %w", n, size, io.ErrUnexpectedEOF)
			}
			return n, err
		}
	}
	return n, nil
}
