package sshd

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"
)

const (
	// APIUser is the user name of connections to the HTTP API. No shed can have it. A certificate
	// needs it among its principals, unless its authority's line names others.
	APIUser = "_api"
	// APISocket is the Unix socket that such a connection finds the API at.
	APISocket = "/shed.sock"
)

// directAPI connects a channel of a connection of APIUser with the HTTP API.
func (c *connection) directAPI(ctx context.Context, nch ssh.NewChannel) {
	to, err := parseDirectUnix(nch.ExtraData())
	switch {
	case err != nil:
	case to.Address != APISocket:
		err = fmt.Errorf("there is no %.200q; the HTTP API is at %s", to.Address, APISocket)
	case c.s.api == nil:
		err = errors.New("this server has no HTTP API inside SSH")
	}
	if err != nil {
		c.reject(nch, ssh.ConnectionFailed, err.Error())
		return
	}
	if err := c.rights.Load().mayUseAPI(); err != nil {
		c.reject(nch, ssh.Prohibited, err.Error())
		return
	}
	conn, err := c.s.api(ctx)
	if err != nil {
		c.log.Error("the HTTP API does not answer", "err", err)
		nch.Reject(ssh.ConnectionFailed, "the server's HTTP API does not answer: "+err.Error())
		return
	}
	join(ctx, nch, conn)
}

// mayUseAPI returns an error for a key that may not do everything: what its line or its certificate
// denies would be had through the API.
func (r rights) mayUseAPI() error {
	if r.command != "" || r.noPTY || r.noForwarding || r.noAgent || r.open != nil || r.listen != nil {
		return errors.New("the key may not use the HTTP API: its line of authorized keys, or its certificate, restricts what it may do")
	}
	return nil
}
