package api

import (
	"context"
	"net/http"

	"github.com/charliek/shed"
)

func (c *Client) Sessions(ctx context.Context, name string) ([]shed.Session, error) {
	path, err := shedPath(name, "/sessions")
	if err != nil {
		return nil, err
	}
	var sessions []shed.Session
	err = c.call(ctx, http.MethodGet, path, nil, &sessions, nil)
	return sessions, err
}

func (c *Client) AllSessions(ctx context.Context) (shed.SessionList, error) {
	var all shed.SessionList
	err := c.call(ctx, http.MethodGet, "/api/sessions", nil, &all, nil)
	return all, err
}

func (c *Client) KillSession(ctx context.Context, name, session string) error {
	if err := shed.ValidateSession(session); err != nil {
		return err
	}
	path, err := shedPath(name, "/sessions/"+session)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, path, nil, &struct{}{}, nil)
}
