package api

import (
	"context"
	"net/http"

	"github.com/charliek/shed"
)

func (s *server) sessions(w http.ResponseWriter, r *http.Request) {
	sessions, err := s.Sheds.Sessions(r.Context(), r.PathValue("name"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, append([]shed.Session{}, sessions...))
}

func (s *server) allSessions(w http.ResponseWriter, r *http.Request) {
	all, err := s.Sheds.AllSessions(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	all.Sessions = append([]shed.Session{}, all.Sessions...)
	all.Unanswered = append([]shed.Unanswered{}, all.Unanswered...)
	writeJSON(w, http.StatusOK, all)
}

func (s *server) killSession(w http.ResponseWriter, r *http.Request) {
	s.bodiless(w, r, http.StatusOK, func(ctx context.Context, _ shed.Progress) (any, error) {
		return struct{}{}, s.Sheds.KillSession(ctx, r.PathValue("name"), r.PathValue("session"))
	})
}
