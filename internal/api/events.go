package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/charliek/shed"
)

const (
	keepalive = 15 * time.Second
	// maxPending bounds the events that wait for a slow client. It has room for
	// what a build prints at a time.
	maxPending = 4096
	// maxItems is among how many of them an older count is looked for.
	maxItems = 256
)

// operation is long work. Its result is encoded as JSON.
type operation func(ctx context.Context, p shed.Progress) (any, error)

// operation carries out op, with events if the client accepts them. It is
// cancelled when the client goes away.
func (s *server) operation(w http.ResponseWriter, r *http.Request, status int, op operation) {
	if !acceptsEvents(r) {
		v, err := op(r.Context(), nil)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		writeJSON(w, status, v)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	w.Header().Set("Content-Type", eventsType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	stream := &eventStream{w: w, ctl: http.NewResponseController(w), wake: make(chan struct{}, 1)}
	stream.ctl.Flush()
	v, err := stream.run(ctx, cancel, op)
	if err != nil {
		s.logFailure(r, err)
		stream.write(eventError, newErrorBody(err))
		return
	}
	stream.write(eventComplete, v)
}

func acceptsEvents(r *http.Request) bool {
	for _, accept := range r.Header.Values("Accept") {
		for part := range strings.SplitSeq(accept, ",") {
			t, _, _ := strings.Cut(part, ";")
			if strings.EqualFold(strings.TrimSpace(t), eventsType) {
				return true
			}
		}
	}
	return false
}

// eventStream writes server-sent events. Progress goes through a queue, so
// that a slow client never holds up the work.
type eventStream struct {
	w   http.ResponseWriter
	ctl *http.ResponseController

	mu      sync.Mutex
	pending []shed.Event
	wake    chan struct{} // has an element when pending may have some
}

// run runs op and returns when all of its events are written. It calls gone
// if the client is.
func (s *eventStream) run(ctx context.Context, gone func(), op operation) (any, error) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		s.pump(stop, gone)
	}()
	defer func() {
		close(stop)
		<-done
	}()
	return op(ctx, s.add)
}

func (s *eventStream) pump(stop <-chan struct{}, gone func()) {
	tick := time.NewTicker(keepalive)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-s.wake:
			err = s.flush()
		case <-tick.C:
			err = s.writeRaw([]byte(": still at it\n\n"))
		case <-stop:
			s.flush()
			return
		}
		if err != nil {
			gone()
			<-stop
			return
		}
	}
}

// add queues e. A count replaces an older one of the same item. Where the queue
// is full, only ends have room: what has begun must not seem to go on for ever.
func (s *eventStream) add(e shed.Event) {
	s.mu.Lock()
	if old := s.olderCount(e); old != nil {
		*old = e
	} else if len(s.pending) < maxPending || e.Done {
		s.pending = append(s.pending, e)
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// olderCount returns the pending event that e makes obsolete, if there is one.
func (s *eventStream) olderCount(e shed.Event) *shed.Event {
	for i := len(s.pending) - 1; i >= max(0, len(s.pending)-maxItems); i-- {
		old := &s.pending[i]
		if old.Phase != e.Phase || old.Item != e.Item {
			continue
		}
		if !e.Done && !old.Done && e.Current > old.Current && old.Current > 0 && e.Message == old.Message {
			return old
		}
		return nil
	}
	return nil
}

func (s *eventStream) flush() error {
	s.mu.Lock()
	events := s.pending
	s.pending = nil
	s.mu.Unlock()
	for _, e := range events {
		if err := s.write(eventProgress, e); err != nil {
			return err
		}
	}
	return nil
}

func (s *eventStream) write(event string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.writeRaw(fmt.Appendf(nil, "event: %s\ndata: %s\n\n", event, data))
}

func (s *eventStream) writeRaw(b []byte) error {
	if _, err := s.w.Write(b); err != nil {
		return err
	}
	return s.ctl.Flush()
}
