//go:build linux

package keeper

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

// A shed is told the time again and again, until its link ends, by either side.
func TestKeepClock(t *testing.T) {
	for name, end := range map[string]func(cancel context.CancelFunc, c *agent.Client){
		"the keeper ends": func(cancel context.CancelFunc, _ *agent.Client) { cancel() },
		"the link ends":   func(_ context.CancelFunc, c *agent.Client) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			guest, host, err := fakePort()
			if err != nil {
				t.Fatal(err)
			}
			told, answers := make(chan int64), make(chan struct{})
			var wg sync.WaitGroup
			defer wg.Wait()
			defer guest.Close()
			wg.Go(func() {
				err := agent.ServePort(guest, func(s *agent.Stream) {
					defer s.Close()
					var req agent.Request
					if err := agent.ReadMessage(s, &req); err != nil || req.Clock == nil {
						t.Errorf("%+v, %v", req, err)
						return
					}
					told <- req.Clock.UnixNano
					<-answers
					agent.WriteMessage(s, agent.Reply{})
				})
				if !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("ServePort: %v", err)
				}
			})
			c, err := agent.Connect(t.Context(), host, false)
			if err != nil {
				t.Fatal(err)
			}
			k := &keeper{log: slog.New(slog.DiscardHandler)}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan struct{})
			before := time.Now().UnixNano()
			go func() {
				defer close(ended)
				k.keepClock(ctx, c, time.Millisecond, 5*time.Millisecond)
			}()
			for range 3 {
				if at := <-told; at < before || at > time.Now().UnixNano() {
					t.Errorf("the time is %d, told %d", time.Now().UnixNano(), at)
				}
				answers <- struct{}{}
			}
			<-told // and not answered
			end(cancel, c)
			<-ended
			close(answers)
		})
	}
}
