package image

import (
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestFamiliar(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	for ref, want := range map[string]string{
		"debian":                                "debian",
		"debian:latest":                         "debian",
		"docker.io/debian":                      "debian",
		"docker.io/library/debian":              "debian",
		"index.docker.io/library/debian:latest": "debian",
		"debian:12":                             "debian:12",
		"library/debian:12":                     "debian:12",
		"library/a/b":                           "library/a/b",
		"docker.io/owner/image":                 "owner/image",
		"docker.io/localhost/image":             "docker.io/localhost/image",
		"docker.io/a.b/image:1":                 "docker.io/a.b/image:1",
		"ghcr.io/a/b:1":                         "ghcr.io/a/b:1",
		"ghcr.io/a/b:latest":                    "ghcr.io/a/b",
		"localhost/x":                           "localhost/x",
		"localhost:5000/x":                      "localhost:5000/x",
		"[::1]:5000/x:1":                        "[::1]:5000/x:1",
		"debian@" + digest:                      "debian@" + digest,
		"debian:12@" + digest:                   "debian@" + digest,
		"localhost:5000/x@" + digest:            "localhost:5000/x@" + digest,
		"localhost:5000/x:1@" + digest:          "localhost:5000/x@" + digest,
		"a__b-c---d.e/f_g:A_.-":                 "a__b-c---d.e/f_g:A_.-",
	} {
		got, err := Familiar(ref)
		if got != want || err != nil {
			t.Errorf("%q is %q, %v, want %q", ref, got, err, want)
			continue
		}
		if again, err := Familiar(got); again != got || err != nil {
			t.Errorf("%q, which %q became, is %q, %v", got, ref, again, err)
		}
	}
}

func TestFamiliarRefuses(t *testing.T) {
	for ref, want := range map[string]string{
		"":                                   "empty",
		"http://ghcr.io/a/b":                 "URL",
		"Debian":                             "capital",
		"ghcr.io/A/b":                        "capital",
		"ghcr.io/":                           "no repository",
		"ghcr.io//a":                         "separators",
		"localhost:5000/../x":                "separators",
		"a/./b":                              "separators",
		"/debian":                            "separators",
		"debian/":                            "separators",
		"-debian":                            "separators",
		"de bian":                            "separators",
		"de\nbian":                           "separators",
		"debian:":                            "tag",
		"debian:.1":                          "tag",
		"debian:a/b:c d":                     "tag",
		"debian:" + strings.Repeat("a", 129): "tag",
		"debian@":                            "digest",
		"debian@sha256:12":                   "digest",
		"debian@sha512:" + strings.Repeat("0", 128):                                            "digest",
		"debian@sha256:" + strings.Repeat("0", 64) + "@" + "sha256:" + strings.Repeat("0", 64): "digest",
		strings.Repeat("0a", 32): "digest",
		strings.Repeat("a", 300): "255",
		"a b.example.com/x":      "authorities",
		"user:pw@ghcr.io/x":      "digest",
		"ghcr.io:x:y/z":          "authorities",
	} {
		got, err := Familiar(ref)
		if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), want) || shed.ErrorHint(err) == "" {
			t.Errorf("%q is %q, %v, want %s with %q", ref, got, err, shed.CodeInvalid, want)
		}
	}
}

func FuzzFamiliar(f *testing.F) {
	f.Add("docker.io/library/debian:12")
	f.Add("localhost:5000/x@sha256:" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, ref string) {
		short, err := Familiar(ref)
		if err != nil {
			return
		}
		if again, err := Familiar(short); again != short || err != nil {
			t.Errorf("%q became %q, and that %q, %v", ref, short, again, err)
		}
		before, _ := parseRef(ref)
		if after, err := parseRef(short); err != nil || after.Name() != before.Name() {
			t.Errorf("%q is %s, and as %q %v, %v", ref, before.Name(), short, after, err)
		}
	})
}
