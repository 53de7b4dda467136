package image

import (
	"errors"
	"io"
	"os"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// errRestarted is what a follower returns when the blob it follows is being read anew.
var errRestarted = errors.New("the blob began anew")

// follower reads a blob while it is ingested: a Read waits for bytes that aren't there yet. The ingestion's reports
// go to grow and its end to end; one goroutine reads.
type follower struct {
	store  *Store
	digest v1.Hash
	file   *os.File
	at     int64

	mu    sync.Mutex
	more  *sync.Cond
	n     int64 // bytes that are there
	ended bool
	err   error // why no more come
}

func newFollower(s *Store, digest v1.Hash) *follower {
	f := &follower{store: s, digest: digest}
	f.more = sync.NewCond(&f.mu)
	return f
}

// grow says that n bytes of the blob are there.
func (f *follower) grow(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n < f.n && f.err == nil {
		f.err = errRestarted
	}
	f.n = n
	f.more.Broadcast()
}

// end says that the blob is whole or, with err, that it won't be.
func (f *follower) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	if f.err == nil {
		f.err = err
	}
	f.more.Broadcast()
}

// restarted says whether what was read may be of no use, because the blob began anew.
func (f *follower) restarted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Is(f.err, errRestarted)
}

func (f *follower) Read(p []byte) (int, error) {
	n, err := f.wait()
	if err != nil {
		return 0, err
	}
	if f.file == nil {
		if f.file, err = f.store.openGrowing(f.digest); err != nil {
			return 0, err
		}
	}
	k, err := f.file.ReadAt(p[:min(int64(len(p)), n-f.at)], f.at)
	f.at += int64(k)
	if k > 0 {
		return k, nil
	}
	if errors.Is(err, io.EOF) { // it is shorter than it was
		f.end(errRestarted)
		err = errRestarted
	}
	return 0, err
}

// wait returns how many bytes are there as soon as they are more than were read, and io.EOF at the blob's end.
func (f *follower) wait() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.err == nil && f.n <= f.at && !f.ended {
		f.more.Wait()
	}
	switch {
	case f.err != nil:
		return 0, f.err
	case f.n <= f.at:
		return 0, io.EOF
	}
	return f.n, nil
}

// Close lets go of the file. Nobody may be reading.
func (f *follower) Close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}

// openGrowing opens a blob that is there, or is becoming so at this moment.
func (s *Store) openGrowing(digest v1.Hash) (*os.File, error) {
	if f, err := os.Open(s.blob(digest)); err == nil {
		return f, nil
	}
	if f, err := os.Open(s.partial(digest)); err == nil {
		return f, nil
	}
	return os.Open(s.blob(digest)) // it came in between
}
