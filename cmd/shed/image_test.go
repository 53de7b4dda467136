package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

func TestImageList(t *testing.T) {
	fake := &apitest.Fake{}
	fake.AddImage(shed.Image{Digest: apitest.Digest("d"), Source: shed.SourceDangling, Size: 3 << 20, InUse: []string{"a", "b"}})
	serve(t, fake)
	code, stdout, stderr := shedCLI("image", "list")
	lines := strings.Split(stdout, "\n")
	if code != 0 || stderr != "" || lines[0] != "REF    DIGEST                SOURCE     SIZE      IN USE   CREATED" ||
		!strings.HasPrefix(lines[1], "base   sha256:abababababab   user       207 MiB   -        ") ||
		lines[2] != "-      sha256:dddddddddddd   dangling   3.0 MiB   a,b      -" {
		t.Errorf("image list: %d %q\n%s", code, stderr, stdout)
	}
	var images []shed.Image
	if code, stdout, _ := shedCLI("image", "ls", "--json"); code != 0 || json.Unmarshal([]byte(stdout), &images) != nil || len(images) != 2 {
		t.Errorf("image ls --json: %d %s", code, stdout)
	}
	fake.AddImage(shed.Image{Ref: "odd", Digest: apitest.Digest("e"), Problem: "/a/blob is damaged"})
	if code, _, stderr := shedCLI("image", "ls"); code != 0 || stderr != "image odd: /a/blob is damaged\n" {
		t.Errorf("with a damaged image image ls gives %d %q", code, stderr)
	}
	if _, stdout, _ := shedCLI("__complete", "image", "rm", ""); !strings.HasPrefix(stdout, "base\nsha256:ddd") {
		t.Errorf("completion of names: %q", stdout)
	}
}

func TestImageExitCodes(t *testing.T) {
	fake := &apitest.Fake{}
	serve(t, fake)
	commands := []string{
		"inspect x", "history x", "pull x", "push x", "tag x y", "save x", "load", "rm --force x", "prune --force", "build --preset x", "build -t x .",
	}
	t.Chdir(t.TempDir())
	if err := os.WriteFile("Dockerfile", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for code, want := range map[shed.Code]int{
		shed.CodeNoImage: 3, shed.CodeConflict: 4, shed.CodeRegistry: 1, shed.CodeInvalid: 2, shed.CodeCommand: 1,
	} {
		fake.Before = func(context.Context, string, string, shed.Progress) error {
			return shed.Errorf(code, "no good").WithHint("try again")
		}
		for _, args := range commands {
			expect(t, "image "+args, want, "", "shed: no good\nhint: try again\n")
		}
	}
}

func TestImageUsage(t *testing.T) {
	serve(t, &apitest.Fake{Before: func(_ context.Context, op, _ string, _ shed.Progress) error {
		t.Errorf("a wrong command line got as far as %s", op)
		return nil
	}})
	t.Chdir(t.TempDir())
	for _, dir := range []string{"full", "ctx"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"rm base":                        `needs --force where it can't ask`,
		"prune":                          `hint: see what would go with --dry-run`,
		"pull":                           `needs REF`,
		"pull a b":                       `got "b"`,
		"push a b c":                     `got "b"`,
		"tag a":                          `needs TAG`,
		"save":                           `needs NAME`,
		"save -o /none/file base":        `/none/file can't be written`,
		"load -i /none/file":             `no such file`,
		"inspect":                        `needs NAME`,
		"build":                          `needs a directory with a Dockerfile, or a preset: base, extensions, full`,
		"build ctx":                      `needs --tag`,
		"build a b":                      `got "b" too`,
		"build nothing":                  "\"nothing\" is neither a directory nor a preset\nhint: presets are base, extensions, full",
		"build full":                     "\"full\" is both a preset and a directory here\nhint: for the preset: shed image build --preset full; for the directory: shed image build ./full -t TAG",
		"build base -t x":                "there is no directory \"base\"\nhint: for the preset: shed image build --preset base",
		"build file -t x":                "for a Dockerfile: -f file DIRECTORY",
		"build --preset base ctx":        `--preset takes no directory, got "ctx"`,
		"build --preset base -f x":       `--file is for Dockerfiles`,
		"build --from-oci-archive x ctx": `--from-oci-archive takes no directory`,
		"build --from-oci-archive x --preset base": `--preset doesn't go with --from-oci-archive`,
		"build --from-oci-archive /none":           `no such file`,
		"build ctx -t x":                           "there is no Dockerfile",
		"build ctx -t x -f /none":                  "hint: name one with --file",
		"build ctx -t x --build-arg =1 -f -":       `has no name`,
	} {
		code, stdout, stderr := shedCLI(strings.Fields("image " + args)...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("shed image %s: %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
	if code, stdout, _ := shedCLI("image", "save", "base", "--json"); code != exitUsage || !json.Valid([]byte(stdout)) {
		t.Errorf("save --json to stdout: %d %q", code, stdout)
	}
}

func TestImageMoves(t *testing.T) {
	fake := &apitest.Fake{}
	serve(t, fake)
	var before []string
	fake.Before = func(_ context.Context, op, name string, _ shed.Progress) error {
		before = append(before, op+" "+name)
		return nil
	}
	expect(t, "image pull debian:12 --platform linux/arm64", 0, "debian:12\n", "pulled "+apitest.Digest("b2")+", 207 MiB\n")
	expect(t, "image push debian:12", 0, "debian:12@"+apitest.Digest("b2")+"\n", "")
	expect(t, "image push base reg/x:1", 0, "reg/x:1@"+apitest.Digest("ab")+"\n", "")
	expect(t, "image tag base mine", 0, "mine\n", "")
	expect(t, "image load", 0, "loaded\n", "")
	want := []string{"pull debian:12 linux/arm64", "push debian:12", "push base", "tag base", "load "}
	if !slices.Equal(before, want) {
		t.Errorf("asked for %q", before)
	}
	for _, args := range []string{"pull x", "push base", "tag base y", "load", "build --preset base", "rm --force base", "prune --force", "prune --dry-run"} {
		if code, stdout, _ := shedCLI(append(strings.Fields("image "+args), "--json")...); code != 0 || !json.Valid([]byte(stdout)) {
			t.Errorf("%s --json: %d %q", args, code, stdout)
		}
	}
}

func TestImageSave(t *testing.T) {
	fake := &apitest.Fake{}
	serve(t, fake)
	t.Chdir(t.TempDir())
	expect(t, "image save base", 0, "base", "")
	expect(t, "image save base base -o out.tar", 0, "", "wrote 9 B to out.tar\n")
	if err := os.Symlink("out.tar", "link"); err != nil {
		t.Fatal(err)
	}
	expect(t, "image save base -o link --json", 0, "{\n  \"file\": \"link\",\n  \"size\": 4\n}\n", "")
	check := func(want string) {
		t.Helper()
		if b, err := os.ReadFile("out.tar"); string(b) != want || err != nil {
			t.Errorf("out.tar has %q, %v", b, err)
		}
		if entries, err := os.ReadDir("."); len(entries) != 2 || err != nil {
			t.Errorf("there is more than was asked for: %v, %v", entries, err)
		}
	}
	check("base")
	// What breaks off in the middle leaves the file as it was.
	fake.Archive = func(_ context.Context, w io.Writer) error {
		io.WriteString(w, strings.Repeat("x", 1<<20))
		return errors.New("disk on fire")
	}
	expect(t, "image save base -o out.tar", 1, "", "shed: disk on fire\n")
	check("base")
	// A device is written to, not replaced.
	fake.Archive = nil
	expect(t, "image save base -o "+os.DevNull, 0, "", "wrote 4 B to "+os.DevNull+"\n")
	if info, err := os.Stat(os.DevNull); err != nil || info.Mode().IsRegular() {
		t.Errorf("%s is %v, %v", os.DevNull, info, err)
	}
}

func TestImageLoad(t *testing.T) {
	var got []byte
	fake := &apitest.Fake{Take: func(_ context.Context, r io.Reader, _ shed.Progress) (err error) {
		got, err = io.ReadAll(r)
		return err
	}}
	serve(t, fake)
	path := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(path, []byte("archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	expect(t, "image load -i "+path, 0, "loaded\n", "")
	if string(got) != "archive" {
		t.Errorf("the server got %q", got)
	}
	var out, errs bytes.Buffer
	if code := run([]string{"image", "load"}, strings.NewReader("from stdin"), &out, &errs); code != 0 || string(got) != "from stdin" {
		t.Errorf("%d %q, the server got %q", code, errs.String(), got)
	}
	expect(t, "image build --from-oci-archive "+path+" -t mine", 0, "mine\n", "built "+apitest.Digest("b3")+", 207 MiB\n")
	expect(t, "image build --from-oci-archive "+path, 0, "loaded\n", "built "+apitest.Digest("b3")+", 207 MiB\n")
	// In a pipe a layer has no line, unless somebody wants to know.
	fake.Take = func(_ context.Context, r io.Reader, p shed.Progress) error {
		done := p.Phase("convert", "converting layers")
		for i := range 3 {
			p.Report(shed.Event{Phase: "convert", Item: layer(i), Current: 1, Total: 1, Unit: "bytes", Done: true})
		}
		done()
		return nil
	}
	for args, items := range map[string]int{"": 0, "-v": 3} {
		_, _, stderr := shedCLI(strings.Fields("image load -i " + path + " " + args)...)
		if strings.Count(stderr, ": sha256:") != items || !strings.Contains(stderr, ": converting layers ... ") {
			t.Errorf("load %s says\n%s", args, stderr)
		}
	}
}

func TestImageInspect(t *testing.T) {
	fake := &apitest.Fake{}
	img := apitest.Base()
	img.Ref, img.InUse, img.Layers = "x\x1b[2J", []string{"web", "db"}, []shed.Layer{{Digest: "sha256:1", Size: 5 << 20, BlockImage: 9 << 20}, {Digest: "sha256:2"}}
	fake.AddImage(img)
	serve(t, fake)
	code, stdout, stderr := shedCLI("image", "inspect", "base", "x\x1b[2J")
	for _, want := range []string{
		"Ref:         base\nDigest:      " + apitest.Digest("ab") + "\n", "\n\nRef:         x\uFFFD[2J\n", "In use:      web, db\n",
		"Created:     2026-03-04T05:06:07Z (", "Entrypoint:  [\"/entry\",\"a b\"]\nCommand:     [\"run\"]\nPorts:       8080/tcp\n",
		"Env:         PATH=/bin\n             A=b c\nLabels:      who=me\n", "Layers:      sha256:1 5.0 MiB, 9.0 MiB on disk to boot from\n             sha256:2 0 B\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not in\n%s", want, stdout)
		}
	}
	if code != 0 || stderr != "" {
		t.Errorf("%d %q", code, stderr)
	}
	var details []shed.ImageDetail
	if code, stdout, _ := shedCLI("image", "inspect", "base", "--json"); code != 0 || json.Unmarshal([]byte(stdout), &details) != nil || len(details) != 1 || details[0].Config.User != "node" {
		t.Errorf("--json: %d %s", code, stdout)
	}
	code, stdout, stderr = shedCLI("image", "inspect", "none", "base", "nor")
	if code != 3 || !strings.HasPrefix(stdout, "Ref:         base\n") || strings.Count(stderr, "there is no image") != 2 {
		t.Errorf("with some that aren't there: %d %q %q", code, stdout, stderr)
	}
	code, stdout, _ = shedCLI("image", "history", "x\x1b[2J")
	lines := strings.Split(stdout, "\n")
	if code != 0 || len(lines) != 5 || lines[0] != strings.TrimRight(lines[0], " ") || strings.Join(strings.Fields(lines[1]), " ") != `- CMD ["run"] 0 B - the end` ||
		!strings.Contains(lines[3], "RUN step 0    5.0 MiB   9.0 MiB   -") {
		t.Errorf("history: %d\n%s", code, stdout)
	}
	var history []shed.ImageHistory
	if code, stdout, _ := shedCLI("image", "history", "base", "--json"); code != 0 || json.Unmarshal([]byte(stdout), &history) != nil || len(history) != 2 || history[0].Comment != "the end" {
		t.Errorf("history --json: %d %s", code, stdout)
	}
}

func TestFitColumn(t *testing.T) {
	header := []string{"A", "B", "C"}
	rows := [][]string{{"aaaa", strings.Repeat("ü", 100), "c"}, {"a", "short", "cc"}}
	fitColumn(header, rows, 1, 40)
	if want := 40 - 4 - 2 - 6; len([]rune(rows[0][1])) != want || rows[1][1] != "short" {
		t.Errorf("got %q", rows)
	}
	fitColumn(header, rows, 1, 5)
	if len([]rune(rows[0][1])) != 20 {
		t.Errorf("where nothing is left: %q", rows)
	}
}

func TestImageRemove(t *testing.T) {
	fake := &apitest.Fake{}
	fake.AddImage(shed.Image{Ref: "used", Digest: apitest.Digest("7"), InUse: []string{"web"}})
	fake.AddImage(shed.Image{Digest: apitest.Digest("8"), Source: shed.SourceDangling, Size: 3 << 20})
	serve(t, fake)
	expect(t, "image rm --force base none", 3, "", "shed: there is no image \"none\"\nhint: list them: shed image ls\n")
	if images, err := fake.Images(t.Context()); err != nil || len(images) != 3 {
		t.Errorf("one that isn't there, and there are %v, %v", images, err)
	}
	expect(t, "image delete --force base", 0,
		"KIND    NAME"+strings.Repeat(" ", 70)+"SIZE\ntag     base"+strings.Repeat(" ", 70)+"-\nimage   "+apitest.Digest("ab")+"   207 MiB\n", "freed 207 MiB\n")
	table := "KIND    NAME" + strings.Repeat(" ", 70) + "SIZE\nimage   " + apitest.Digest("8") + "   3.0 MiB\n"
	expect(t, "image prune --dry-run", 0, table, "that would free 3.0 MiB\n")
	expect(t, "image prune --force", 0, table, "freed 3.0 MiB\n")
	expect(t, "image prune --force", 0, "", "there is nothing to prune\n")
	var removed shed.Removed
	if code, stdout, _ := shedCLI("image", "rm", "--json", "-f", "used"); code != 0 || json.Unmarshal([]byte(stdout), &removed) != nil || len(removed.Items) != 2 {
		t.Errorf("rm --json: %d %s", code, stdout)
	}
}

// received is what a fake build got, by name.
type received map[string]*tar.Header

// serveBuilds starts a server that takes contexts in.
func serveBuilds(t *testing.T) (fake *apitest.Fake, got func() (received, map[string]string)) {
	t.Helper()
	headers, contents := received{}, map[string]string{}
	fake = &apitest.Fake{Take: func(_ context.Context, r io.Reader, p shed.Progress) error {
		headers, contents = received{}, map[string]string{}
		in := tar.NewReader(r)
		for {
			h, err := in.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			b, err := io.ReadAll(in)
			if err != nil {
				return err
			}
			headers[h.Name], contents[h.Name] = h, string(b)
		}
		done := p.Phase("build", "building")
		p.Report(shed.Event{Phase: "build", Message: "STEP 1: FROM x\n"})
		p.Report(shed.Event{Phase: "build", Message: "  RUN \x1b[31mred"})
		done()
		return nil
	}}
	serve(t, fake)
	return fake, func() (received, map[string]string) { return headers, contents }
}

func names(headers received) []string {
	var list []string
	for name := range headers {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}

func writeTree(t *testing.T, files map[string]string) {
	t.Helper()
	for name, contents := range files {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(contents), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImageBuild(t *testing.T) {
	fake, got := serveBuilds(t)
	t.Chdir(t.TempDir())
	t.Setenv("FROM_HERE", "1 2")
	writeTree(t, map[string]string{
		"ctx/Dockerfile": "FROM x", "ctx/docker/Dockerfile": "FROM y", "ctx/.dockerignore": "docker\nnode_modules\n**/*.log\n!keep.log\n",
		"ctx/node_modules/big": "", "ctx/a/b.log": "", "ctx/keep.log": "kept", "ctx/a/run.sh": "#!", "outside": "FROM z",
	})
	if err := os.Chmod("ctx/a/run.sh", 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"ctx/up": "../outside", "ctx/broken": "/none/at all", "ctx/dir": "a"} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo("ctx/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", "ctx/sock")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()

	code, stdout, stderr := shedCLI("image", "build", "-t", "mine:1", "--build-arg", "A=b=c", "--build-arg", "FROM_HERE", "--build-arg", "NOWHERE", "--target", "s", "--no-cache", "ctx")
	if code != 0 || stdout != "mine:1\n" || !strings.HasPrefix(stderr, "STEP 1: FROM x\n  RUN \uFFFD[31mred\nbuild mine:1: building ... ") ||
		!strings.Contains(stderr, "not sent: fifo is a pipe\nnot sent: sock is a socket\n") {
		t.Errorf("%d %q %q", code, stdout, stderr)
	}
	want := shed.BuildOptions{Tag: "mine:1", Dockerfile: "Dockerfile", Target: "s", Args: map[string]string{"A": "b=c", "FROM_HERE": "1 2"}, NoCache: true}
	if !reflect.DeepEqual(fake.Built(), want) {
		t.Errorf("built with %+v", fake.Built())
	}
	headers, contents := got()
	if list := names(headers); !slices.Equal(list, []string{".dockerignore", "Dockerfile", "a/", "a/run.sh", "broken", "dir", "keep.log", "up"}) {
		t.Errorf("sent %q", list)
	}
	if contents["keep.log"] != "kept" || headers["up"].Linkname != "../outside" || headers["dir"].Typeflag != tar.TypeSymlink || headers["a/run.sh"].Mode&0o777 != 0o755 || headers["a/run.sh"].Uid != 0 || headers["a/run.sh"].Uname != "" {
		t.Errorf("sent %+v, %q", headers, contents)
	}

	// Dockerfiles elsewhere: one in a directory that isn't sent, one outside, one behind a link, and stdin.
	if code, _, stderr := shedCLI("image", "build", "-t", "x", "-f", "ctx/docker/Dockerfile", "ctx"); code != 0 {
		t.Errorf("%d %q", code, stderr)
	}
	if _, contents := got(); fake.Built().Dockerfile != "docker/Dockerfile" || contents["docker/Dockerfile"] != "FROM y" {
		t.Errorf("%+v, %q", fake.Built(), contents)
	}
	for file, want := range map[string]string{"outside": "FROM z", "ctx/up": "FROM z", "-": "FROM stdin"} {
		var errs bytes.Buffer
		if code := run([]string{"image", "build", "-t", "x", "-f", file, "ctx"}, strings.NewReader("FROM stdin"), io.Discard, &errs); code != 0 {
			t.Errorf("-f %s: %d %q", file, code, errs.String())
		}
		if _, contents := got(); !strings.HasPrefix(fake.Built().Dockerfile, ".dockerfile.") || contents[fake.Built().Dockerfile] != want {
			t.Errorf("-f %s: %+v, %q", file, fake.Built(), contents)
		}
	}

	// An ignore file of the Dockerfile's own; without exceptions whole directories are left out.
	writeTree(t, map[string]string{"ctx/Dockerfile.dockerignore": "*\n"})
	t.Chdir("ctx")
	if code, _, stderr := shedCLI("image", "build", "-t", "x", "."); code != 0 {
		t.Errorf("%d %q", code, stderr)
	}
	if headers, _ := got(); !slices.Equal(names(headers), []string{"Dockerfile"}) {
		t.Errorf("sent %q", names(headers))
	}
	writeTree(t, map[string]string{"Dockerfile.dockerignore": "[\n"})
	expect(t, "image build -t x .", 2, "", "shed: .dockerignore: syntax error in pattern\n")
}

// A context that can't be read makes no image.
func TestImageBuildUnreadable(t *testing.T) {
	serveBuilds(t)
	t.Chdir(t.TempDir())
	writeTree(t, map[string]string{"Dockerfile": "FROM x"})
	files, err := newBuildContext(".", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	files.dir = filepath.Join(files.dir, "gone")
	if err := files.write(t.Context(), io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is gone: %v", err)
	}
}

func TestImagePresets(t *testing.T) {
	serve(t, &apitest.Fake{})
	t.Chdir(t.TempDir())
	built := "built " + apitest.Digest("ab") + ", 207 MiB\n"
	expect(t, "image build base", 0, "base\n", built)
	expect(t, "image build --preset base", 0, "base\n", built)
	expect(t, "image build --preset base -t mine", 0, "mine\n", built)
	expect(t, "image build --preset nothing", 2, "", "shed: there is no preset \"nothing\"\n")
	expect(t, "image build full", 2, "", "shed: there is no preset \"full\"\n")
}

func TestImagesOnTerminal(t *testing.T) {
	fake := &apitest.Fake{}
	fake.AddImage(shed.Image{Ref: "used", Digest: apitest.Digest("7"), InUse: []string{"web"}})
	fake.AddImage(shed.Image{Digest: apitest.Digest("8"), Source: shed.SourceDangling, Size: 3 << 20})
	serve(t, fake)
	there := func(want int) {
		t.Helper()
		if images, err := fake.Images(t.Context()); err != nil || len(images) != want {
			t.Errorf("there are %d images, %v", len(images), err)
		}
	}
	s := newSession(t, "image", "rm", "none", "base")
	if said := s.until("there is no image \"none\"\r\n"); strings.Contains(said, "[y/N]") {
		t.Errorf("it asked about what isn't there: %q", said)
	}
	s.end(3)
	s = newSession(t, "image", "rm", "used")
	s.until("Remove used? [y/N] ")
	io.WriteString(s.user, "y\n")
	s.until("in use by web\r\n")
	s.end(4)
	s = newSession(t, "image", "rm", "base")
	s.until("Remove base? [y/N] ")
	io.WriteString(s.user, "n\n")
	s.until("nothing was done\r\n")
	s.end(1)
	there(3)
	s = newSession(t, "image", "prune")
	if said := s.until("Remove all that and free 3.0 MiB? [y/N] "); !strings.Contains(said, apitest.Digest("8")) {
		t.Errorf("it didn't say what: %q", said)
	}
	io.WriteString(s.user, "\n")
	s.end(1)
	there(3)
	s = newSession(t, "image", "prune")
	s.until("[y/N] ")
	io.WriteString(s.user, "y\n")
	s.until("freed 3.0 MiB\r\n")
	s.end(0)
	there(2)
	for args, want := range map[string]string{"save base": "--output FILE", "load": "--input FILE"} {
		s = newSession(t, strings.Fields("image "+args)...)
		s.until("needs " + want)
		s.end(2)
	}
	img := apitest.Base()
	img.Ref, img.Layers = "long", nil
	fake.AddImage(img)
	s = newSession(t, "image", "history", "long")
	s.until("the end\r\n")
	s.end(0)
}
