//go:build linux

package engine

import (
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/state"
)

// Whoever asks for sessions doesn't start a shed by that. In these tests that would fail.
func TestSessionsOfStopped(t *testing.T) {
	f := newFixture(t)
	f.shed(t, "b", state.Ready)
	f.shed(t, "a", state.Ready)
	e := f.engine(t)
	if s, err := e.Sessions(t.Context(), "a"); err != nil || len(s) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	all, err := e.AllSessions(t.Context())
	if err != nil || len(all.Sessions) != 0 || len(all.Unanswered) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	for want, do := range map[shed.Code]func() error{
		shed.CodeNoSession: func() error { return e.KillSession(t.Context(), "a", "default") },
		shed.CodeConflict: func() error {
			_, err := e.Exec(t.Context(), "a", shed.Command{Attach: &shed.Attach{Session: "s", Mode: shed.AttachJoin}, TTY: &shed.TTY{}})
			return err
		},
		shed.CodeNotFound: func() error { return e.KillSession(t.Context(), "c", "default") },
		shed.CodeInvalid:  func() error { return e.KillSession(t.Context(), "a", "de.fault") },
	} {
		if err := do(); shed.ErrorCode(err) != want {
			t.Errorf("%v, want the code %q", err, want)
		}
	}
	for name, want := range map[string]shed.Code{"c": shed.CodeNotFound, "A": shed.CodeInvalid} {
		if _, err := e.Sessions(t.Context(), name); shed.ErrorCode(err) != want {
			t.Errorf("%q: %v, want the code %q", name, err, want)
		}
	}
	for _, name := range []string{"a", "b"} {
		if s := get(t, e, name); s.Status != shed.StatusStopped {
			t.Errorf("%s is %s", name, s.Status)
		}
	}
}
