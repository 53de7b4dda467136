// Package deptest holds the project's packages to the arrows between them.
package deptest

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/charliek/shed"

// ours says which of our packages a package may import besides the root one, which all may. Every
// package outside test/ has its line.
var ours = map[string]string{
	".":                    "",
	"internal/agent":       "",
	"internal/agent/guest": "internal/agent",
	"internal/api":         "internal/agent",
	"internal/api/apitest": "internal/agent",
	"internal/build":       "internal/agent internal/lines",
	"internal/client":      "internal/api internal/lines internal/strictyaml internal/userfile",
	"internal/deptest":     "",
	"internal/engine": "internal/agent internal/build internal/image internal/keeper internal/kernel internal/network " +
		"internal/preset internal/rootfs internal/state internal/vm",
	"internal/image":                "internal/preset internal/rootfs",
	"internal/keeper":               "internal/agent internal/network internal/proclock internal/vm",
	"internal/kernel":               "internal/lines internal/rootfs",
	"internal/lines":                "",
	"internal/network":              "",
	"internal/porttest":             "",
	"internal/preset":               "internal/lines",
	"internal/proclock":             "",
	"internal/rootfs":               "",
	"internal/sshconfig":            "internal/userfile",
	"internal/sshd":                 "internal/agent",
	"internal/state":                "internal/rootfs",
	"internal/strictyaml":           "",
	"internal/tunnel":               "internal/agent internal/strictyaml internal/userfile",
	"internal/userfile":             "",
	"internal/vm":                   "",
	"internal/vm/qemu":              "internal/proclock internal/vm",
	"internal/vm/vmtest":            "internal/agent internal/kernel internal/vm internal/vm/vmtest/guest",
	"internal/vm/vmtest/guest":      "internal/agent",
	"internal/vm/vmtest/guest/init": "internal/vm/vmtest/guest",
	"cmd/shed":                      "internal/agent internal/api internal/client internal/sshconfig internal/tunnel",
	"cmd/shed-agent":                "internal/agent/guest",
	"cmd/shed-server": "internal/api internal/engine internal/image internal/keeper internal/kernel " +
		"internal/rootfs internal/sshd internal/state internal/strictyaml internal/vm internal/vm/qemu",
}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		fields := strings.Fields(line)
		pkg := name(fields[0])
		if pkg == "test" || strings.HasPrefix(pkg, "test/") {
			continue
		}
		seen[pkg] = true
		rule, ok := ours[pkg]
		if !ok {
			t.Errorf("%s is not in the table: say there which of our packages it may import", pkg)
			continue
		}
		allowed := append(strings.Fields(rule), ".")
		for _, imp := range fields[1:] {
			if isOurs(imp) && !slices.Contains(allowed, name(imp)) {
				t.Errorf("%s imports %s, and may import only %s: arrows go one way, from cmd over api and sshd "+
					"to engine, to what the engine puts together, to the root package", pkg, name(imp), strings.Join(allowed, ", "))
			}
		}
	}
	for pkg := range ours {
		if !seen[pkg] {
			t.Errorf("%s is in the table, and is no package", pkg)
		}
	}
}

// TestModules holds packages to the modules that they may need, directly or not.
func TestModules(t *testing.T) {
	yamux := []string{"github.com/libp2p/go-yamux/v5", "github.com/libp2p/go-buffer-pool"}
	terminal := []string{ // github.com/charmbracelet/x/vt, and what that needs
		"github.com/charmbracelet/colorprofile", "github.com/charmbracelet/ultraviolet", "github.com/charmbracelet/x/ansi",
		"github.com/charmbracelet/x/exp/ordered", "github.com/charmbracelet/x/term", "github.com/charmbracelet/x/termios",
		"github.com/charmbracelet/x/vt", "github.com/charmbracelet/x/windows", "github.com/clipperhouse/displaywidth",
		"github.com/clipperhouse/uax29/v2", "github.com/lucasb-eyer/go-colorful", "github.com/mattn/go-runewidth",
		"github.com/muesli/cancelreader", "github.com/rivo/uniseg", "github.com/xo/terminfo", "golang.org/x/sync",
	}
	for pkg, rule := range map[string]struct {
		modules []string
		why     string
	}{
		".":              {nil, "every other package imports it"},
		"internal/vm":    {nil, "it is plain data, and builds on every system"},
		"internal/agent": {yamux, "it is in every initramfs and in the CLI"},
		"cmd/shed-agent": {
			slices.Concat(yamux, terminal, []string{
				"github.com/creack/pty", "golang.org/x/sys", "github.com/pkg/sftp", "github.com/kr/fs", "golang.org/x/crypto",
			}),
			"it is in every initramfs",
		},
	} {
		used := map[string]bool{}
		for _, mod := range goList(t, "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", "./"+pkg) {
			used[mod] = true
		}
		for _, mod := range slices.Sorted(maps.Keys(used)) {
			if mod != module && !slices.Contains(rule.modules, mod) {
				t.Errorf("%s needs the module %s, and may need only %v: %s", pkg, mod, rule.modules, rule.why)
			}
		}
	}
}

// TestPrograms keeps out of programs what they must not have in them.
func TestPrograms(t *testing.T) {
	for program, rule := range map[string]struct {
		without []string
		why     string
	}{
		"cmd/shed": {
			[]string{
				module + "/internal/engine", module + "/internal/keeper", module + "/internal/vm", module + "/internal/agent/guest",
				"gvisor.dev/gvisor", "github.com/google/go-containerregistry",
			},
			"the CLI runs on a developer's machine, starts for every command, and reaches sheds through the server only",
		},
		"cmd/shed-agent": {
			[]string{"net/http", "crypto/tls"},
			"the agent is in every initramfs, and is the first program to run in a shed",
		},
		"cmd/shed-server": {
			[]string{module + "/internal/agent/guest"},
			"the guest's half of the agent is a program of its own",
		},
	} {
		for _, dep := range goList(t, "-deps", "./"+program) {
			for _, without := range rule.without {
				if dep == without || strings.HasPrefix(dep, without+"/") {
					t.Errorf("%s contains %s, and must not: %s", program, dep, rule.why)
				}
			}
		}
	}
}

func TestAgentIsSmall(t *testing.T) {
	const limit = 6 << 20 // bytes: it is read, unpacked and started in each boot
	file := filepath.Join(t.TempDir(), "shed-agent")
	goTool(t, "build", "-trimpath", "-ldflags=-s -w", "-o", file, "./cmd/shed-agent")
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() >= limit {
		t.Errorf("the agent has %d bytes, and may have %d", fi.Size(), limit)
	}
}

func isOurs(path string) bool { return path == module || strings.HasPrefix(path, module+"/") }

// name returns the path of one of our packages relative to the module; "." is the root package.
func name(path string) string {
	if path == module {
		return "."
	}
	return strings.TrimPrefix(path, module+"/")
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	lines := strings.Split(goTool(t, append([]string{"list"}, args...)...), "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool { return line == "" })
	if len(lines) == 0 {
		t.Fatalf("go list %v lists nothing", args)
	}
	return lines
}

// goTool runs the go command in the module's root, for Linux, and returns what it prints.
func goTool(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(cmd.Environ(), "GOOS=linux", "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(fmt.Errorf("go %v: %w: %s", args, err, &stderr))
	}
	return string(out)
}
