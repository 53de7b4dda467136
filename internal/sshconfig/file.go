package sshconfig

import (
	"bytes"
	"context"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/userfile"
)

// Edit returns the hosts that the block is to have, given those that it has. It may be called twice.
type Edit func(installed []Host) ([]Host, error)

// Change is what an Edit makes of a configuration file.
type Change struct {
	File   string // where the name that was given leads: no symbolic link
	Before []byte // nil where there is no file
	After  []byte // nil where there is to be none
	Hosts  []Host // in the block then, as by Named
	// Links is how many other names the file has. They keep what it was before.
	Links int
	// Included is the line of After, if not 0, from which on the file includes others for all
	// hosts. In ssh's eyes the block changes nothing about that, but VS Code and Cursor
	// look at no files that are included below a Host line.
	Included int
}

// Changed says whether there is anything to change.
func (c Change) Changed() bool {
	return (c.Before == nil) != (c.After == nil) || !bytes.Equal(c.Before, c.After)
}

// Plan returns what Apply would do.
func Plan(path string, edit Edit) (Change, error) {
	f, err := userfile.Read(path)
	if err != nil {
		return Change{}, err
	}
	return plan(f, path, edit)
}

// Apply changes the block in the configuration file at path, as userfile.Edit does.
func Apply(ctx context.Context, path string, edit Edit) (Change, error) {
	var c Change
	err := userfile.Edit(ctx, path, func(f userfile.File) (_ []byte, err error) {
		c, err = plan(f, path, edit)
		return c.After, err
	})
	return c, err
}

func plan(f userfile.File, path string, edit Edit) (Change, error) {
	c := Change{File: f.Path, Before: f.Text, Links: f.Links}
	for _, mark := range []string{"\xef\xbb\xbf", "\xff\xfe", "\xfe\xff"} {
		if bytes.HasPrefix(f.Text, []byte(mark)) {
			return c, shed.Errorf(shed.CodeInvalid, "%s begins with a byte order mark, and ssh can't read such a file", path).
				WithHint("save it as UTF-8 without a byte order mark, and try again")
		}
	}
	d, err := parse(path, f.Text)
	if err != nil {
		return c, err
	}
	d.made = d.made || f.Text == nil
	hosts, err := edit(Named(d.hosts))
	if err != nil {
		return c, err
	}
	c.Hosts = Named(hosts)
	c.After = d.with(hosts)
	if d.made && len(c.After) == 0 {
		c.After = nil
	}
	rest := d.text[d.end:]
	if n := include(rest); n > 0 && len(hosts) > 0 {
		c.Included = n + bytes.Count(c.After[:len(c.After)-len(rest)], []byte("\n"))
	}
	return c, nil
}
