package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/charliek/shed"
)

// maxEvent bounds the data of one event, in bytes.
const maxEvent = 8 << 20

// readEvents hands progress to p and returns the result of the operation, or
// the error that it ended with.
func readEvents(r io.Reader, p shed.Progress) ([]byte, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4<<10), maxEvent)
	var name string
	var data []byte
	for lines.Scan() {
		line := lines.Bytes()
		if len(line) > 0 {
			field, value, _ := bytes.Cut(line, []byte(":"))
			value = bytes.TrimPrefix(value, []byte(" "))
			switch string(field) { // "" is a comment
			case "event":
				name = string(value)
			case "data":
				if len(data) > 0 {
					data = append(data, '\n')
				}
				if data = append(data, value...); len(data) > maxEvent {
					return nil, fmt.Errorf("an event is over the limit of %d bytes", maxEvent)
				}
			}
			continue
		}
		switch name {
		case eventProgress:
			var e shed.Event
			if err := json.Unmarshal(data, &e); err != nil {
				return nil, fmt.Errorf("a progress event: %w", err)
			}
			p.Report(e)
		case eventComplete:
			return data, nil
		case eventError:
			return nil, decodeError(data)
		}
		name, data = "", data[:0]
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return nil, io.ErrUnexpectedEOF
}

// Exec implements shed.Sheds. ctx is only for the time until the command has
// been started.
func (c *Client) Exec(ctx context.Context, name string, cmd shed.Command) (net.Conn, error) {
	if err := cmd.Validate(); err != nil {
		return nil, err
	}
	return c.upgrade(ctx, name, "/exec", execProtocol, cmd)
}

// Dial implements shed.Sheds.
func (c *Client) Dial(ctx context.Context, name string, to shed.Endpoint) (net.Conn, error) {
	if err := to.Validate(); err != nil {
		return nil, err
	}
	return c.upgrade(ctx, name, "/dial", dialProtocol, to)
}

// Listen implements shed.Sheds. ctx is only for the time until the shed listens.
func (c *Client) Listen(ctx context.Context, name string, on shed.Endpoint) (net.Conn, error) {
	if err := on.Validate(); err != nil {
		return nil, err
	}
	return c.upgrade(ctx, name, "/listen", listenProtocol, on)
}

// upgrade posts body to what is at sub below a shed and returns the connection, upgraded to protocol.
func (c *Client) upgrade(ctx context.Context, name, sub, protocol string, body any) (net.Conn, error) {
	path, err := shedPath(name, sub)
	if err != nil {
		return nil, err
	}
	req, err := newRequest(ctx, http.MethodPost, path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	start := time.Now()
	conn, err := c.dial(ctx)
	if err != nil {
		c.trace(req, start, nil, err)
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	in := bufio.NewReaderSize(conn, 64<<10)
	werr := req.Write(conn)
	// A server that refuses a request may answer before it has read all of it.
	resp, err := http.ReadResponse(in, req)
	if err != nil && werr != nil {
		err = werr
	}
	c.trace(req, start, resp, err)
	if err != nil {
		err = c.requestError(ctx, err)
	} else if resp.StatusCode != http.StatusSwitchingProtocols {
		err = c.answerError(resp)
	}
	if !stop() && err == nil {
		err = c.requestError(ctx, ctx.Err())
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &bufferedConn{conn, in}, nil
}

// bufferedConn is a connection whose first bytes may have been read already.
type bufferedConn struct {
	net.Conn
	in *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *bufferedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return fmt.Errorf("a %T can't end one direction: %w", c.Conn, errors.ErrUnsupported)
}
