package sshd

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

type ptyPayload struct {
	Term                      string
	Cols, Rows, Width, Height uint32
	Modes                     string
}

type envPayload struct{ Name, Value string }

func TestParsePTY(t *testing.T) {
	for _, c := range []struct {
		in   ptyPayload
		want shed.TTY
		ok   bool
	}{
		{ptyPayload{"xterm-256color", 80, 24, 0, 0, "\x00"}, shed.TTY{Term: "xterm-256color", Size: shed.Size{Rows: 24, Cols: 80}}, true},
		{ptyPayload{"", 0, 0, 0, 0, ""}, shed.TTY{Term: "dumb"}, true},
		{ptyPayload{"vt100", 1 << 31, 65536, 0, 0, ""}, shed.TTY{Term: "vt100", Size: shed.Size{Rows: 65535, Cols: 65535}}, true},
		{ptyPayload{"../../x", 80, 24, 0, 0, ""}, shed.TTY{}, false},
		{ptyPayload{"a b", 80, 24, 0, 0, ""}, shed.TTY{}, false},
		{ptyPayload{strings.Repeat("x", 65), 80, 24, 0, 0, ""}, shed.TTY{}, false},
	} {
		got, err := parsePTY(ssh.Marshal(c.in))
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("%+v: %v, %v", c.in, got, err)
		}
	}
}

func TestParseEnv(t *testing.T) {
	for _, c := range []struct {
		name, value string
		ok          bool
	}{
		{"LANG", "C.UTF-8", true},
		{"LC_ALL", "", true},
		{"COLORTERM", "truecolor", true},
		{"LANG", "a\nb=c", true},
		{"LANG", "a\x00b", false},
		{"LANG", strings.Repeat("x", maxEnvLength), false},
		{"LC_", "x", true},
		{"LC_A=B", "x", false},
		{"LC_ALL\n", "x", false},
		{"_x9", "x", true},
		{"9x", "x", false},
		{"LANG", "\xff", false},
		{"", "x", false},
	} {
		got, err := parseEnv(ssh.Marshal(envPayload{c.name, c.value}), false)
		if (err == nil) != c.ok || (c.ok && got != c.name+"="+c.value) {
			t.Errorf("%q=%.20q: %.20q, %v", c.name, c.value, got, err)
		}
	}
}

func TestParseExec(t *testing.T) {
	for in, want := range map[string]string{"echo a": "echo a", "": " ", "a\x00b": "", "\xff\xfe": "\xff\xfe"} {
		got, err := parseExec(ssh.Marshal(struct{ S string }{in}))
		if got.Script != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got.Script, err)
		}
	}
}

func FuzzSessionRequests(f *testing.F) {
	f.Add(ssh.Marshal(ptyPayload{"xterm", 80, 24, 640, 480, "\x00"}))
	f.Add(ssh.Marshal(struct{ A, B, C, D uint32 }{80, 24, 1 << 31, 0}))
	f.Add(ssh.Marshal(envPayload{"LC_ALL", "C"}))
	f.Add(ssh.Marshal(envPayload{"LD_PRELOAD", "/x"}))
	f.Add(ssh.Marshal(struct{ S string }{"TERM"}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, payload []byte) {
		if tty, err := parsePTY(payload); err == nil && (tty.Term == "" || len(tty.Term) > 64 || strings.ContainsAny(tty.Term, "/ \n\x00=")) {
			t.Errorf("terminal type %q", tty.Term)
		}
		if _, err := parseWindowChange(payload); err == nil && len(payload) != 16 {
			t.Errorf("a window change of %d bytes", len(payload))
		}
		if v, err := parseEnv(payload, true); err == nil {
			name, _, ok := strings.Cut(v, "=")
			if !ok || !harmlessRE.MatchString(name) || len(v) > maxEnvLength || strings.Contains(v, "\x00") {
				t.Errorf("variable %q", v)
			}
		}
		if name, err := parseSignal(payload); err == nil && (len(name) < 3 || len(name) > 4) {
			t.Errorf("signal %q", name)
		}
		if cmd, err := parseExec(payload); err == nil && (cmd.Script == "" || strings.Contains(cmd.Script, "\x00")) {
			t.Errorf("script %q", cmd.Script)
		}
	})
}

func FuzzForwardRequests(f *testing.F) {
	f.Add(ssh.Marshal(directPayload{"localhost", 80, "127.0.0.1", 5}))
	f.Add(ssh.Marshal(directPayload{"::1", 65536, "", 0}))
	f.Add(ssh.Marshal(hostPortPayload{"", 0}))
	f.Add(ssh.Marshal(struct{ S string }{"/a\x00b"}))
	f.Add(ssh.Marshal(struct {
		P, R string
		N    uint32
	}{"/run/x.sock", "", 0}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, payload []byte) {
		check := func(e shed.Endpoint, err error) {
			if err == nil && (e.Validate() != nil || strings.Contains(e.Address, "\x00") || e.Address == "") {
				t.Errorf("%+v", e)
			}
		}
		if h, err := parseDirectTCP(payload); err == nil {
			check(h.endpoint(), nil)
		}
		if h, err := parseListenTCP(payload); err == nil {
			check(h.listenEndpoint(), nil)
		}
		check(parseDirectUnix(payload))
		check(parseListenUnix(payload))
		if cmd, err := parseSubsystem(payload); err == nil && cmd.Validate() != nil {
			t.Errorf("%+v", cmd)
		}
	})
}
