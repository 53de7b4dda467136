//go:build linux

package guest

import (
	"os"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/agent"
)

// A program runs as the image's configuration says, unless the command says otherwise.
func TestExecAsTheImageSays(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = d[:strings.LastIndexByte(d, '/')] {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := shedWith(t, agent.Setup{
		Hostname: "box", Env: []string{"FROM=setup"},
		Image: agent.Image{User: "nobody:65000", WorkingDir: dir, Env: []string{"FROM=image", "KIND=image", "PATH=/opt/image/bin:/usr/bin:/bin", "HOME=/app"}},
	})
	const show = `echo $(id -u) $(id -g) $FROM $KIND $HOME; pwd; echo ":$PATH:"`
	asRun := func(cmd shed.Command) result {
		t.Helper()
		p := startAsIs(t, c, cmd)
		p.Stdin().Close()
		return finish(t, p)
	}
	got := asRun(sh(show))
	if !strings.HasPrefix(got.stdout, "65534 65000 setup image /app\n"+dir+"\n") || !strings.Contains(got.stdout, ":/opt/image/bin:") {
		t.Errorf("by default: %+v", got)
	}
	cmd := sh(show)
	cmd.User, cmd.Dir, cmd.Env = "0:7", "/usr", []string{"KIND=own"}
	if got := asRun(cmd); !strings.HasPrefix(got.stdout, "0 7 setup own /root\n/usr\n") || !strings.Contains(got.stdout, ":/opt/image/bin:") {
		t.Errorf("with its own user: %+v", got)
	}
	if got := asRun(shed.Command{Script: show, User: "root"}); !strings.HasPrefix(got.stdout, "0 0 setup image /root\n/root\n") {
		t.Errorf("a login: %+v", got)
	}
}

func TestExecNamesWhatIsMissing(t *testing.T) {
	c := newShed(t)
	script := t.TempDir() + "/script"
	if err := os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := run(t, c, shed.Command{Args: []string{script}}); got.Code != 127 || !strings.Contains(got.Error, script) || !strings.Contains(got.Error, "interpreter") {
		t.Errorf("%+v", got)
	}
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := shed.Command{Args: []string{"true"}, User: "nobody", Dir: closed}
	if got := run(t, c, cmd); got.Code != 126 || !strings.Contains(got.Error, closed) || !strings.Contains(got.Error, "permission denied") {
		t.Errorf("%+v", got)
	}
}
