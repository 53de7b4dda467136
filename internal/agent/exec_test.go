package agent

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

// fakeCommand is the guest's end of the exec protocol, played by the test.
type fakeCommand struct {
	*FrameWriter
	*FrameReader
	conn net.Conn
}

func startFake(t *testing.T) (shed.Process, fakeCommand) {
	t.Helper()
	host, guest := socketPair(t)
	p := NewProcess(host)
	t.Cleanup(func() { p.Close() })
	return p, fakeCommand{NewFrameWriter(guest), NewFrameReader(guest), guest}
}

func (f fakeCommand) send(t *testing.T, typ FrameType, payload []byte) {
	t.Helper()
	if err := f.Write(typ, payload); err != nil {
		t.Fatal(err)
	}
}

func (f fakeCommand) exit(t *testing.T, status shed.ExitStatus) {
	t.Helper()
	b, err := json.Marshal(status)
	if err != nil {
		t.Fatal(err)
	}
	f.send(t, FrameExit, b)
}

func (f fakeCommand) ack(t *testing.T, n int) {
	t.Helper()
	f.send(t, FrameStdinAck, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

// want reads a frame that has to be this one.
func (f fakeCommand) want(t *testing.T, typ FrameType, payload string) {
	t.Helper()
	got, b, err := f.Read()
	if err != nil {
		t.Fatal(err)
	}
	if got != typ || string(b) != payload {
		t.Fatalf("frame %d %.100q, want %d %.100q", got, b, typ, payload)
	}
}

// wantStdin reads n bytes of stdin.
func (f fakeCommand) wantStdin(t *testing.T, n int) []byte {
	t.Helper()
	var in []byte
	for len(in) < n {
		typ, b, err := f.Read()
		if err != nil {
			t.Fatal(err)
		}
		if typ != FrameStdin {
			t.Fatalf("frame %d after %d bytes of stdin, want %d bytes", typ, len(in), n)
		}
		in = append(in, b...)
	}
	if len(in) != n {
		t.Fatalf("%d bytes of stdin, want %d", len(in), n)
	}
	return in
}

func TestProcessCarriesOutputAndExit(t *testing.T) {
	p, f := startFake(t)
	big := bytes.Repeat([]byte("0123456789"), 50_000)
	stderr := make(chan []byte, 1)
	go func() {
		b, err := io.ReadAll(p.Stderr())
		if err != nil {
			t.Error(err)
		}
		stderr <- b
	}()
	want := shed.ExitStatus{Code: 143, Signal: "TERM"}
	go func() {
		f.Write(FrameStdout, []byte("out "))
		f.Write(FrameStderr, []byte("err"))
		f.Write(FrameType(200), []byte("of a newer agent"))
		f.Write(FrameStdout, big) // longer than a frame
		f.exit(t, want)
	}()
	out, err := io.ReadAll(p.Stdout())
	if err != nil || string(out) != "out "+string(big) {
		t.Errorf("stdout: %d bytes, %v", len(out), err)
	}
	if b := <-stderr; string(b) != "err" {
		t.Errorf("stderr %q", b)
	}
	for range 2 {
		if got, err := p.Wait(); err != nil || got != want {
			t.Errorf("Wait: %+v, %v; want %+v", got, err, want)
		}
	}
}

func TestProcessSendsFrames(t *testing.T) {
	p, f := startFake(t)
	done := make(chan error, 1)
	go func() {
		_, err := io.WriteString(p.Stdin(), "in")
		done <- errors.Join(err, p.Resize(shed.Size{Rows: 24, Cols: 80}), p.Signal("INT"), p.Stdin().Close())
	}()
	f.want(t, FrameStdin, "in")
	f.want(t, FrameResize, `{"rows":24,"cols":80}`)
	f.want(t, FrameSignal, "INT")
	f.want(t, FrameStdinEOF, "")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.exit(t, shed.ExitStatus{})
	if got, err := p.Wait(); err != nil || got != (shed.ExitStatus{}) {
		t.Errorf("Wait: %+v, %v", got, err)
	}
}

// A command that doesn't read its stdin gets no more than the window, and its signals.
func TestStdinStopsAtTheWindow(t *testing.T) {
	p, f := startFake(t)
	data := make([]byte, 2*StdinWindow+100)
	for i := range data {
		data[i] = byte(i * 7 / 5)
	}
	written := make(chan error, 1)
	go func() {
		n, err := p.Stdin().Write(data)
		if n != len(data) {
			t.Errorf("Write: %d bytes, want %d", n, len(data))
		}
		written <- err
	}()
	in := f.wantStdin(t, StdinWindow)
	// If more stdin could come, it would come before these.
	if err := p.Signal("INT"); err != nil {
		t.Fatal(err)
	}
	f.want(t, FrameSignal, "INT")
	if err := p.Resize(shed.Size{Rows: 1, Cols: 2}); err != nil {
		t.Fatal(err)
	}
	f.want(t, FrameResize, `{"rows":1,"cols":2}`)

	f.ack(t, 1)
	in = append(in, f.wantStdin(t, 1)...)
	f.ack(t, StdinWindow-1)
	in = append(in, f.wantStdin(t, StdinWindow-1)...)
	f.ack(t, StdinWindow)
	in = append(in, f.wantStdin(t, 100)...)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(in, data) {
		t.Error("stdin arrived changed")
	}
}

func TestStdinFailsWhenTheCommandHasEnded(t *testing.T) {
	p, f := startFake(t)
	written := make(chan error, 1)
	go func() {
		_, err := p.Stdin().Write(make([]byte, 2*StdinWindow))
		written <- err
	}()
	f.wantStdin(t, StdinWindow)
	f.exit(t, shed.ExitStatus{Code: 3})
	if err := <-written; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Write: %v, want io.ErrClosedPipe", err)
	}
	if got, err := p.Wait(); err != nil || got.Code != 3 {
		t.Errorf("Wait: %+v, %v", got, err)
	}
}

func TestProcessSaysThatItsConnectionWasLost(t *testing.T) {
	for name, cut := range map[string][]byte{
		"between frames": {},
		"in a header":    {byte(FrameStdout), 0, 0},
		"in a payload":   {byte(FrameStdout), 0, 0, 0, 5, 'a', 'b'},
	} {
		t.Run(name, func(t *testing.T) {
			p, f := startFake(t)
			go func() {
				f.Write(FrameStdout, []byte("some"))
				f.conn.Write(cut)
				f.conn.Close()
			}()
			out, err := io.ReadAll(p.Stdout())
			if string(out) != "some" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("stdout %q, %v; want io.ErrUnexpectedEOF", out, err)
			}
			if _, err := p.Wait(); !errors.Is(err, io.ErrUnexpectedEOF) ||
				!strings.Contains(err.Error(), "the connection to the command was lost") {
				t.Errorf("Wait: %v", err)
			}
		})
	}
}

func TestProcessRefusesWhatIsNoProtocol(t *testing.T) {
	for name, b := range map[string][]byte{
		"a short acknowledgement": {byte(FrameStdinAck), 0, 0, 0, 1, 0},
		"a status that isn't one": {byte(FrameExit), 0, 0, 0, 1, '!'},
		"a frame over the limit":  {byte(FrameStdout), 0, 1, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			p, f := startFake(t)
			if _, err := f.conn.Write(b); err != nil {
				t.Fatal(err)
			}
			if status, err := p.Wait(); err == nil {
				t.Errorf("Wait: %+v without an error", status)
			}
		})
	}
}

func TestProcessCloseLetsGo(t *testing.T) {
	p, f := startFake(t)
	written := make(chan error, 1)
	go func() {
		_, err := p.Stdin().Write(make([]byte, 2*StdinWindow))
		written <- err
	}()
	read := make(chan error, 1)
	go func() {
		_, err := p.Stderr().Read(make([]byte, 1))
		read <- err
	}()
	f.wantStdin(t, StdinWindow)
	f.send(t, FrameStdout, []byte("nobody reads this"))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err == nil {
		t.Error("a write to stdin succeeded")
	}
	if err := <-read; err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a read of stderr: %v", err)
	}
	if _, err := p.Wait(); err == nil {
		t.Error("Wait has a status")
	}
	if typ, _, err := f.Read(); err == nil {
		t.Errorf("the guest reads frame %d, want the end of the connection", typ)
	}
}

func TestMessages(t *testing.T) {
	want := Request{Exec: &shed.Command{Args: []string{"a b", "\"'\n", ""}, TTY: &shed.TTY{Term: "xterm", Size: shed.Size{Rows: 1, Cols: 2}}}}
	var b bytes.Buffer
	if err := WriteMessage(&b, want); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(b.Bytes())
	var got Request
	if err := ReadMessage(&b, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range len(whole) {
		var r Request
		if err := ReadMessage(bytes.NewReader(whole[:i]), &r); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut off after %d bytes: %v", i, err)
		}
	}
	if err := ReadMessage(strings.NewReader("\xff\xff\xff\xff"), &got); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a message of 4 GiB: %v", err)
	}
	if err := WriteMessage(io.Discard, strings.Repeat("x", maxJSON)); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("writing one that is too long: %v", err)
	}
}

// FuzzFrames checks that what is read as frames is what was written.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 'h', 'i', 18, 0, 0, 0, 0})
	f.Add([]byte{16, 0, 1, 0, 1})
	f.Add([]byte{16, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := NewFrameReader(bytes.NewReader(data))
		var again bytes.Buffer
		w := NewFrameWriter(&again)
		for {
			typ, b, err := r.Read()
			if err != nil {
				if errors.Is(err, io.EOF) && again.Len() != len(data) {
					t.Fatalf("%d of %d bytes were read before a clean end", again.Len(), len(data))
				}
				break
			}
			if err := w.Write(typ, b); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(data, again.Bytes()) {
			t.Fatalf("%q was read as %q", data, again.Bytes())
		}
	})
}

// FuzzRequest checks that a request that can be read can be passed on.
func FuzzRequest(f *testing.F) {
	for _, r := range []Request{{}, {PowerOff: &PowerOff{}}, {Exec: &shed.Command{Script: "x"}}, {Setup: &Setup{Layers: 3}}} {
		var b bytes.Buffer
		if err := WriteMessage(&b, r); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{0, 0, 0, 4, 'n', 'u', 'l', 'l'})
	f.Fuzz(func(t *testing.T, data []byte) {
		var first, second Request
		if ReadMessage(bytes.NewReader(data), &first) != nil {
			return
		}
		var a, b bytes.Buffer
		if err := WriteMessage(&a, first); err != nil {
			t.Fatal(err)
		}
		whole := bytes.Clone(a.Bytes())
		if err := ReadMessage(&a, &second); err != nil {
			t.Fatal(err)
		}
		if err := WriteMessage(&b, second); err != nil || !bytes.Equal(whole, b.Bytes()) {
			t.Fatalf("%q became %q (%v)", whole, b.Bytes(), err)
		}
	})
}
