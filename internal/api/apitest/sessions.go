package apitest

import (
	"context"
	"slices"
	"strings"

	"github.com/charliek/shed"
)

// AddSession adds a session of a shed.
func (f *Fake) AddSession(s shed.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions = append(f.sessions, s)
	slices.SortFunc(f.sessions, func(a, b shed.Session) int {
		return strings.Compare(a.Shed+" "+a.Name, b.Shed+" "+b.Name)
	})
}

func (f *Fake) Sessions(ctx context.Context, name string) ([]shed.Session, error) {
	if err := f.begin(ctx, "sessions", name, nil); err != nil {
		return nil, err
	}
	if _, err := f.Get(ctx, name); err != nil {
		return nil, err
	}
	all, err := f.AllSessions(ctx)
	return slices.DeleteFunc(all.Sessions, func(s shed.Session) bool { return s.Shed != name }), err
}

func (f *Fake) AllSessions(ctx context.Context) (shed.SessionList, error) {
	if err := f.begin(ctx, "all sessions", "", nil); err != nil {
		return shed.SessionList{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return shed.SessionList{Sessions: slices.Clone(f.sessions), Unanswered: slices.Clone(f.Unanswered)}, nil
}

func (f *Fake) KillSession(ctx context.Context, name, session string) error {
	if err := f.begin(ctx, "kill session", name, nil); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.sessions, func(s shed.Session) bool { return s.Shed == name && s.Name == session })
	if i < 0 {
		return shed.Errorf(shed.CodeNoSession, "shed %q has no session %q", name, session)
	}
	f.sessions = slices.Delete(f.sessions, i, i+1)
	return nil
}
