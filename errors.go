package shed

import (
	"errors"
	"fmt"
)

// Code classifies an Error. Codes are part of the HTTP API: they travel in
// {"error": {"code": ...}} and decide statuses and exit codes.
type Code string

const (
	CodeInvalid     Code = "INVALID"            // the request can't be carried out as it stands
	CodeNotFound    Code = "SHED_NOT_FOUND"     // no shed of that name
	CodeNoImage     Code = "IMAGE_NOT_FOUND"    // no image of that name or digest
	CodeNoSession   Code = "SESSION_NOT_FOUND"  // no session of that name in the shed
	CodeExists      Code = "SHED_EXISTS"        // a shed of that name is there
	CodeConflict    Code = "CONFLICT"           // not in this state: running, being created, in use
	CodeNoSpace     Code = "NO_SPACE"           // the disk is full, or would be
	CodeBoot        Code = "BOOT_FAILED"        // the machine did not come up
	CodeUnreachable Code = "SERVER_UNREACHABLE" // no answer from the server
	CodeRegistry    Code = "REGISTRY"           // an image registry can't be reached, or refuses
	CodeCommand     Code = "COMMAND_FAILED"     // a command in a shed failed: a clone, a step of a build
	CodeConnect     Code = "CONNECT_FAILED"     // an address in a shed can't be connected to, or listened on
	CodeUnsupported Code = "UNSUPPORTED"        // this server, backend or image can't do it
	CodeInternal    Code = "INTERNAL"           // a fault of ours
)

// Error is an error that a user is meant to read: what failed, on what and
// why in Message; what to try in Hint. Both survive the HTTP API.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Err     error  `json:"-"`
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.Err }

// Errorf returns an Error. A %w verb sets what it unwraps to.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint returns a copy of e that suggests what to try.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// ErrorCode returns the code of the first Error in err's chain, and
// CodeInternal for any other error. It returns "" for nil.
func ErrorCode(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// ErrorHint returns the hint of the first Error in err's chain that has one.
func ErrorHint(err error) string {
	for err != nil {
		var e *Error
		if !errors.As(err, &e) {
			return ""
		}
		if e.Hint != "" {
			return e.Hint
		}
		err = e.Err
	}
	return ""
}
