package image

import (
	"maps"
	"slices"
	"sync"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// holds counts the operations under way that need a blob or a block image, by digest and by diff
// ID: what they need is not removed, though no tag or shed names it yet. It is guarded by Store.mu.
type holds map[v1.Hash]int

// hold keeps blobs, and the block images of layers by diff ID and chain ID, from being removed until release is
// called. It does not say that they are there: who writes one holds it before.
func (s *Store) hold(hashes ...v1.Hash) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holdLocked(hashes)
}

func (s *Store) holdLocked(hashes []v1.Hash) (release func()) {
	for _, h := range hashes {
		s.held[h]++
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, h := range hashes {
			if s.held[h]--; s.held[h] == 0 {
				delete(s.held, h)
			}
		}
	})
}

// Acquire is Resolve for an image that the index has, and keeps all of it from being removed until release is called.
func (s *Store) Acquire(name string) (img *shed.Image, release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	desc, err := s.find(name)
	if err != nil {
		return nil, nil, err
	}
	if img, err = s.image(desc); err != nil {
		return nil, nil, err
	}
	chosen, err := s.choose(desc)
	if err != nil {
		return nil, nil, err
	}
	needs := newNeeds()
	if err := s.reach(needs, chosen); err != nil {
		return nil, nil, err
	}
	return img, s.holdLocked(slices.Collect(maps.Keys(needs.all))), nil
}
