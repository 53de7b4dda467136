// Package api is the HTTP API of shed-server: the server and the client.
//
// Bodies are JSON; an error is {"error": {"code", "message", "hint"}} with the
// status of its code. Long work answers with server-sent events where the
// client accepts them: any number of "progress" (a shed.Event), then one
// "complete" (the result) or "error". Archives and build contexts are tars of
// any size, streamed. Exec, dial and listen upgrade their connection, which then carries the
// exec protocol of internal/agent, the bytes of the connection in the shed, or the messages of a listener.
package api

import (
	_ "embed"
	"net/http"
	"os"
	"path/filepath"

	"github.com/charliek/shed"
)

// openapi describes the API.
//
//go:embed openapi.json
var openapi []byte

const (
	jsonType   = "application/json"
	eventsType = "text/event-stream"
	textType   = "text/plain; charset=utf-8"

	// What connections are upgraded to.
	execProtocol   = "shed-exec"
	dialProtocol   = "shed-dial"
	listenProtocol = "shed-listen"
)

// Names of the server-sent events.
const (
	eventProgress = "progress"
	eventComplete = "complete"
	eventError    = "error"
)

// statuses pairs codes and statuses. Where several codes share a status, the
// first is what that status means if the body doesn't say more.
var statuses = []struct {
	code   shed.Code
	status int
}{
	{shed.CodeInvalid, http.StatusBadRequest},
	{shed.CodeNotFound, http.StatusNotFound},
	{shed.CodeNoImage, http.StatusNotFound},
	{shed.CodeNoSession, http.StatusNotFound},
	{shed.CodeConflict, http.StatusConflict},
	{shed.CodeExists, http.StatusConflict},
	{shed.CodeCommand, http.StatusUnprocessableEntity},
	{shed.CodeInternal, http.StatusInternalServerError},
	{shed.CodeUnsupported, http.StatusNotImplemented},
	{shed.CodeBoot, http.StatusBadGateway},
	{shed.CodeRegistry, http.StatusBadGateway},
	{shed.CodeConnect, http.StatusBadGateway},
	{shed.CodeUnreachable, http.StatusServiceUnavailable},
	{shed.CodeNoSpace, http.StatusInsufficientStorage},
}

func statusOf(code shed.Code) int {
	for _, s := range statuses {
		if s.code == code {
			return s.status
		}
	}
	return http.StatusInternalServerError
}

func codeOf(status int) shed.Code {
	for _, s := range statuses {
		if s.status == status {
			return s.code
		}
	}
	if status >= 400 && status < 500 {
		return shed.CodeInvalid
	}
	return shed.CodeInternal
}

// errorBody is an error on the wire.
type errorBody struct {
	Error shed.Error `json:"error"`
}

func newErrorBody(err error) errorBody {
	return errorBody{shed.Error{
		Code:    shed.ErrorCode(err),
		Message: err.Error(),
		Hint:    shed.ErrorHint(err),
	}}
}

// DefaultSocket returns the path of the local server's socket: /run/shed/shed.sock
// for root, else shed.sock in $XDG_RUNTIME_DIR, or in ~/.shed where that isn't set.
func DefaultSocket() string {
	if os.Geteuid() == 0 {
		return "/run/shed/shed.sock"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "shed.sock")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = os.TempDir()
	}
	return filepath.Join(home, ".shed", "shed.sock")
}
