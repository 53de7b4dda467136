package tunnel

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/strictyaml"
)

// Profiles are ports under names that people give them.
type Profiles struct {
	file  string
	ports map[string][]Port
}

// LoadProfiles reads tunnels.yaml. Where there is no such file, there are no profiles.
func LoadProfiles(file string) (*Profiles, error) {
	p := &Profiles{file: file, ports: map[string][]Port{}}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the tunnels' profiles can't be read: %w", err)
	}
	var doc struct {
		Profiles map[string]struct {
			Ports []Port `yaml:"ports"`
		} `yaml:"profiles"`
	}
	if err := strictyaml.Decode(file, text, &doc); err != nil {
		return nil, err
	}
	for name, profile := range doc.Profiles {
		if len(profile.Ports) == 0 {
			return nil, shed.Errorf(shed.CodeInvalid, "%s: profile %q has no ports", file, name).
				WithHint("write ports: [{local: 3000, remote: 3000}]")
		}
		for _, port := range profile.Ports {
			if port.Remote == 0 {
				port.Remote = port.Local
			}
			if port.Local == 0 {
				err = shed.Errorf(shed.CodeInvalid, "a port needs local:").WithHint("write {local: 3000, remote: 3000}")
			} else {
				err = port.check()
			}
			if err != nil {
				return nil, shed.Errorf(shed.CodeInvalid, "%s: profile %q: %w", file, name, err)
			}
			p.ports[name] = append(p.ports[name], port)
		}
	}
	return p, nil
}

// Ports returns what the profile called name forwards.
func (p *Profiles) Ports(name string) ([]Port, error) {
	ports, ok := p.ports[name]
	if ok {
		return ports, nil
	}
	err := shed.Errorf(shed.CodeInvalid, "there is no profile %.80q in %s", name, p.file)
	if len(p.ports) == 0 {
		return nil, err.WithHint("write there: profiles: {%s: {ports: [{local: 3000, remote: 3000}]}}", name)
	}
	return nil, err.WithHint("there are: %s", strings.Join(slices.Sorted(maps.Keys(p.ports)), ", "))
}
