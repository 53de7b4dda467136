package client

import (
	"context"
	"slices"
	"strings"
)

// hostOptions are the keywords of ssh_config(5) that get a connection to a host, and one key or another of the user's accepted.
var hostOptions = []string{
	"HostName", "IdentityFile", "CertificateFile", "IdentityAgent", "IdentitiesOnly", "ProxyJump", "ProxyCommand",
}

// anyHost is a host that nobody's configuration is about.
const anyHost = "any-host.invalid"

// HostOptions returns what the user's OpenSSH is told about a host, and not about all others, as lines for the
// configuration of another name of that host: there nothing that is said about the first name counts.
func (s *Servers) HostOptions(ctx context.Context, host string, port int) ([]string, error) {
	about, err := askOpenSSH(ctx, host, port)
	if err != nil {
		return nil, err
	}
	others, err := s.anyHost()
	if err != nil {
		return nil, err
	}
	return differing(about, others, host), nil
}

// differing returns the options that about, which is what `ssh -G` prints about host, has other than others has.
func differing(about, others []byte, host string) (options []string) {
	for _, keyword := range hostOptions {
		values := valuesOf(about, keyword)
		if slices.Equal(values, valuesOf(others, keyword)) || keyword == "HostName" && slices.ContainsFunc(values, func(v string) bool {
			return strings.EqualFold(v, host)
		}) {
			continue
		}
		for _, value := range values {
			if strings.HasPrefix(keyword, "Proxy") { // whose tokens are those of the name that the user gave
				value = strings.ReplaceAll(value, "%n", host)
			} else if strings.ContainsAny(value, " \t") {
				value = `"` + value + `"`
			}
			options = append(options, keyword+" "+value)
		}
	}
	return options
}

// valuesOf returns the values of keyword in what `ssh -G` prints.
func valuesOf(text []byte, keyword string) (values []string) {
	for key, value := range optionsIn(text) {
		if strings.EqualFold(key, keyword) {
			values = append(values, value)
		}
	}
	return values
}
