package image

import (
	"context"
	"errors"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// transfers is how many blobs of an image are on their way at a time.
	transfers = 4
	// reportInterval is how often a transfer is reported, for an item.
	reportInterval = 100 * time.Millisecond
)

// pulledLayer is a layer's blob and what it unpacks to.
type pulledLayer struct {
	desc   v1.Descriptor
	diffID v1.Hash
}

// incoming are the layers of an image that is being pulled.
type incoming struct {
	store       *Store
	registry    *registry
	layers      []pulledLayer
	downloads   chan struct{} // an element for each that runs, as in:
	conversions chan struct{}

	p         shed.Progress
	pulled    func() // ends the phase
	transfers *meter

	mu        sync.Mutex
	missing   int    // layers whose blob isn't there yet
	converted func() // ends the phase, once it has begun
}

func newIncoming(s *Store, r *registry, m *v1.Manifest, cfg *v1.ConfigFile, p shed.Progress, pulled func()) *incoming {
	in := &incoming{
		store: s, registry: r, p: p, pulled: pulled,
		downloads: make(chan struct{}, transfers), conversions: make(chan struct{}, runtime.NumCPU()),
	}
	for i, desc := range m.Layers {
		l := pulledLayer{desc, cfg.RootFS.DiffIDs[i]}
		if !slices.ContainsFunc(in.layers, func(o pulledLayer) bool { return l.desc.Digest == o.desc.Digest && l.diffID == o.diffID }) {
			in.layers = append(in.layers, l)
		}
	}
	in.missing = len(in.layers)
	in.transfers = newMeter("pull", p, m.Layers)
	return in
}

// get gets all layers and converts them, and ends the phases.
func (in *incoming) get(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range in.layers {
		g.Go(func() error { return in.layer(ctx, l) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if in.converted == nil { // there are no layers
		in.pulled()
		return nil
	}
	in.converted()
	return nil
}

// arrived notes that one more blob is there.
func (in *incoming) arrived() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.missing--; in.missing == 0 {
		in.pulled()
		in.converted = in.p.Phase("convert", "converting layers")
	}
}

// layer gets a layer and converts it as it comes.
func (in *incoming) layer(ctx context.Context, l pulledLayer) error {
	arrived := sync.OnceFunc(in.arrived)
	for {
		had, err := in.store.hasBlob(l.desc)
		if err == nil {
			err = in.getAndConvert(ctx, l, had, arrived)
		}
		if err == nil || !had || ctx.Err() != nil {
			return err
		}
		// It may be that a blob which was there is damaged.
		if damaged, derr := in.store.dropDamaged(ctx, l.desc); derr != nil || !damaged {
			return errors.Join(err, derr)
		}
	}
}

func (in *incoming) getAndConvert(ctx context.Context, l pulledLayer, had bool, arrived func()) error {
	select {
	case in.downloads <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := newFollower(in.store, l.desc.Digest)
	whole := make(chan struct{}) // closed when the blob is there
	converted := make(chan error, 1)
	go func() { converted <- in.convert(ctx, l, f, whole) }()

	open := func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		return in.registry.blob(ctx, l.desc, offset)
	}
	err := in.store.ingest(ctx, l.desc, open, func(n int64) {
		f.grow(n)
		in.transfers.report(l.desc, n, !had)
	})
	<-in.downloads
	f.end(err)
	if err != nil {
		// A conversion that failed before doesn't count: it read what can't be trusted.
		cancel()
		<-converted
		return err
	}
	message := ""
	if had {
		message = "already there"
	}
	in.transfers.done(l.desc, message)
	arrived()
	close(whole)
	if err = <-converted; err == nil || !f.restarted() {
		return err
	}
	again := newFollower(in.store, l.desc.Digest)
	again.grow(l.desc.Size)
	again.end(nil)
	return in.convert(ctx, l, again, whole)
}

// convert makes the layer's block image from what f yields, unless it is there. Its progress is
// reported once the blob is whole.
func (in *incoming) convert(ctx context.Context, l pulledLayer, f *follower, whole <-chan struct{}) error {
	if _, ok := in.store.layers.Path(l.diffID); ok {
		return nil
	}
	select {
	case in.conversions <- struct{}{}:
		defer func() { <-in.conversions }()
	case <-ctx.Done():
		return ctx.Err()
	}
	stop := context.AfterFunc(ctx, func() { f.end(ctx.Err()) })
	defer stop()
	event := shed.Event{Phase: "convert", Item: short(l.desc.Digest), Total: l.desc.Size, Unit: "bytes"}
	reported := false
	report := func(e shed.Event) {
		select {
		case <-whole:
			reported = true
			in.p.Report(e)
		default:
		}
	}
	u, err := newUnpacker(l.desc, f, report, event)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	_, _, err = in.store.layers.Convert(ctx, u, l.diffID)
	if err = errors.Join(err, u.Close()); err == nil && reported {
		event.Current, event.Done = l.desc.Size, true
		in.p.Report(event)
	}
	return err
}

// meter reports how the transfers of several blobs get on, each as an item of a phase, and all as the phase.
type meter struct {
	phase string
	p     shed.Progress

	mu       sync.Mutex
	current  map[v1.Hash]int64
	reported map[v1.Hash]time.Time // an item's last report; that of the phase has the zero hash
	total    int64
}

func newMeter(phase string, p shed.Progress, blobs []v1.Descriptor) *meter {
	m := &meter{phase: phase, p: p, current: make(map[v1.Hash]int64), reported: make(map[v1.Hash]time.Time)}
	for _, b := range blobs {
		if _, twice := m.current[b.Digest]; !twice {
			m.current[b.Digest] = 0
			m.total += b.Size
		}
	}
	return m
}

// report notes that n bytes of a blob are there, and says so for the phase and, if item is set, for it.
func (m *meter) report(desc v1.Descriptor, n int64, item bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current[desc.Digest] = n
	if item && m.due(desc.Digest) {
		m.p.Report(shed.Event{Phase: m.phase, Item: short(desc.Digest), Current: n, Total: desc.Size, Unit: "bytes"})
	}
	if m.due(v1.Hash{}) {
		m.reportAll()
	}
}

// done ends a blob's item.
func (m *meter) done(desc v1.Descriptor, message string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current[desc.Digest] = desc.Size
	m.p.Report(shed.Event{Phase: m.phase, Item: short(desc.Digest), Message: message, Current: desc.Size, Total: desc.Size, Unit: "bytes", Done: true})
	m.reportAll()
}

func (m *meter) reportAll() {
	var sum int64
	for _, n := range m.current {
		sum += n
	}
	m.p.Report(shed.Event{Phase: m.phase, Current: sum, Total: m.total, Unit: "bytes"})
}

// due says whether it is time for a report, which then counts as made.
func (m *meter) due(key v1.Hash) bool {
	now := time.Now()
	if now.Sub(m.reported[key]) < reportInterval {
		return false
	}
	m.reported[key] = now
	return true
}
