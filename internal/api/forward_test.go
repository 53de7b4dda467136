package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
	"github.com/charliek/shed/internal/api/apitest"
)

// forwardingFake has a shed "web" with this machine's network.
func forwardingFake() *apitest.Fake {
	f := &apitest.Fake{
		Connect: func(ctx context.Context, to shed.Endpoint) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, to.Network, to.Address)
		},
		Bind: func(_ context.Context, on shed.Endpoint) (net.Listener, error) {
			return net.Listen(on.Network, on.Address)
		},
	}
	f.Add(shed.Shed{Name: "web"})
	return f
}

func TestDialAndListen(t *testing.T) {
	c := newTestClient(t, forwardingFake())
	l, err := c.Listen(t.Context(), "web", shed.Endpoint{Network: "tcp", Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	var on agent.Listening
	if err := agent.ReadMessage(l, &on); err != nil {
		t.Fatal(err)
	}
	out, err := c.Dial(t.Context(), "web", shed.Endpoint{Network: "tcp", Address: on.Address})
	if err != nil {
		t.Fatal(err)
	}
	var m agent.Accepted
	if err := agent.ReadMessage(l, &m); err != nil {
		t.Fatal(err)
	}
	in, err := c.Dial(t.Context(), "web", shed.Endpoint{Network: "accepted", Address: m.ID})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	data := bytes.Repeat([]byte("data "), 500_000)
	sent := make(chan error, 1)
	go func() {
		_, err := out.Write(data)
		sent <- errors.Join(err, out.(interface{ CloseWrite() error }).CloseWrite())
	}()
	if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	io.WriteString(in, "answer")
	in.Close()
	if got, err := io.ReadAll(out); string(got) != "answer" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	out.Close()
	for {
		conn, err := net.Dial("tcp", on.Address)
		if err != nil {
			break
		}
		conn.Close()
	}
}

func TestDialFails(t *testing.T) {
	c := newTestClient(t, forwardingFake())
	for _, test := range []struct {
		name string
		to   shed.Endpoint
		want shed.Code
	}{
		{"web", shed.Endpoint{Network: "accepted", Address: "nothing"}, shed.CodeConnect},
		{"none", shed.Endpoint{Network: "tcp", Address: "localhost:1"}, shed.CodeNotFound},
		{"../x", shed.Endpoint{Network: "tcp", Address: "localhost:1"}, shed.CodeInvalid},
		{"web", shed.Endpoint{Network: "udp", Address: "localhost:1"}, shed.CodeInvalid},
		{"web", shed.Endpoint{Network: "tcp", Address: "localhost"}, shed.CodeInvalid},
		{"web", shed.Endpoint{Network: "tcp", Address: "localhost:http"}, shed.CodeInvalid},
		{"web", shed.Endpoint{Network: "unix", Address: "rel"}, shed.CodeInvalid},
	} {
		if _, err := c.Dial(t.Context(), test.name, test.to); shed.ErrorCode(err) != test.want {
			t.Errorf("%s %+v: %v", test.name, test.to, err)
		}
	}
	if _, err := c.Listen(t.Context(), "web", shed.Endpoint{Network: "unix", Address: t.TempDir() + "/none/s"}); shed.ErrorCode(err) != shed.CodeConnect {
		t.Error(err)
	}
}
