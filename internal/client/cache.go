package client

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/userfile"
)

const cacheVersion = 1

// saveTimeout is how long others may keep us from writing what we remember: a command that has done its work is to end.
const saveTimeout = 2 * time.Second

// cache remembers which sheds servers had when they last answered. It is safe for concurrent use. A file that
// can't be read is as good as none.
type cache struct {
	dir string

	mu      sync.Mutex
	servers map[string]cached // as in the file, or changed since; nil until it is read
	changed map[string]bool
}

// cached is what is known about a server.
type cached struct {
	Address string   `json:"address"` // another one makes it another server
	Sheds   []string `json:"sheds"`   // sorted
	// Silent says that it gave no answer in time when it was last asked.
	Silent bool `json:"silent,omitempty"`
}

type cacheFile struct {
	Version int               `json:"version"`
	Servers map[string]cached `json:"servers"`
}

func (c *cache) path() string { return filepath.Join(c.dir, "lookup.json") }

func parseCache(text []byte) map[string]cached {
	var f cacheFile
	if json.Unmarshal(text, &f) != nil || f.Version != cacheVersion || f.Servers == nil {
		return map[string]cached{}
	}
	return f.Servers
}

// get returns what is known about the server of that name at that address.
func (c *cache) get(name, address string) cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load()
	known := c.servers[name]
	if known.Address != address {
		return cached{Address: address}
	}
	return known
}

// load reads the file if that hasn't been done. c.mu is held.
func (c *cache) load() {
	if c.servers == nil {
		text, _ := os.ReadFile(c.path())
		c.servers, c.changed = parseCache(text), map[string]bool{}
	}
}

func (c *cache) set(name string, now cached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load()
	old := c.servers[name]
	if old.Address == now.Address && old.Silent == now.Silent && slices.Equal(old.Sheds, now.Sheds) {
		return
	}
	c.servers[name] = now
	c.changed[name] = true
}

// answered takes notice of a server's answer.
func (c *cache) answered(name, address string, sheds []*shed.Shed) {
	now := cached{Address: address}
	for _, sh := range sheds {
		now.Sheds = append(now.Sheds, sh.Name)
	}
	slices.Sort(now.Sheds)
	c.set(name, now)
}

// silent takes notice of a server that gave no answer.
func (c *cache) silent(name, address string) {
	now := c.get(name, address)
	now.Silent = true
	c.set(name, now)
}

// save writes what has changed, beside what others have written.
func (c *cache) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.changed) == 0 {
		return nil
	}
	// A directory that isn't there has no configuration in it either.
	if _, err := os.Stat(c.dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	return userfile.Edit(ctx, c.path(), func(f userfile.File) ([]byte, error) {
		all := parseCache(f.Text)
		for name := range c.changed {
			all[name] = c.servers[name]
		}
		text, err := json.MarshalIndent(cacheFile{cacheVersion, all}, "", "  ")
		return append(text, '\n'), err
	})
}
