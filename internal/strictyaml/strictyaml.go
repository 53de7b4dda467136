// Package strictyaml reads configuration files, and says in one way what is wrong with them.
package strictyaml

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/charliek/shed"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Decode reads text, the contents of file, into the struct that v points to, whose fields are
// otherwise left alone. An error names the file and the line, and for a key that isn't known those that are.
func Decode(file string, text []byte, v any) error {
	doc, err := parser.ParseBytes(text, 0)
	if err == nil {
		if len(doc.Docs) == 0 || doc.Docs[0].Body == nil || doc.Docs[0].Body.Type() == ast.NullType {
			return nil // the decoder would set the struct to zero
		}
		err = yaml.UnmarshalWithOptions(text, v, yaml.Strict())
	}
	if err == nil {
		return nil
	}
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil {
		return shed.Errorf(shed.CodeInvalid, "%s: %w", file, err)
	}
	tok := at.GetToken()
	fail := func(format string, args ...any) *shed.Error {
		return shed.Errorf(shed.CodeInvalid, "%s:%d: %s", file, tok.Position.Line, fmt.Sprintf(format, args...))
	}
	if unknown := (*yaml.UnknownFieldError)(nil); errors.As(err, &unknown) {
		err := fail("unknown key %q", tok.Value)
		if keys := keysBeside(doc.Docs[0].Body, reflect.TypeOf(v), tok); len(keys) > 0 {
			return err.WithHint("the keys there are: %s", strings.Join(keys, ", "))
		}
		return err
	}
	kind, node := (*yaml.TypeError)(nil), (*yaml.UnexpectedNodeTypeError)(nil)
	switch {
	case errors.As(err, &kind):
		return fail("%sthis must be %s", keyBefore(tok), describeType(kind.DstType))
	case errors.As(err, &node):
		return fail("%s%s", keyBefore(tok), at.GetMessage())
	}
	return fail("%s", at.GetMessage())
}

// keyBefore returns the key that a value belongs to, with a colon, or "".
func keyBefore(value *token.Token) string {
	colon := value.Prev
	if colon == nil || colon.Type != token.MappingValueType || colon.Prev == nil {
		return ""
	}
	return colon.Prev.Value + ": "
}

// keysBeside returns the keys that the mapping takes in which key stands. node is what t is read from.
func keysBeside(node ast.Node, t reflect.Type, key *token.Token) []string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var pairs []*ast.MappingValueNode
	switch n := node.(type) {
	case *ast.MappingNode:
		pairs = n.Values
	case *ast.MappingValueNode:
		pairs = append(pairs, n)
	}
	for _, p := range pairs {
		tok := p.Key.GetToken()
		if tok.Position.Offset == key.Position.Offset && tok.Value == key.Value {
			keys, _ := fields(t)
			return keys
		}
		if inner := valueType(t, tok.Value); inner != nil {
			if keys := keysBeside(p.Value, inner, key); keys != nil {
				return keys
			}
		}
	}
	return nil
}

// valueType returns the type of what stands under key in what t is read from, or nil.
func valueType(t reflect.Type, key string) reflect.Type {
	if t.Kind() == reflect.Map {
		return t.Elem()
	}
	_, types := fields(t)
	return types[key]
}

// fields returns the keys that a struct has in YAML, and their types.
func fields(t reflect.Type) (keys []string, types map[string]reflect.Type) {
	types = map[string]reflect.Type{}
	if t.Kind() != reflect.Struct {
		return nil, types
	}
	for f := range t.Fields() {
		if key, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); key != "" {
			keys = append(keys, key)
			types[key] = f.Type
		}
	}
	return keys, types
}

func describeType(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	case reflect.String:
		return "text"
	case reflect.Slice:
		return "a list"
	}
	return "keys with values"
}
