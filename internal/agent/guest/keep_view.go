//go:build linux

package guest

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// frameInterval is how long a terminal is left alone after it was painted: a program that writes without
// end is to be busy with that, not with being shown.
const frameInterval = 10 * time.Millisecond

// viewer is a terminal that shows a session.
type viewer struct {
	conn   net.Conn
	frames *agent.FrameWriter
	dirty  chan struct{} // has a value when the screen is not what was painted last

	p *painter // of the keeper's mu
}

func (v *viewer) touch() {
	select {
	case v.dirty <- struct{}{}:
	default:
	}
}

// attach shows the session to a client until that goes away, or the session ends.
func (k *keeper) attach(ctx context.Context, conn net.Conn, size shed.Size) {
	v := &viewer{conn: conn, frames: agent.NewFrameWriter(conn), dirty: make(chan struct{}, 1)}
	v.touch()
	k.mu.Lock()
	v.p = newPainter(size, k.screen)
	k.viewers = append(k.viewers, v)
	k.fit()
	k.mu.Unlock()

	gone := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer conn.Close() // which ends the reading
		k.show(ctx, v, gone)
	})
	k.listen(v)
	close(gone)
	conn.Close() // which ends a painting that is stuck
	wg.Wait()

	k.mu.Lock()
	defer k.mu.Unlock()
	k.viewers = slices.DeleteFunc(k.viewers, func(other *viewer) bool { return other == v })
	k.fit()
}

// show paints v whenever the screen has changed. Only v waits where its client is slow, and it gets
// then what is on the screen by that time.
func (k *keeper) show(ctx context.Context, v *viewer, gone <-chan struct{}) {
	paint := func() error {
		k.mu.Lock()
		b := v.p.paint(k.screen) // good until v is painted again, which nobody else does
		k.mu.Unlock()
		if len(b) == 0 {
			return nil
		}
		return v.frames.Write(agent.FrameStdout, b)
	}
	for {
		select {
		case <-v.dirty:
			if paint() != nil {
				return
			}
		case <-gone:
			return
		case <-ctx.Done():
			if paint() == nil {
				v.frames.Write(agent.FrameExit, nil)
			}
			return
		}
		select {
		case <-time.After(frameInterval):
		case <-gone:
		case <-ctx.Done():
		}
	}
}

// listen takes what the client types, and its size.
func (k *keeper) listen(v *viewer) {
	frames := agent.NewFrameReader(v.conn)
	for {
		t, b, err := frames.Read()
		if err != nil {
			return
		}
		switch t {
		case agent.FrameStdin:
			k.use(v)
			k.input.put(b) // what is too much is lost, as it is on a terminal whose program doesn't read
		case agent.FrameResize:
			var size shed.Size
			if json.Unmarshal(b, &size) == nil {
				k.mu.Lock()
				v.p.resize(size)
				k.mu.Unlock()
				k.use(v)
				v.touch()
			}
		}
	}
}

// use makes v the one that was used last.
func (k *keeper) use(v *viewer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := slices.Index(k.viewers, v)
	k.viewers = append(slices.Delete(k.viewers, i, i+1), v)
	k.fit()
}
