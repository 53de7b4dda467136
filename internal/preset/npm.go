package preset

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// npmDir is where npm finds its configuration in a tree that it runs in. It isn't packed: nothing in /run is.
const npmDir = "/run/shed-npm"

// globalNpmrc are the places of npm's global configuration: it is beside where Node is installed.
var globalNpmrc = []string{"/etc/npmrc", "/usr/etc/npmrc", "/usr/local/etc/npmrc"}

// npmConfig returns what npm on this host is configured with, in a form that works in a tree of its own: files for
// npmDir, which may hold credentials, and environ with what points to those.
func npmConfig(environ []string, global []string) (files []file, env []string, err error) {
	given := map[string]string{} // of what names a path, by lower-case name
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		switch name := strings.ToLower(key); name {
		case "npm_config_userconfig", "npm_config_globalconfig", "npm_config_cafile", "node_extra_ca_certs":
			given[name] = value
		case "npm_config_cache", "npm_config_prefix", "npm_config_logs_dir", "npm_config_tmp":
		default:
			env = append(env, kv)
		}
	}
	home, _ := os.UserHomeDir() // a service may have none
	var user string
	if home != "" {
		user = filepath.Join(home, ".npmrc")
	}
	if path := given["npm_config_globalconfig"]; path != "" {
		global = []string{path}
	}
	cafile := given["npm_config_cafile"]
	files = []file{{npmDir[1:] + "/", ""}}
	add := func(variable, name, content string) {
		files = append(files, file{npmDir[1:] + "/" + name, content})
		env = append(env, variable+"="+npmDir+"/"+name)
	}
	for _, rc := range []struct {
		variable, name string
		paths          []string
	}{
		{"NPM_CONFIG_USERCONFIG", "user.npmrc", []string{cmp.Or(given["npm_config_userconfig"], user)}},
		{"NPM_CONFIG_GLOBALCONFIG", "global.npmrc", global},
	} {
		content, err := readFirst(rc.paths)
		if err != nil {
			return nil, nil, fmt.Errorf("npm's configuration: %w", err)
		}
		add(rc.variable, rc.name, content)
		cafile = cmp.Or(cafile, npmValue(content, "cafile", home))
	}
	for variable, path := range map[string]string{"NPM_CONFIG_CAFILE": cafile, "NODE_EXTRA_CA_CERTS": given["node_extra_ca_certs"]} {
		if path == "" {
			continue
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("npm's certificate authorities: %w", err)
		}
		add(variable, strings.ToLower(variable)+".pem", string(content))
	}
	return files, append(env, "NPM_CONFIG_CACHE="+npmDir+"/cache"), nil
}

// readFirst returns the content of the first of the files that is there, or "".
func readFirst(paths []string) (string, error) {
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return string(b), err
		}
	}
	return "", nil
}

// npmValue returns the value of key, a path, in an npmrc, or "".
func npmValue(npmrc, key, home string) string {
	var value string
	for line := range strings.Lines(npmrc) {
		if k, v, ok := strings.Cut(line, "="); ok && strings.TrimSpace(k) == key {
			value = strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	if rest, ok := strings.CutPrefix(value, "~/"); ok {
		value = filepath.Join(home, rest)
	}
	return os.Expand(value, func(name string) string {
		if v, ok := os.LookupEnv(name); ok {
			return v
		}
		return "${" + name + "}" // as npm leaves it
	})
}
