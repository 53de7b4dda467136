package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/user"
	"strings"
	"syscall"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// explain gives the error of a request to the registry a code, the registry's own message and
// what to try. Errors that have a code, and those of contexts, stay as they are.
func (r *registry) explain(err error) error {
	var explained *shed.Error
	if err == nil || errors.As(err, &explained) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	host := r.repo.RegistryStr()
	var (
		stranger x509.UnknownAuthorityError
		verify   *tls.CertificateVerificationError
		refusal  *transport.Error
	)
	// Near registries are tried with and without TLS, and err may be made of both attempts'.
	switch {
	case errors.As(err, &stranger):
		return shed.Errorf(shed.CodeRegistry, "%s: %w", host, stranger).
			WithHint("give the server the certificate of the registry's CA: put it in /usr/local/share/ca-certificates and run " +
				"update-ca-certificates, or start shed-server with SSL_CERT_FILE set; then restart shed-server")
	case errors.As(err, &verify):
		return shed.Errorf(shed.CodeRegistry, "%s: %w", host, verify).
			WithHint("the registry's certificate is not one for %s, or not at this time: does the server's clock go right?", host)
	case errors.As(err, &refusal):
		tries := ""
		if gave := (*gaveUp)(nil); errors.As(err, &gave) {
			tries = fmt.Sprintf(", in %d tries", gave.tries)
		}
		return r.explainRefusal(refusal, tries)
	}
	if uerr := (*url.Error)(nil); errors.As(err, &uerr) {
		// Its URL may be one that gives access by itself, after a redirection.
		if u, perr := url.Parse(uerr.URL); perr == nil && u.Host != "" {
			host = u.Host
		}
		err = uerr.Err
	}
	e := shed.Errorf(shed.CodeRegistry, "%s: %w", host, err)
	switch {
	case errors.As(err, new(*net.DNSError)) && r.repo.RegistryStr() == name.DefaultRegistry: // which few write in a name
		return e.WithHint("what is not in `shed image ls` and names no registry is looked for at Docker Hub: is the name right, and does the server's DNS work?")
	case errors.As(err, new(*net.DNSError)):
		return e.WithHint("is the name of the registry right, and does the server's DNS work?")
	case errors.Is(err, syscall.ECONNREFUSED):
		return e.WithHint("nothing listens there: is the registry running, and is its port right?")
	case errors.Is(err, errStalled):
		return e.WithHint("try again: what has come is kept, and a pull goes on from there")
	}
	return e.WithHint("try again; if that doesn't help, see whether the server reaches %s, and whether HTTPS_PROXY is needed", host)
}

// explainRefusal is explain for a registry's answer.
func (r *registry) explainRefusal(refusal *transport.Error, tries string) error {
	host := r.repo.RegistryStr()
	said := fmt.Sprintf("%d %s", refusal.StatusCode, http.StatusText(refusal.StatusCode))
	path := ""
	if refusal.Request != nil {
		host = refusal.Request.URL.Host
		path = refusal.Request.URL.Path
	}
	for _, d := range refusal.Errors {
		const most = 300 // bytes that a registry has to explain itself
		said += fmt.Sprintf(", %s: %.*s", d.Code, most, d.Message)
	}
	e := shed.Errorf(shed.CodeRegistry, "%s says %s%s", host, said, tries)
	e.Err = refusal
	switch status := refusal.StatusCode; {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return e.WithHint("is the name right? If so, it takes a login: `%s` on the server, as user %s", login(r.repo), serverUser())
	case status == http.StatusNotFound && strings.Contains(path, "/manifests/"):
		e.Code = shed.CodeNoImage
		return e.WithHint("check the name and the tag: %s has no such image", host)
	case status == http.StatusNotFound && strings.Contains(path, "/blobs/"):
		return e.WithHint("a part of the image is missing at the registry: push it there again")
	case status == http.StatusNotFound:
		return e.WithHint("is %s the address of an image registry?", host)
	case status == http.StatusTooManyRequests:
		return e.WithHint("try again later, or `%s` on the server, as user %s: registries often allow more to those who are logged in", login(r.repo), serverUser())
	case status >= 500:
		return e.WithHint("the registry has a fault; try again later")
	}
	return e
}

func login(repo name.Repository) string {
	if host := repo.RegistryStr(); host != name.DefaultRegistry {
		return "docker login " + host
	}
	return "docker login"
}

func serverUser() string {
	u, err := user.Current()
	if err != nil {
		return "that shed-server runs as"
	}
	return u.Username
}
