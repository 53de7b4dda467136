package main

import (
	"encoding/json"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api/apitest"
)

func TestSessions(t *testing.T) {
	fake := &apitest.Fake{}
	fake.Add(shed.Shed{Name: "db", Status: shed.StatusRunning})
	fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	serve(t, fake)
	header := "NAME   SESSION   COMMAND   ATTACHED   IDLE   LAST OUTPUT\n"
	expect(t, "sessions", 0, header, "There are no sessions. Open one with: shed attach NAME\n")
	expect(t, "sessions here/web", 0, header, "There are no sessions in web. Open one with: shed attach web\n")
	expect(t, "sessions --json", 0, "[]\n", "")
	expect(t, "sessions none", 3, "", "shed: there is no shed \"none\"\n")

	now := time.Now()
	line := "building \x1b[31m 3 of\t7 " + strings.Repeat("x", 100)
	ofWeb := []shed.Session{
		{Shed: "web", Name: "agent", Keeper: shed.KeptByAgent, Command: "claude\n", Attached: 2, ActiveAt: now.Add(-50 * time.Hour), LastLine: line},
		{Shed: "web", Name: "default", Keeper: shed.KeptByTmux, Command: "bash", ActiveAt: now.Add(time.Hour)},
	}
	fake.AddSession(shed.Session{Shed: "db", Name: "default", Keeper: shed.KeptByTmux, Command: "psql", Attached: 1, ActiveAt: now.Add(-5 * time.Minute), LastLine: "shed=#"})
	for _, s := range ofWeb {
		fake.AddSession(s)
	}
	shown := func(line string) string {
		return "web    agent     claude    2          2 days      " + line + "\n" +
			"web    default   bash      no         now         -\n"
	}
	header = "NAME   SESSION   COMMAND   ATTACHED   IDLE        LAST OUTPUT\n"
	ofDB := "db     default   psql      yes        5 minutes   shed=#\n"
	cleaned := "building \uFFFD[31m 3 of 7 " + strings.Repeat("x", 100)
	expect(t, "sessions", 0, header+ofDB+shown(cleaned), "")
	expect(t, "sessions web", 0, strings.Replace(header, "IDLE        ", "IDLE     ", 1)+strings.ReplaceAll(strings.ReplaceAll(shown(cleaned), "2 days      ", "2 days   "), "now         ", "now      "), "")

	fake.Unanswered = []shed.Unanswered{{Shed: "frozen", Reason: "no answer within 5s"}}
	expect(t, "sessions", 1, header+ofDB+shown(cleaned), "frozen does not say what runs in it: no answer within 5s\n")
	code, stdout, stderr := shedCLI("sessions", "--json")
	var got []shed.Session
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != 1 || len(got) != 3 || got[1].LastLine != line || !strings.HasPrefix(stderr, "frozen does not say") {
		t.Errorf("sessions --json: %d, %s, %s", code, stdout, stderr)
	}
	_, stdout, _ = shedCLI("sessions", "web", "--json")
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || len(got) != 2 || got[0].Keeper != shed.KeptByAgent || got[0].Attached != 2 {
		t.Errorf("sessions web --json: %s", stdout)
	}

	// A terminal gets what it has room for.
	s := newSession(t, "sessions", "web")
	s.end(0)
	for line := range strings.SplitSeq(s.rest(), "\r\n") {
		if n := len([]rune(line)); n > 99 || strings.HasPrefix(line, "web    agent") && (n != 99 || !strings.HasSuffix(line, "x…")) {
			t.Errorf("in a terminal of 99 columns: %q", line)
		}
	}
}

func TestAllSessions(t *testing.T) {
	var servers strings.Builder
	for _, name := range []string{"far", "near"} {
		s := serveSessions(t)
		s.fake.AddSession(shed.Session{Shed: "web", Name: "default", Command: "run-" + name, ActiveAt: time.Now().Add(time.Hour)})
		s.fake.Unanswered = []shed.Unanswered{{Shed: "frozen", Reason: "no answer"}}
		servers.WriteString("  " + name + ": {socket: " + s.socket + "}\n")
	}
	dead := t.TempDir() + "/s"
	servers.WriteString("  dead: {socket: " + dead + "}\n")
	writeConfig(t, "servers:\n"+servers.String())
	why := "server \"dead\" at " + dead + " does not answer: dial unix " + dead + ": connect: no such file or directory"
	said := "dead is offline: " + why + "\nhint: is shed-server running? start it with: shed-server serve\n" +
		"far/frozen does not say what runs in it: no answer\nnear/frozen does not say what runs in it: no answer\n"
	for _, flag := range []string{"--all", "-a"} {
		expect(t, "sessions "+flag, 0, "NAME   SERVER   SESSION   COMMAND    ATTACHED   IDLE   LAST OUTPUT\n"+
			"web    far      default   run-far    no         now    -\n"+
			"web    near     default   run-near   no         now    -\n", said)
	}
	var doc struct {
		Sessions []struct {
			Server, Shed, Name, Command string
		}
		Unanswered []struct{ Server, Shed, Reason string }
		Offline    []struct {
			Server string
			Error  shed.Error
		}
	}
	code, stdout, stderr := shedCLI("sessions", "--all", "--json")
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil || code != 0 || stderr != said {
		t.Fatalf("%d, %s, %s, %v", code, stdout, stderr, err)
	}
	if len(doc.Sessions) != 2 || doc.Sessions[1].Server != "near" || doc.Sessions[1].Shed != "web" || doc.Sessions[1].Command != "run-near" ||
		len(doc.Unanswered) != 2 || doc.Unanswered[0].Server != "far" || doc.Unanswered[0].Shed != "frozen" ||
		len(doc.Offline) != 1 || doc.Offline[0].Server != "dead" || doc.Offline[0].Error.Code != shed.CodeUnreachable || doc.Offline[0].Error.Message != why {
		t.Errorf("%s", stdout)
	}
	serveSessions(t) // alone
	expect(t, "sessions -a", 0, "NAME   SERVER   SESSION   COMMAND   ATTACHED   IDLE   LAST OUTPUT\n", "There are no sessions. Open one with: shed attach NAME\n")
	expect(t, "sessions -a --json", 0, "{\n  \"sessions\": [],\n  \"unanswered\": [],\n  \"offline\": []\n}\n", "")
}

func TestSessionsKill(t *testing.T) {
	fake := &apitest.Fake{}
	fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	for _, name := range []string{"a", "b", "default"} {
		fake.AddSession(shed.Session{Shed: "web", Name: name, Command: "claude"})
	}
	serve(t, fake)
	expect(t, "sessions kill web default", 2, "", "shed: shed sessions kill needs --force where it can't ask\nhint: what runs in session default of web will be ended\n")
	expect(t, "sessions kill --force web default", 0, "default\n", "")
	expect(t, "sessions kill -f web default", 3, "", "shed: shed \"web\" has no session \"default\"\n")
	expect(t, "sessions kill --force --json here/web a", 0, "{\n  \"shed\": \"web\",\n  \"killed\": [\n    \"a\"\n  ]\n}\n", "")

	s := newSession(t, "sessions", "kill", "web", "gone")
	if said := s.until("shed sessions web\r\n"); strings.Contains(said, "[y/N]") || !strings.Contains(said, `shed "web" has no session "gone"`) {
		t.Errorf("it asked about a session that isn't there: %q", said)
	}
	s.end(3)
	for answer, code := range map[string]int{"\n": 1, "y\n": 0} {
		s := newSession(t, "sessions", "kill", "web", "b")
		s.until("End session b of web and what runs in it (claude)? [y/N] ")
		io.WriteString(s.user, answer)
		s.end(code)
		left, err := fake.Sessions(t.Context(), "web")
		if want := map[int]int{0: 0, 1: 1}[code]; err != nil || len(left) != want {
			t.Errorf("after %q there is %v, %v", answer, left, err)
		}
		fake.KillSession(t.Context(), "web", "b")
		fake.AddSession(shed.Session{Shed: "web", Name: "b", Command: "claude"})
	}
}

func TestSessionsUsage(t *testing.T) {
	fake := &apitest.Fake{}
	fake.Add(shed.Shed{Name: "web", Status: shed.StatusRunning})
	fake.AddSession(shed.Session{Shed: "web", Name: "agent"})
	fake.AddSession(shed.Session{Shed: "web", Name: "default"})
	serve(t, fake)
	for args, want := range map[string]string{
		"sessions a b":               `shed sessions takes only NAME, got "b"`,
		"sessions web --bogus":       `unknown flag: --bogus`,
		"sessions --all web":         "--all means all sheds",
		"-s here sessions --all":     "--all means all servers",
		"sessions kill":              `shed sessions kill needs NAME and SESSION`,
		"sessions kill web":          `shed sessions kill needs SESSION`,
		"sessions kill web a b":      `got "b"`,
		"sessions kill -f web a;b":   `"a;b" can't be the name of a session`,
		"sessions kill -f web a/b":   `"a/b" can't be the name of a session`,
		"sessions kill -f w;b a":     `"w;b" can't be the name of a shed`,
		"sessions kill --json web a": "needs --force",
	} {
		code, stdout, stderr := shedCLI(strings.Fields(args)...)
		if code != 2 || !strings.Contains(strings.ReplaceAll(stdout, `\"`, `"`)+stderr, want) {
			t.Errorf("shed %s: %d, %q, %q", args, code, stdout, stderr)
		}
	}
	for args, want := range map[string][]string{
		"__complete attach ":                 {"web"},
		"__complete attach web -S ":          {"agent", "default"},
		"__complete sessions kill here/web ": {"agent", "default"},
		"__complete sessions kill ":          {"web"},
	} {
		_, stdout, _ := shedCLI(strings.Split(args, " ")...)
		if got := strings.Fields(stdout); len(got) == 0 || !reflect.DeepEqual(got[:len(got)-1], want) {
			t.Errorf("%s: %q", args, stdout)
		}
	}
}
