package sshd

import (
	"fmt"
	"io"
	"testing"
)

// All that a command wrote is delivered before its end is, even to a client that
// takes the last byte long after the command has ended.
func TestOutputBeforeExit(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	const window = 2 << 20 // of Go's client
	for range 3 {
		script := fmt.Sprintf("head -c %d /dev/zero; exit 3", window+1)
		ch, reqs := ts.startOn(client, script)
		var ends []string
		read := make(chan struct{})
		go func() {
			defer close(read)
			for req := range reqs {
				ends = append(ends, req.Type)
			}
		}()
		<-ts.sheds.ended
		for range 50 { // gives a server that would not wait the time for it
			if _, _, err := client.SendRequest("keepalive@openssh.com", true, nil); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := io.Copy(io.Discard, ch); n != window+1 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		<-read
		if len(ends) != 1 || ends[0] != "exit-status" {
			t.Errorf("the end: %v", ends)
		}
	}
}

// A client that sees the end of the output has been told how the command ended: OpenSSH's closes the channel then.
func TestStatusBeforeEOF(t *testing.T) {
	ts := newTestServer(t)
	client := ts.mustDial("box")
	for script, want := range map[string]string{"exit 3": "exit-status", "kill -TERM $$": "exit-signal"} {
		for range 100 { // in the other order it can be in time by chance
			ch, reqs := ts.startOn(client, script)
			if _, err := io.Copy(io.Discard, ch); err != nil {
				t.Fatal(err)
			}
			select {
			case req := <-reqs:
				if req == nil || req.Type != want {
					t.Errorf("%s: %+v, want %s", script, req, want)
				}
			default:
				t.Fatalf("%s: its output has ended, and the client isn't told how it did", script)
			}
			ch.Close()
		}
	}
}
