package shed

import (
	"regexp"
	"time"
)

// DefaultSession is the session that is meant where none is named.
const DefaultSession = "default"

// SessionKeeper says what keeps a session while nobody is attached to it.
type SessionKeeper string

const (
	// KeptByTmux is a session of the image's tmux, which the shed's user sees in it too.
	KeptByTmux SessionKeeper = "tmux"
	// KeptByAgent is a session where the image has no tmux.
	KeptByAgent SessionKeeper = "agent"
)

// Session is a named terminal in a shed which outlives the connections to it.
type Session struct {
	Shed      string        `json:"shed"`
	Name      string        `json:"name"`
	Keeper    SessionKeeper `json:"keeper"`
	Command   string        `json:"command"`   // what runs in it now, such as "bash" or "claude"
	Attached  int           `json:"attached"`  // terminals that show it
	LastLine  string        `json:"last_line"` // of its screen, that isn't blank
	CreatedAt time.Time     `json:"created_at"`
	ActiveAt  time.Time     `json:"active_at"` // when it last wrote something
}

// SessionList is what runs in the sheds of a server.
type SessionList struct {
	Sessions []Session `json:"sessions"` // sorted by shed and name
	// Unanswered has the sheds that run, but did not say what runs in them.
	Unanswered []Unanswered `json:"unanswered"`
}

// Unanswered is a shed that gave no answer.
type Unanswered struct {
	Shed   string `json:"shed"`
	Reason string `json:"reason"`
}

// tmux gives '.' and ':' a meaning of their own.
var sessionRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,62}$`)

// ValidateSession returns an Error with CodeInvalid unless name can name a session.
func ValidateSession(name string) error {
	if sessionRE.MatchString(name) {
		return nil
	}
	return Errorf(CodeInvalid, "%.80q can't be the name of a session", name).
		WithHint("use 1 to 63 characters: letters, digits, '_' and '-', with no '-' in front")
}

// AttachMode says what to do about a session that is there, or isn't.
type AttachMode string

const (
	// AttachAny joins the session, or makes it.
	AttachAny AttachMode = ""
	// AttachNew makes the session: CodeConflict if it is there.
	AttachNew AttachMode = "new"
	// AttachJoin joins the session: CodeNoSession if it isn't there. A stopped shed isn't started: CodeConflict.
	AttachJoin AttachMode = "join"
)

// Attach shows a session to the terminal of a command.
type Attach struct {
	Session string     `json:"session"`
	Mode    AttachMode `json:"mode,omitempty"`
}

// Validate checks what can be told without the shed.
func (a Attach) Validate() error {
	switch a.Mode {
	case AttachAny, AttachNew, AttachJoin:
	default:
		return Errorf(CodeInvalid, "there is no way to attach called %.80q", a.Mode).WithHint("use new, join, or none")
	}
	return ValidateSession(a.Session)
}
