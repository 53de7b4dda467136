package image

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/porttest"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/bcrypt"
)

// realRegistry runs Debian's docker-registry, with more of its configuration, and returns its host.
func realRegistry(t testing.TB, config string) string {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatal("docker-registry is needed for this test: install the package of that name")
	}
	dir := t.TempDir()
	port, err := porttest.Unused()
	if err != nil {
		t.Fatal(err)
	}
	host := fmt.Sprintf("127.0.0.1:%d", port)
	file := filepath.Join(dir, "config.yml")
	config = fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp:\n  addr: %s\n%s",
		dir, host, config)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(bin, "serve", file)
	cmd.Env = []string{} // REGISTRY_* are settings of this program, and one of them podman's too
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("docker-registry says:\n%s", log.String())
		}
	})
	for {
		if conn, err := net.Dial("tcp", host); err == nil {
			conn.Close()
			return host
		}
		select {
		case <-exited:
			t.Fatal("docker-registry ended")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// inspect returns what skopeo's inspect says.
func inspect(t testing.TB, args ...string) string {
	t.Helper()
	return strings.TrimSpace(skopeo(t, append([]string{"inspect"}, args...)...))
}

// threeLayers puts an image into s, gives it the tag, and returns its digest.
func threeLayers(t testing.TB, s *Store, tag string) v1.Hash {
	t.Helper()
	return digestOf(t, addImage(t, s, tag,
		layerOf(t, types.OCILayer, tarOf(t, "a", noise(1<<20, 1))), layerOf(t, types.OCILayerZStd, tarOf(t, "b", noise(1<<20, 2))),
		layerOf(t, types.OCIUncompressedLayer, tarOf(t, "c", noise(1<<20, 3))), layerOf(t, types.OCILayer, tarOf(t, "a", noise(1<<20, 1)))))
}

func TestPushAndPull(t *testing.T) {
	noGoroutinesLeft(t)
	noCredentials(t)
	host := realRegistry(t, "")
	s := open(t, t.TempDir())
	digest := threeLayers(t, s, "base")
	ref := host + "/some/base:1"

	var mu sync.Mutex
	ends := map[string][]string{}
	progress := func(e shed.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Done {
			ends[e.Phase] = append(ends[e.Phase], e.Message)
		}
	}
	for _, want := range []string{"", "already there"} {
		clear(ends)
		pushed, err := s.push(t.Context(), shed.PushOptions{Image: "base", To: ref}, patient, progress)
		if err != nil || pushed.Digest != digest.String() || pushed.Ref != ref {
			t.Fatalf("pushed is %+v, %v, hint %q", pushed, err, shed.ErrorHint(err))
		}
		if got := ends["push"]; len(got) != 5 || got[0] != want || got[3] != want {
			t.Errorf("the phase's ends are %q, want %q for each blob", got, want)
		}
	}
	if got := inspect(t, "--tls-verify=false", "--format", "{{.Digest}} {{len .Layers}}", "docker://"+ref); got != digest.String()+" 4" {
		t.Errorf("skopeo sees %s, want %s", got, digest)
	}

	other := open(t, t.TempDir())
	img, err := other.Pull(t.Context(), shed.PullOptions{Ref: ref}, nil)
	if err != nil || img.Digest != digest.String() {
		t.Fatalf("pulled is %v, %v", img, err)
	}
	pushed, err := other.Push(t.Context(), shed.PushOptions{Image: ref}, nil)
	if err != nil || pushed.Ref != ref {
		t.Errorf("pushed to where it came from is %+v, %v", pushed, err)
	}
	// What skopeo reads from the layout and pushes is the same, and what it pushes in Docker's format comes in.
	if got := inspect(t, "--format", "{{.Digest}}", "oci:"+other.dir+":"+ref); got != digest.String() {
		t.Errorf("skopeo sees %s in the layout, want %s", got, digest)
	}
	skopeo(t, "copy", "-q", "--preserve-digests", "--dest-tls-verify=false", "oci:"+other.dir+":"+ref, "docker://"+host+"/copied")
	if img, err := other.Pull(t.Context(), shed.PullOptions{Ref: host + "/copied:latest"}, nil); err != nil || img.Digest != digest.String() || img.Ref != host+"/copied" {
		t.Errorf("what skopeo pushed is %+v, %v", img, err)
	}
	addImage(t, s, "plain", layerOf(t, types.OCILayer, tarOf(t, "f", "x")))
	skopeo(t, "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false", "oci:"+s.dir+":plain", "docker://"+host+"/docker")
	want := inspect(t, "--tls-verify=false", "--format", "{{.Digest}}", "docker://"+host+"/docker")
	img, err = s.Pull(t.Context(), shed.PullOptions{Ref: host + "/docker"}, nil)
	if err != nil || img.Digest != want {
		t.Fatalf("an image in Docker's format is %+v, %v, want %s", img, err, want)
	}
	if pushed, err := s.Push(t.Context(), shed.PushOptions{Image: img.Ref, To: host + "/docker:again"}, nil); err != nil || pushed.Digest != want {
		t.Errorf("pushed back it is %+v, %v, want %s", pushed, err, want)
	}
	if left := leftovers(t, filepath.Dir(s.dir)); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
}

func TestPushRefuses(t *testing.T) {
	f := newFakeRegistry(t)
	s := open(t, t.TempDir())
	digest := threeLayers(t, s, "base")
	desc, err := partial.Descriptor(addImage(t, s, "", layerOf(t, types.OCILayer, tarOf(t, "f", "untagged"))))
	if err != nil {
		t.Fatal(err)
	}
	byDigest := f.host + "/x@" + digest.String()
	for name, tc := range map[string]struct {
		opts shed.PushOptions
		code shed.Code
		want string
		hint string
	}{
		"no such image":  {shed.PushOptions{Image: "nope"}, shed.CodeNoImage, "nope", ""},
		"no registry":    {shed.PushOptions{Image: "base"}, shed.CodeInvalid, "names no registry", "--to docker.io/NAME/base"},
		"no tag":         {shed.PushOptions{Image: desc.Digest.String()}, shed.CodeInvalid, "has no tag", "--to"},
		"bad":            {shed.PushOptions{Image: "base", To: "Bad"}, shed.CodeInvalid, "capital", ""},
		"digest":         {shed.PushOptions{Image: "base", To: byDigest}, shed.CodeInvalid, "needs a tag", "--to " + f.host + "/x:TAG"},
		"registry can't": {shed.PushOptions{Image: "base", To: f.ref()}, shed.CodeRegistry, "404", ""},
	} {
		t.Run(name, func(t *testing.T) {
			pushed, err := s.push(t.Context(), tc.opts, hasty, nil)
			if shed.ErrorCode(err) != tc.code || !strings.Contains(err.Error(), tc.want) || !strings.Contains(shed.ErrorHint(err), tc.hint) {
				t.Errorf("it gives %+v, %s, %v, hint %q", pushed, shed.ErrorCode(err), err, shed.ErrorHint(err))
			}
		})
	}
}

// A registry that answers uploads with other things than it should.
func TestPushHostile(t *testing.T) {
	for name, tc := range map[string]struct {
		upload func(w http.ResponseWriter, r *http.Request, n int) // of a blob, or of the manifest; n counts from 1
		code   shed.Code
		want   string
	}{
		"429 at first": {func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				w.Header().Set("Retry-After", "0")
				w.WriteHeader(http.StatusTooManyRequests)
				return
			}
			w.WriteHeader(http.StatusCreated)
		}, "", ""},
		"500 at first": {func(w http.ResponseWriter, r *http.Request, n int) {
			w.WriteHeader(map[bool]int{true: 500, false: 201}[n == 1])
		}, "", ""},
		"500":    {func(w http.ResponseWriter, r *http.Request, n int) { w.WriteHeader(500) }, shed.CodeRegistry, "500"},
		"denied": {func(w http.ResponseWriter, r *http.Request, n int) { w.WriteHeader(403) }, shed.CodeRegistry, "403"},
		"stall": {func(w http.ResponseWriter, r *http.Request, n int) {
			<-r.Context().Done()
		}, shed.CodeRegistry, "stalled"},
	} {
		t.Run(name, func(t *testing.T) {
			noGoroutinesLeft(t)
			f := newFakeRegistry(t)
			s := open(t, t.TempDir())
			digest := digestOf(t, addImage(t, s, "base"))
			raw, err := s.readBlob(digest)
			if err != nil {
				t.Fatal(err)
			}
			puts := 0
			f.will(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case r.Method == http.MethodPost:
					w.Header().Set("Location", "/upload")
					w.WriteHeader(http.StatusAccepted)
				case r.Method == http.MethodPatch:
					w.Header().Set("Location", "/upload")
					w.WriteHeader(http.StatusAccepted)
				case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/"):
					f.mu.Lock()
					f.manifests["1"] = fakeManifest{raw, types.OCIManifestSchema1}
					f.mu.Unlock()
					w.WriteHeader(http.StatusCreated)
				case r.Method == http.MethodPut:
					puts++
					tc.upload(w, r, puts)
				default:
					return false
				}
				return true
			})
			p := hasty
			p.answer = p.stall
			pushed, err := s.push(t.Context(), shed.PushOptions{Image: "base", To: f.ref()}, p, nil)
			if shed.ErrorCode(err) != tc.code || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("it gives %+v, %v, want %q with %q", pushed, err, tc.code, tc.want)
			}
			if err == nil && pushed.Digest != digest.String() {
				t.Errorf("pushed is %+v", pushed)
			}
			f.mu.Lock()
			f.manifests["1"] = fakeManifest{[]byte("{}"), types.OCIManifestSchema1}
			f.mu.Unlock()
		})
	}
}

func TestPrivateRegistry(t *testing.T) {
	home := noCredentials(t)
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(users, []byte("me:"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host := realRegistry(t, fmt.Sprintf("auth: {htpasswd: {realm: x, path: %s}}\n", users))
	s := open(t, t.TempDir())
	digest := threeLayers(t, s, "base")
	opts := shed.PushOptions{Image: "base", To: host + "/base"}
	if _, err := s.Push(t.Context(), opts, nil); shed.ErrorCode(err) != shed.CodeRegistry || !strings.Contains(shed.ErrorHint(err), "docker login "+host) {
		t.Errorf("without a login it gives %v, hint %q", err, shed.ErrorHint(err))
	}
	write := func(path, content string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	// By podman login, by docker login, and by a credential helper.
	auths := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, host, base64.StdEncoding.EncodeToString([]byte("me:secret")))
	podman := filepath.Join(home, ".config", "containers", "auth.json")
	write(podman, auths, 0o600)
	if pushed, err := s.Push(t.Context(), opts, nil); err != nil || pushed.Digest != digest.String() {
		t.Errorf("with podman's login it gives %+v, %v", pushed, err)
	}
	if err := os.Remove(podman); err != nil {
		t.Fatal(err)
	}
	docker := filepath.Join(home, ".docker", "config.json")
	write(docker, auths, 0o600)
	pull := func(how string) {
		t.Helper()
		s := open(t, t.TempDir())
		if img, err := s.Pull(t.Context(), shed.PullOptions{Ref: opts.To}, nil); err != nil || img.Digest != digest.String() {
			t.Errorf("with %s it gives %+v, %v", how, img, err)
		}
	}
	pull("docker's login")
	bin := t.TempDir()
	write(filepath.Join(bin, "docker-credential-test"), "#!/bin/sh\nread -r host\necho '{\"Username\": \"me\", \"Secret\": \"secret\"}'\n", 0o700)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	write(docker, fmt.Sprintf(`{"credHelpers": {%q: "test"}}`, host), 0o600)
	pull("a credential helper")
	write(docker, `{"auths": `, 0o600)
	if _, err := s.Pull(t.Context(), shed.PullOptions{Ref: opts.To}, nil); shed.ErrorCode(err) != shed.CodeRegistry || !strings.Contains(shed.ErrorHint(err), "config.json") {
		t.Errorf("with a damaged configuration it gives %v, hint %q", err, shed.ErrorHint(err))
	}
}

// A registry whose certificate the system knows is used, and another is not. Go reads the system's
// certificates once in a process, so this one starts itself again.
func TestRegistryCertificate(t *testing.T) {
	noCredentials(t)
	cert, key := certificate(t)
	if ref := os.Getenv("SHED_TEST_TLS_REF"); ref != "" {
		_, err := open(t, t.TempDir()).Pull(t.Context(), shed.PullOptions{Ref: ref}, nil)
		fmt.Printf("code %q, error %v, hint %q\n", shed.ErrorCode(err), err, shed.ErrorHint(err))
		return
	}
	host := realRegistry(t, fmt.Sprintf("  tls: {certificate: %s, key: %s}\n", cert, key))
	s := open(t, t.TempDir())
	threeLayers(t, s, "base")
	skopeo(t, "copy", "-q", "--dest-tls-verify=false", "oci:"+s.dir+":base", "docker://"+host+"/base")
	pull := func(env ...string) string {
		cmd := exec.Command(os.Args[0], "-test.run=^TestRegistryCertificate$")
		cmd.Env = append(append(os.Environ(), "SHED_TEST_TLS_REF="+host+"/base"), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := pull(); !strings.Contains(out, `code "REGISTRY"`) || !strings.Contains(out, "x509") || !strings.Contains(out, "SSL_CERT_FILE") {
		t.Errorf("an unknown certificate gives %s", out)
	}
	if out := pull("SSL_CERT_FILE=" + cert); !strings.Contains(out, `code "", error <nil>`) {
		t.Errorf("a known certificate gives %s", out)
	}
}

// certificate makes a certificate for 127.0.0.1 that is its own CA, and returns its file and that of its key.
func certificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
}

// BenchmarkPull pulls the image that SHED_BENCH_OCI, a layout with its tag, names from a registry on
// this machine until it is ready to boot.
func BenchmarkPull(b *testing.B) {
	layout := os.Getenv("SHED_BENCH_OCI")
	if layout == "" {
		b.Skip("SHED_BENCH_OCI names no image")
	}
	noCredentials(b)
	host := realRegistry(b, "")
	skopeo(b, "copy", "-q", "--dest-tls-verify=false", "oci:"+layout, "docker://"+host+"/image")
	for b.Loop() {
		s := open(b, b.TempDir())
		img, err := s.Pull(context.Background(), shed.PullOptions{Ref: host + "/image"}, nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := s.Rootfs(context.Background(), img, nil); err != nil {
			b.Fatal(err)
		}
		var blobs int64
		for _, l := range img.Layers {
			blobs += l.Size
		}
		b.SetBytes(blobs)
		runtime.GC()
	}
}
