package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"

	"github.com/charliek/shed"
)

// ErrRefused is in the chain of the error about a server that lets none of the user's keys in. Trying again soon would be
// no use, and have the server bar this machine.
var ErrRefused = errors.New("the login is refused")

// explain says why the server can't be used, and what to do. a is nil where it was not connected.
func (r *remote) explain(err error, a *attempt) error {
	if r.ctx.Err() != nil {
		return fmt.Errorf("%s: %w", r.label, context.Canceled)
	}
	var known *shed.Error
	if errors.As(err, &known) {
		return known
	}
	if a != nil {
		return r.explainLogin(err, a)
	}
	fail := func(why string) *shed.Error {
		return shed.Errorf(shed.CodeUnreachable, "%s can't be reached: %s (%w)", r.label, why, err)
	}
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return fail("there is no such host").WithHint("is the name right, and this machine in the network that knows it?")
	case errors.As(err, &dns):
		return fail("its name can't be looked up").WithHint("has this machine a network?")
	case errors.Is(err, syscall.ECONNREFUSED):
		return fail("nothing listens there").
			WithHint("is shed-server running there, with a bind_address that other machines reach, and %d its ssh_port?", r.port)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fail("there is no way to it").WithHint("is it on, and this machine in its network?")
	case isTimeout(err):
		return fail("no answer").WithHint("is it on, and its port open to this machine?")
	}
	return shed.Errorf(shed.CodeUnreachable, "%s can't be reached: %w", r.label, err)
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// explainLogin is explain for what went wrong once it was connected.
func (r *remote) explainLogin(err error, a *attempt) error {
	var known *shed.Error
	switch said := err.Error(); {
	case a.refusal != nil:
		if errors.As(a.refusal, &known) {
			return known
		}
		return a.refusal
	case a.locked != nil && errors.As(a.locked, &known):
		return known
	case a.locked != nil:
		return shed.Errorf(shed.CodeUnreachable, "%s: a key that would be let in can't be used: %w", r.label, a.locked).
			WithHint("does the SSH agent still have it, and was its use allowed?")
	case a.keyGood && (strings.Contains(said, "unable to authenticate") || strings.Contains(said, "too many authentication failures")):
		refused := r.explainRefused(a)
		refused.Err = ErrRefused
		return refused
	case isTimeout(err):
		return shed.Errorf(shed.CodeUnreachable, "%s is connected, but does not answer", r.label).
			WithHint("is the server overloaded or stopped?")
	case strings.HasPrefix(a.conn.firstLine(), "Not allowed"):
		return shed.Errorf(shed.CodeUnreachable, "%s lets nobody in from here for a while: too many logins have failed", r.label).
			WithHint("it passes in a minute")
	case a.conn.firstLine() != "":
		return shed.Errorf(shed.CodeUnreachable, "%s: no SSH server of shed is there: it says %.80q", r.label, a.conn.firstLine()).
			WithHint("check the port")
	}
	return shed.Errorf(shed.CodeUnreachable, "%s: the login failed: %w", r.label, err)
}

func (r *remote) explainRefused(a *attempt) *shed.Error {
	const where = "add its line, without options, to ~/.ssh/authorized_keys of the user that runs shed-server there, or to auth.authorized_keys in its configuration"
	why := ""
	for _, p := range a.problems {
		why += fmt.Sprintf("; not used: %v", p)
	}
	if len(a.offered) == 0 {
		return shed.Errorf(shed.CodeUnreachable, "%s: there is no key to log in with%s", r.label, why).
			WithHint("make one: ssh-keygen -t ed25519; then " + where)
	}
	return shed.Errorf(shed.CodeUnreachable, "%s lets none of our keys in: %s%s", r.label, describeKeys(a.offered), why).
		WithHint("take the public key of one of them (ssh-add -L, or ~/.ssh/id_ed25519.pub) and " + where)
}
