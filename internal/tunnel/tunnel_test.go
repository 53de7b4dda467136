package tunnel

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
)

func TestParsePort(t *testing.T) {
	for s, want := range map[string]Port{
		"3000": {3000, 3000}, "8080:80": {8080, 80}, "0:3000": {0, 3000}, "65535": {65535, 65535}, "1:65535": {1, 65535},
	} {
		if got, err := ParsePort(s); err != nil || got != want {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "0", "x", "3000:", ":3000", "3000:0", "3000:x", "65536", "1:65536", "-1", "-1:3000", "+1", " 1", "1 ", "1:2:3",
		"localhost:3000", "3000:localhost:3000", "3000,3001", "99999999999999999999", "3000:http", "1e3", "0x50",
	} {
		if got, err := ParsePort(s); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func TestCheckPorts(t *testing.T) {
	for _, ports := range [][]Port{nil, {{3000, 3000}, {3001, 3000}}, {{0, 3000}, {0, 3000}}} {
		if err := CheckPorts(ports); err != nil {
			t.Errorf("%v: %v", ports, err)
		}
	}
	for _, ports := range [][]Port{{{3000, 3000}, {3000, 3000}}, {{3000, 1}, {2, 2}, {3000, 3}}, {{-1, 1}}, {{1, 0}}, {{70000, 1}}} {
		if err := CheckPorts(ports); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("%v: %v", ports, err)
		}
	}
}

func TestProfiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tunnels.yaml")
	p, err := LoadProfiles(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Ports("webdev"); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(shed.ErrorHint(err), "profiles:") {
		t.Errorf("%v, hint %q", err, shed.ErrorHint(err))
	}
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("profiles: {webdev: {ports: [{local: 3000, remote: 3000}, {local: 8080, remote: 80}]}, db: {ports: [{local: 5432}]}}\n")
	if p, err = LoadProfiles(file); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]Port{"webdev": {{3000, 3000}, {8080, 80}}, "db": {{5432, 5432}}} {
		if got, err := p.Ports(name); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := p.Ports("web"); shed.ErrorCode(err) != shed.CodeInvalid || shed.ErrorHint(err) != "there are: db, webdev" {
		t.Errorf("%v, hint %q", err, shed.ErrorHint(err))
	}

	for text, want := range map[string]string{
		"profiles:\n  web:\n    prots: []\n":                 `tunnels.yaml:3: unknown key "prots"`,
		"profiles:\n  web:\n    ports:\n      - {locl: 1}\n": `tunnels.yaml:4: unknown key "locl"`,
		"profile: {}\n": `tunnels.yaml:1: unknown key "profile"`,
		"profiles:\n  web:\n    ports:\n      - {local: x}\n":       "tunnels.yaml:4: ",
		"profiles: {web: {ports: [3000]}}\n":                        "tunnels.yaml:1: ",
		"profiles: [\n":                                             "tunnels.yaml:1: ",
		"profiles: {web: {}}\n":                                     `profile "web" has no ports`,
		"profiles: {web: }\n":                                       `profile "web" has no ports`,
		"profiles: {web: {ports: [{remote: 3000}]}}\n":              `profile "web": a port needs local:`,
		"profiles: {web: {ports: [{local: 70000}]}}\n":              `profile "web": there is no local port 70000`,
		"profiles: {web: {ports: [{local: 80, remote: 70000}]}}\n":  "there is no port 70000 in a shed",
		"profiles: {web: {ports: [{local: -1, remote: 70000}]}}\n":  "there is no local port -1",
		"profiles: {a: {ports: [{local: 1}]}}\nprofiles: {b: {}}\n": "tunnels.yaml:2: ",
	} {
		write(text)
		if _, err := LoadProfiles(file); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%q\n got %v\nwant %s", text, err, want)
		}
	}
	for _, text := range []string{"", "# nothing\n", "profiles:\n", "profiles: {}\n"} {
		write(text)
		if _, err := LoadProfiles(file); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestListening(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0
   1: 3500007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 2 1 0 100 0 0 10 0
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 4 1 0 20 4 30 10 -1
   4: 010011AC:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4 1 0 20 4 30 10 -1
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:1538 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 5 1 0 100 0 0 10 0
   1: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 6 1 0 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:0BB9 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 7 1 0 100 0 0 10 0
   3: 000080FE00000000FF005450563412FE:0BBA 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 7 1 0 100 0 0 10 0
`
	ports, ok := Listening(text)
	if want := []int{22, 3001, 5432, 8080}; !ok || !slices.Equal(ports, want) {
		t.Errorf("%v, %v, want %v", ports, ok, want)
	}
	for _, text := range []string{"", "cat: not found\n", "\x00\xff : : :", "a b c d e"} {
		if ports, ok := Listening(text); ok || len(ports) > 0 {
			t.Errorf("%q: %v, %v", text, ports, ok)
		}
	}
	for remote, want := range map[int]int{80: 8080, 443: 8443, 22: 8022, 1023: 9023, 1024: 1024, 3000: 3000} {
		if got := Suggest(remote); got != (Port{want, remote}) {
			t.Errorf("%d: %v", remote, got)
		}
	}
}
