package preset

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func npmFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNpmConfig(t *testing.T) {
	home, dir := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("NPM_TEST_CA_DIR", dir)
	npmFile(t, filepath.Join(home, ".npmrc"), "; mine\n//registry.example/:_authToken=secret\ncafile = \"${NPM_TEST_CA_DIR}/user.pem\"\n")
	npmFile(t, filepath.Join(home, "home.pem"), "HOME CA")
	npmFile(t, filepath.Join(dir, "user.pem"), "USER CA")
	extra := npmFile(t, filepath.Join(dir, "extra.pem"), "EXTRA CA")
	globalRC := npmFile(t, filepath.Join(dir, "npmrc"), "cafile=~/home.pem\nregistry=https://registry.example/\n")
	otherRC := npmFile(t, filepath.Join(dir, "other"), "registry=https://other.example/\n")
	missing := filepath.Join(dir, "missing")

	for name, tt := range map[string]struct {
		environ []string
		want    []string // VARIABLE=content of what it points to, or VARIABLE!
	}{
		"files": {nil, []string{"NPM_CONFIG_USERCONFIG=secret", "NPM_CONFIG_GLOBALCONFIG=registry.example", "NPM_CONFIG_CAFILE=USER CA", "NODE_EXTRA_CA_CERTS!"}},
		"environment": {
			[]string{"npm_config_userconfig=" + missing, "NPM_CONFIG_GLOBALCONFIG=" + otherRC, "NODE_EXTRA_CA_CERTS=" + extra},
			[]string{"NPM_CONFIG_USERCONFIG=", "NPM_CONFIG_GLOBALCONFIG=other.example", "NPM_CONFIG_CAFILE!", "NODE_EXTRA_CA_CERTS=EXTRA CA"},
		},
		"global authorities":         {[]string{"NPM_CONFIG_USERCONFIG=" + missing}, []string{"NPM_CONFIG_CAFILE=HOME CA"}},
		"authorities by environment": {[]string{"npm_config_cafile=" + extra}, []string{"NPM_CONFIG_CAFILE=EXTRA CA"}},
	} {
		t.Run(name, func(t *testing.T) {
			environ := append([]string{"HTTPS_PROXY=http://proxy.example", "npm_config_prefix=/opt", "NPM_CONFIG_CACHE=/c"}, tt.environ...)
			files, env, err := npmConfig(environ, []string{missing, globalRC})
			if err != nil {
				t.Fatal(err)
			}
			content := map[string]string{}
			for _, f := range files {
				content["/"+f.name] = f.content
			}
			seen := map[string]string{}
			for _, kv := range env {
				k, v, _ := strings.Cut(kv, "=")
				if _, twice := seen[strings.ToUpper(k)]; twice {
					t.Errorf("%s is there twice", k)
				}
				seen[strings.ToUpper(k)] = v
			}
			for _, want := range tt.want {
				if variable, ok := strings.CutSuffix(want, "!"); ok {
					if v, ok := seen[variable]; ok {
						t.Errorf("%s is %q", variable, v)
					}
					continue
				}
				variable, inside, _ := strings.Cut(want, "=")
				if got, ok := content[seen[variable]]; !ok || !strings.Contains(got, inside) {
					t.Errorf("%s is %q, with the content %q, want %q in it", variable, seen[variable], got, inside)
				}
			}
			if seen["HTTPS_PROXY"] != "http://proxy.example" || seen["NPM_CONFIG_CACHE"] != npmDir+"/cache" {
				t.Errorf("the environment is %q", env)
			}
			if _, ok := seen["NPM_CONFIG_PREFIX"]; ok {
				t.Errorf("the host's prefix is in %q", env)
			}
			for _, f := range files {
				if !strings.HasPrefix(f.name, "run/") {
					t.Errorf("%s would be packed", f.name)
				}
			}
		})
	}

	if _, _, err := npmConfig([]string{"NPM_CONFIG_CAFILE=" + missing}, nil); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("authorities that aren't there: %v", err)
	}
	t.Setenv("HOME", "")
	if files, _, err := npmConfig(nil, nil); err != nil || !slices.ContainsFunc(files, func(f file) bool { return strings.HasSuffix(f.name, "user.npmrc") && f.content == "" }) {
		t.Errorf("without a configuration: %+v, %v", files, err)
	}
}
