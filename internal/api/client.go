package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/charliek/shed"
)

// maxErrorBody is how much of an error answer is read, in bytes.
const maxErrorBody = 1 << 20

// Client is a server at the other end of HTTP: a shed.Sheds and a shed.Images.
// Its errors are the server's own; what keeps it from getting an answer is
// CodeUnreachable.
type Client struct {
	dial  func(ctx context.Context) (net.Conn, error)
	label string
	http  *http.Client
	// Trace, if set, is called after each request with one line about it.
	Trace func(line string)
}

var (
	_ shed.Sheds  = (*Client)(nil)
	_ shed.Images = (*Client)(nil)
)

// NewClient returns a client that reaches the server by dial. Error messages
// call it label, such as "the server at /run/shed/shed.sock".
func NewClient(dial func(ctx context.Context) (net.Conn, error), label string) *Client {
	c := &Client{label: label}
	c.dial = func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		if err != nil {
			return nil, c.dialError(ctx, err)
		}
		return conn, nil
	}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableCompression: true,
		IdleConnTimeout:    idleTimeout / 2, // before the server closes it
	}}
	return c
}

// NewUnixClient returns a client of the server that listens on socket. Error
// messages call it label.
func NewUnixClient(socket, label string) *Client {
	return NewClient(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}, label)
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) dialError(ctx context.Context, err error) error {
	var known *shed.Error
	if errors.As(err, &known) {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", c.label, ctx.Err())
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return shed.Errorf(shed.CodeUnreachable, "%s does not answer: %w", c.label, err).
			WithHint("is shed-server running? start it with: shed-server serve")
	case errors.Is(err, fs.ErrPermission):
		return shed.Errorf(shed.CodeUnreachable, "no permission to use %s: %w", c.label, err).
			WithHint("the socket's owner and permissions decide who may use it")
	}
	return shed.Errorf(shed.CodeUnreachable, "%s can't be reached: %w", c.label, err)
}

// requestError says what became of a request that got no complete answer.
func (c *Client) requestError(ctx context.Context, err error) error {
	var known *shed.Error
	if errors.As(err, &known) {
		return known
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", c.label, ctx.Err())
	}
	if urlErr := (*url.Error)(nil); errors.As(err, &urlErr) {
		err = urlErr.Err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return shed.Errorf(shed.CodeUnreachable, "the connection to %s was lost: %w", c.label, err).
		WithHint("the server's log may say why")
}

func newRequest(ctx context.Context, method, path string, body any) (*http.Request, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	// The server looks at the host where it has to keep browsers out.
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, r)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", jsonType)
	}
	return req, nil
}

// send returns the answer to req if it is a good one. The caller closes its body.
func (c *Client) send(req *http.Request) (*http.Response, error) {
	start := time.Now()
	resp, err := c.http.Do(req)
	c.trace(req, start, resp, err)
	if err != nil {
		return nil, c.requestError(req.Context(), err)
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, c.answerError(resp)
	}
	return resp, nil
}

func (c *Client) trace(req *http.Request, start time.Time, resp *http.Response, err error) {
	if c.Trace == nil {
		return
	}
	result := "no answer"
	if err == nil {
		result = resp.Status
	}
	c.Trace(fmt.Sprintf("%s %s: %s after %s", req.Method, req.URL.RequestURI(), result, time.Since(start).Round(time.Microsecond)))
}

// answerError makes an error of an answer that is one.
func (c *Client) answerError(resp *http.Response) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err == nil {
		err = decodeError(data)
	}
	var known *shed.Error
	if errors.As(err, &known) {
		return known
	}
	return shed.Errorf(codeOf(resp.StatusCode), "%s answered %s", c.label, resp.Status)
}

// decodeError returns the Error in data, or another error if there is none.
func decodeError(data []byte) error {
	var body errorBody
	if err := json.Unmarshal(data, &body); err != nil {
		return fmt.Errorf("an error that is no JSON: %w", err)
	}
	if body.Error.Code == "" {
		return errors.New("an error without a code")
	}
	return &body.Error
}

// call sends a request and decodes the answer into v, with events for p if it isn't nil.
func (c *Client) call(ctx context.Context, method, path string, body, v any, p shed.Progress) error {
	req, err := newRequest(ctx, method, path, body)
	if err != nil {
		return err
	}
	if p != nil {
		req.Header.Set("Accept", eventsType)
	}
	resp, err := c.send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return c.decodeAnswer(resp, v, p)
}

// result is call for an answer that is a T.
func result[T any](ctx context.Context, c *Client, method, path string, body any, p shed.Progress) (*T, error) {
	v := new(T)
	if err := c.call(ctx, method, path, body, v, p); err != nil {
		return nil, err
	}
	return v, nil
}

// decodeAnswer decodes the answer into v, and hands the events before it to p.
func (c *Client) decodeAnswer(resp *http.Response, v any, p shed.Progress) error {
	var data []byte
	var err error
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == eventsType {
		data, err = readEvents(resp.Body, p)
	} else {
		data, err = io.ReadAll(resp.Body)
	}
	if err != nil {
		return c.requestError(resp.Request.Context(), err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return shed.Errorf(shed.CodeInternal, "%s: %s %s: the answer is not understood: %w", c.label, resp.Request.Method, resp.Request.URL.Path, err)
	}
	return nil
}

// shedPath returns the path of a shed's resource. A name that can't be one is
// caught here: it could make another path.
func shedPath(name, resource string) (string, error) {
	if err := shed.ValidateName(name); err != nil {
		return "", err
	}
	return "/api/sheds/" + name + resource, nil
}

// shedCall sends a request about one shed and returns the shed in the answer.
func (c *Client) shedCall(ctx context.Context, method, name, resource string, p shed.Progress) (*shed.Shed, error) {
	path, err := shedPath(name, resource)
	if err != nil {
		return nil, err
	}
	return result[shed.Shed](ctx, c, method, path, nil, p)
}

// Info describes the server.
func (c *Client) Info(ctx context.Context) (shed.Info, error) {
	var info shed.Info
	err := c.call(ctx, http.MethodGet, "/api/info", nil, &info, nil)
	return info, err
}

// HostKey returns the key of the SSH server.
func (c *Client) HostKey(ctx context.Context) (shed.HostKey, error) {
	var key shed.HostKey
	err := c.call(ctx, http.MethodGet, "/api/ssh-host-key", nil, &key, nil)
	return key, err
}

func (c *Client) Create(ctx context.Context, opts shed.CreateOptions, p shed.Progress) (*shed.Shed, error) {
	return result[shed.Shed](ctx, c, http.MethodPost, "/api/sheds", opts, p)
}

func (c *Client) List(ctx context.Context) ([]*shed.Shed, error) {
	var sheds []*shed.Shed
	err := c.call(ctx, http.MethodGet, "/api/sheds", nil, &sheds, nil)
	return sheds, err
}

func (c *Client) Get(ctx context.Context, name string) (*shed.Shed, error) {
	return c.shedCall(ctx, http.MethodGet, name, "", nil)
}

func (c *Client) Start(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	return c.shedCall(ctx, http.MethodPost, name, "/start", p)
}

func (c *Client) Stop(ctx context.Context, name string, p shed.Progress) (*shed.Shed, error) {
	return c.shedCall(ctx, http.MethodPost, name, "/stop", p)
}

func (c *Client) Reset(ctx context.Context, name string) (*shed.Shed, error) {
	return c.shedCall(ctx, http.MethodPost, name, "/reset", nil)
}

func (c *Client) Delete(ctx context.Context, name string, p shed.Progress) error {
	path, err := shedPath(name, "")
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, path, nil, &struct{}{}, p)
}

func (c *Client) Logs(ctx context.Context, name string, follow bool) (io.ReadCloser, error) {
	path, err := shedPath(name, "/logs")
	if err != nil {
		return nil, err
	}
	if follow {
		path += "?follow=1"
	}
	req, err := newRequest(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.send(req)
	if err != nil {
		return nil, err
	}
	return &answerReader{resp.Body, ctx, c}, nil
}

// answerReader gives the errors of a broken answer the form of the others.
type answerReader struct {
	io.ReadCloser
	ctx context.Context
	c   *Client
}

func (r *answerReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = r.c.requestError(r.ctx, err)
	}
	return n, err
}
