package image

import (
	"regexp"
	"strings"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/name"
)

const (
	dockerHub        = "docker.io"
	dockerHubLibrary = "library/"
)

var (
	repositoryRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	digestRE     = regexp.MustCompile(`^sha256:[a-f0-9]{64}$`)
	hexRE        = regexp.MustCompile(`^[a-f0-9]{64}$`)
)

// Familiar returns the shortest form of a reference, [REGISTRY/]REPOSITORY[:TAG][@DIGEST], that means the same:
// without "docker.io/library/" and ":latest", and without a tag where there is a digest. It is what tags in the store
// look like. One that can't be a reference is CodeInvalid.
func Familiar(ref string) (string, error) {
	parsed, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	return familiar(parsed), nil
}

func familiar(ref name.Reference) string {
	repo := ref.Context().RepositoryStr()
	if registry := ref.Context().RegistryStr(); registry != name.DefaultRegistry {
		repo = registry + "/" + repo
	} else if short, ok := strings.CutPrefix(repo, dockerHubLibrary); ok && !strings.Contains(short, "/") {
		repo = short
	} else if namesRegistry(repo) { // without docker.io its first part would be the registry
		repo = dockerHub + "/" + repo
	}
	switch id := ref.Identifier(); {
	case strings.Contains(id, ":"):
		return repo + "@" + id
	case id != name.DefaultTag:
		return repo + ":" + id
	}
	return repo
}

// namesRegistry says whether a reference begins with a registry's host.
func namesRegistry(ref string) bool {
	host, _, ok := strings.Cut(ref, "/")
	return ok && (host == "localhost" || strings.ContainsAny(host, ".:"))
}

// parseRef is name.ParseReference, with the grammar that registries have and errors that say what is wrong.
func parseRef(ref string) (name.Reference, error) {
	bad := func(format string, args ...any) error {
		return shed.Errorf(shed.CodeInvalid, "%q can't name an image: "+format, append([]any{ref}, args...)...).
			WithHint("write [REGISTRY/]REPOSITORY[:TAG][@DIGEST], like debian:12 or ghcr.io/owner/image:1.0")
	}
	if ref == "" {
		return nil, bad("it is empty")
	}
	if _, _, ok := strings.Cut(ref, "://"); ok {
		return nil, bad("it is a URL")
	}
	rest, digest, hasDigest := strings.Cut(ref, "@")
	if hasDigest && !digestRE.MatchString(digest) {
		return nil, bad("its digest, %q, is not sha256: and 64 digits of 0-9 and a-f", digest)
	}
	repo, tag, hasTag := rest, "", false
	if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexByte(rest, '/') {
		repo, tag, hasTag = rest[:i], rest[i+1:], true
	}
	if hasTag && !tagRE.MatchString(tag) {
		return nil, bad("its tag, %q, is not 1 to 128 letters, digits, '_', '.' and '-', the first of them no '.' or '-'", tag)
	}
	path := repo
	if namesRegistry(repo) {
		_, path, _ = strings.Cut(repo, "/")
	}
	switch {
	case path == "":
		return nil, bad("it has no repository")
	case path != strings.ToLower(path):
		return nil, bad("its repository, %q, has capital letters", path)
	case !repositoryRE.MatchString(path):
		return nil, bad("its repository, %q, is not a-z and 0-9 with single separators ('.', '_', '-', '/') between them", path)
	case hexRE.MatchString(repo):
		return nil, bad("it looks like a digest")
	}
	parsed, err := name.ParseReference(ref)
	if err != nil {
		// What is left is the registry and the whole's length.
		if _, rerr := name.NewRepository(repo); rerr != nil {
			err = rerr
		}
		return nil, bad("%w", err)
	}
	return parsed, nil
}
