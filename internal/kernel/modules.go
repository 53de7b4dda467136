package kernel

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// bootNames are the modules that a machine needs until it has its root file system,
// on every monitor.
var bootNames = []string{
	"virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "ext4", "overlay",
}

// modules is what depmod found out about the modules of a kernel.
type modules struct {
	paths   map[string]string   // of a module's file in the directory, by name
	deps    map[string][]string // names of all that a module needs
	soft    map[string][]string // names and aliases of what should be loaded before a module
	aliases map[string][]string // names that go by an alias without a wildcard
	builtin map[string]bool
}

// moduleName returns the name that the kernel gives the module in that file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModules reads the index files of dir, a /lib/modules/RELEASE.
func readModules(dir fs.FS) (*modules, error) {
	m := &modules{
		paths: make(map[string]string), deps: make(map[string][]string), soft: make(map[string][]string),
		aliases: make(map[string][]string), builtin: make(map[string]bool),
	}
	for name, parse := range map[string]func(line string) error{
		"modules.dep":     m.parseDep,
		"modules.softdep": m.parseSoftdep,
		"modules.alias":   m.parseAlias,
		"modules.builtin": m.parseBuiltin,
	} {
		data, err := fs.ReadFile(dir, name)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(data)) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if err := parse(line); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return m, nil
}

// parseDep parses "kernel/a.ko: kernel/b.ko kernel/c.ko".
func (m *modules) parseDep(line string) error {
	file, rest, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("a line without a colon: %q", line)
	}
	name := moduleName(file)
	m.paths[name] = file
	for _, dep := range strings.Fields(rest) {
		m.deps[name] = append(m.deps[name], moduleName(dep))
	}
	return nil
}

// parseSoftdep parses "softdep a pre: b c post: d".
func (m *modules) parseSoftdep(line string) error {
	f := strings.Fields(line)
	if len(f) < 2 || f[0] != "softdep" {
		return fmt.Errorf("not a soft dependency: %q", line)
	}
	name, pre := moduleName(f[1]), false
	for _, word := range f[2:] {
		switch {
		case strings.HasSuffix(word, ":"):
			pre = word == "pre:"
		case pre:
			m.soft[name] = append(m.soft[name], word)
		}
	}
	return nil
}

// parseAlias parses "alias a b".
func (m *modules) parseAlias(line string) error {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "alias" {
		return fmt.Errorf("not an alias: %q", line)
	}
	m.aliases[f[1]] = append(m.aliases[f[1]], moduleName(f[2]))
	return nil
}

func (m *modules) parseBuiltin(line string) error {
	m.builtin[moduleName(line)] = true
	return nil
}

// bootModule is a module and what must be loaded before it.
type bootModule struct {
	name string
	deps []string
}

// closure returns the named modules and all that they need, each after what it needs. Those
// that are built into the kernel are left out.
func (m *modules) closure(names ...string) ([]bootModule, error) {
	var order []bootModule
	seen, done := make(map[string]bool), make(map[string]bool)
	var visit func(name string)
	visit = func(name string) {
		if seen[name] {
			return
		}
		seen[name] = true
		var deps []string
		for _, dep := range append(m.softDeps(name), m.deps[name]...) {
			visit(dep)
			// Soft dependencies may go round in circles.
			if done[dep] && !slices.Contains(deps, dep) {
				deps = append(deps, dep)
			}
		}
		order = append(order, bootModule{name, deps})
		done[name] = true
	}
	for _, name := range names {
		switch {
		case m.paths[name] != "":
			visit(name)
		case !m.builtin[name]:
			return nil, fmt.Errorf("this kernel has no %s", name)
		}
	}
	for _, b := range order {
		if m.paths[b.name] == "" {
			return nil, fmt.Errorf("%s, which others depend on, is missing in modules.dep", b.name)
		}
	}
	return order, nil
}

// softDeps returns the modules that should be loaded before the named one.
func (m *modules) softDeps(name string) []string {
	var deps []string
	for _, want := range m.soft[name] {
		if dep := moduleName(want); m.paths[dep] != "" {
			deps = append(deps, dep)
			continue
		}
		// An alias stands for several implementations of an algorithm; the generic one is the one
		// that any CPU has.
		for _, dep := range m.aliases[want] {
			if strings.HasSuffix(dep, "_generic") && m.paths[dep] != "" {
				deps = append(deps, dep)
			}
		}
	}
	return deps
}

// bootModules makes the directory dst of the modules that boot needs out of
// dir, a /lib/modules/RELEASE: NAME.ko, uncompressed, and modules.dep, a line for each
// with its name, a colon and the names that it depends on.
func bootModules(dst, dir string) error {
	m, err := readModules(os.DirFS(dir))
	if err != nil {
		return err
	}
	list, err := m.closure(bootNames...)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dst, 0o755); err != nil {
		return err
	}
	var deps bytes.Buffer
	for _, b := range list {
		fmt.Fprintln(&deps, strings.Join(append([]string{b.name + ":"}, b.deps...), " "))
		if err := copyModule(filepath.Join(dst, b.name+".ko"), filepath.Join(dir, m.paths[b.name])); err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
	}
	return os.WriteFile(filepath.Join(dst, modulesDep), deps.Bytes(), 0o644)
}

func copyModule(dst, src string) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if !strings.HasSuffix(src, ".ko") {
		if data, err = decompress(data, maxUncompressed); err != nil {
			return err
		}
	}
	return os.WriteFile(dst, data, 0o644)
}
