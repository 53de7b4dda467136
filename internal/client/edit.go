package client

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/userfile"
)

// Add adds a server to the file, and makes it the default if it is the first. The only one that there was, and that
// so was meant where none was named, stays that. CodeConflict if the name is taken, or another name has
// the address.
func (c *Config) Add(ctx context.Context, name string, s Server) error {
	if err := errors.Join(ValidateName(name), s.check()); err != nil {
		return err
	}
	return c.edit(ctx, func(cfg *Config) error {
		if err := cfg.CanAdd(name, s); err != nil {
			return err
		}
		switch {
		case len(cfg.Servers) == 0:
			cfg.DefaultServer = name
		case len(cfg.Servers) == 1 && cfg.DefaultServer == "":
			for only := range cfg.Servers {
				cfg.DefaultServer = only
			}
		}
		if cfg.Servers == nil {
			cfg.Servers = map[string]Server{}
		}
		cfg.Servers[name] = s
		return nil
	}, func(root *ast.MappingNode, cfg *Config) error {
		added := map[string]Server{name: s}
		servers := find(root, "servers")
		if servers == nil {
			if err := add(root, "servers", added); err != nil {
				return err
			}
			return setDefault(root, cfg)
		}
		entry, err := yaml.ValueToNode(added)
		if err != nil {
			return err
		}
		if m, ok := servers.Value.(*ast.MappingNode); ok && len(m.Values) > 0 {
			entry := entry.(*ast.MappingNode)
			if inner, ok := entry.Values[0].Value.(*ast.MappingNode); ok {
				inner.IsFlowStyle = m.IsFlowStyle
			}
			m.Merge(entry)
		} else {
			// Nothing, or {}, is replaced.
			entry.AddColumn(servers.Key.GetToken().Position.Column + 1)
			servers.Value = entry
		}
		return setDefault(root, cfg)
	})
}

// Remove removes a server from the file. Where it is the default, there is none then.
func (c *Config) Remove(ctx context.Context, name string) error {
	return c.edit(ctx, func(cfg *Config) error {
		if len(cfg.Servers) == 0 {
			return shed.Errorf(shed.CodeInvalid, "there is no server %q in the configuration: it has none", name)
		}
		if _, err := cfg.Server(name); err != nil {
			return err
		}
		delete(cfg.Servers, name)
		if cfg.DefaultServer == name {
			cfg.DefaultServer = ""
		}
		return nil
	}, func(root *ast.MappingNode, cfg *Config) error {
		if servers := find(root, "servers"); servers != nil {
			if m, ok := servers.Value.(*ast.MappingNode); ok {
				if remove(m, name); len(m.Values) == 0 {
					none, err := yaml.ValueToNode(map[string]Server{})
					if err != nil {
						return err
					}
					servers.Value = none
				}
			}
		}
		return setDefault(root, cfg)
	})
}

// SetDefault makes a server the default.
func (c *Config) SetDefault(ctx context.Context, name string) error {
	return c.edit(ctx, func(cfg *Config) error {
		if len(cfg.Servers) == 0 {
			return shed.Errorf(shed.CodeInvalid, "there is no server %q in the configuration: it has none", name).
				WithHint("add it with: shed server add HOST")
		}
		if _, err := cfg.Server(name); err != nil {
			return err
		}
		cfg.DefaultServer = name
		return nil
	}, setDefault)
}

// CanAdd returns an Error with CodeConflict if there is a server of that name or at that address: with two names for one
// server, each of its sheds would be on both.
func (c *Config) CanAdd(name string, s Server) error {
	if old, ok := c.Servers[name]; ok {
		return shed.Errorf(shed.CodeConflict, "there is a server %q already, at %s", name, old.Address()).
			WithHint("give this one another name with --name, or remove that one: shed server remove %s", name)
	}
	if other := c.At(s); other != "" {
		return shed.Errorf(shed.CodeConflict, "the server at %s is there already, as %q", s.Address(), other).
			WithHint("to give it another name, remove it first: shed server remove %s", other)
	}
	return nil
}

// At returns the name of a server that has the address of s, or "".
func (c *Config) At(s Server) string {
	for name, other := range c.Servers {
		if other.Address() == s.Address() {
			return name
		}
	}
	return ""
}

// edit changes the file, which it reads anew: change says what is to become of the configuration, and write
// does it to the text, of which comments and order stay. Nothing is written where the text would not say
// what is wanted.
func (c *Config) edit(ctx context.Context, change func(*Config) error, write func(*ast.MappingNode, *Config) error) error {
	if c.path == "" {
		return shed.Errorf(shed.CodeInvalid, "there is no home directory for the configuration").WithHint("name a file with --config")
	}
	var got *Config
	err := userfile.Edit(ctx, c.path, func(f userfile.File) (edited []byte, err error) {
		want, err := parseConfig(c.path, f.Text)
		if err != nil {
			return nil, err
		}
		if err := change(want); err != nil {
			return nil, err
		}
		edited, err = rewrite(slices.Clone(f.Text), want, write)
		if err == nil {
			got, err = parseConfig(c.path, edited)
		}
		if err == nil && (got.DefaultServer != want.DefaultServer || !maps.Equal(got.Servers, want.Servers)) {
			err = errors.New("the change would come out as another")
		}
		if err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "%s is written in a way that can't be changed by a program: %w", c.path, err).
				WithHint("change it by hand")
		}
		return edited, nil
	})
	if err == nil {
		*c = *got
	}
	return err
}

// rewrite returns text with what write does to its one mapping.
func rewrite(text []byte, want *Config, write func(*ast.MappingNode, *Config) error) ([]byte, error) {
	file, err := parser.ParseBytes(text, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	var root *ast.MappingNode
	for _, doc := range file.Docs {
		if m, ok := doc.Body.(*ast.MappingNode); ok && len(file.Docs) == 1 {
			root = m
		}
	}
	if root == nil { // nothing but comments, and perhaps a ---
		added, err := yaml.Marshal(want)
		if err != nil {
			return nil, err
		}
		if len(text) > 0 && !bytes.HasSuffix(text, []byte("\n")) {
			text = append(text, '\n')
		}
		return append(text, added...), nil
	}
	if err := write(root, want); err != nil {
		return nil, err
	}
	edited := []byte(file.String())
	if !bytes.HasSuffix(edited, []byte("\n")) {
		edited = append(edited, '\n')
	}
	return edited, nil
}

func find(m *ast.MappingNode, key string) *ast.MappingValueNode {
	for _, v := range m.Values {
		if v.Key.GetToken().Value == key {
			return v
		}
	}
	return nil
}

func remove(m *ast.MappingNode, key string) {
	m.Values = slices.DeleteFunc(m.Values, func(v *ast.MappingValueNode) bool { return v.Key.GetToken().Value == key })
}

// add adds what is missing at the end of the file.
func add(root *ast.MappingNode, key string, value any) error {
	node, err := yaml.ValueToNode(map[string]any{key: value})
	if err != nil {
		return err
	}
	root.Merge(node.(*ast.MappingNode))
	return nil
}

// setDefault has the text name the default server that cfg has.
func setDefault(root *ast.MappingNode, cfg *Config) error {
	old := find(root, "default_server")
	switch {
	case cfg.DefaultServer == "":
		remove(root, "default_server")
		return nil
	case old == nil:
		return add(root, "default_server", cfg.DefaultServer)
	}
	node, err := yaml.ValueToNode(cfg.DefaultServer)
	if err != nil {
		return err
	}
	if comment := old.Value.GetComment(); comment != nil {
		if err := node.SetComment(comment); err != nil {
			return err
		}
	}
	old.Value = node
	return nil
}
