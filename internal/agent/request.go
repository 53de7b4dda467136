package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/charliek/shed"
)

// Request is the first message on a stream: exactly one field is set.
// Each message is a 4-byte big-endian length and that many bytes of JSON.
//
// Exec is followed by the frames of the exec protocol, after a good Reply if it is of a session. The others are
// answered with a Reply; after a good one, Dial's stream carries the connection's bytes, and Listen's
// a Listening and then an Accepted for each connection, until the host ends it. After that to
// Sessions comes one []shed.Session, without the name of the shed.
type Request struct {
	Setup    *Setup         `json:"setup,omitempty"`
	Exec     *shed.Command  `json:"exec,omitempty"`
	Dial     *shed.Endpoint `json:"dial,omitempty"`
	Listen   *shed.Endpoint `json:"listen,omitempty"`
	Clock    *Clock         `json:"clock,omitempty"`
	PowerOff *PowerOff      `json:"power_off,omitempty"`

	Sessions    *Sessions    `json:"sessions,omitempty"`
	KillSession *KillSession `json:"kill_session,omitempty"`
}

// DefaultUser is who commands run as where nobody says otherwise. Every shed has the user.
const DefaultUser = "shed"

// Setup gives a booted machine what is this shed's own. The agent then mounts its
// root file system and hands over to the image's init, if there is one. It answers when
// commands can be run; those wait for the network themselves. A second
// Setup only replaces Env, Workspace and Image.
type Setup struct {
	Hostname  string   `json:"hostname"`
	Env       []string `json:"env"`       // of every command: K=V
	Workspace string   `json:"workspace"` // default directory of commands; "" means the home
	Image     Image    `json:"image"`
	Layers    int      `json:"layers"` // number of read-only layers
	Network   Network  `json:"network"`
	Clock     Clock    `json:"clock"`
}

// Codes of errors that a Setup has, of which the host knows what to try.
const (
	CodeUpper shed.Code = "UPPER" // the upper can't be mounted
	CodeLayer shed.Code = "LAYER" // nor can a layer
)

// Image is what an image's configuration says about the commands that run in it.
type Image struct {
	Env        []string `json:"env,omitempty"`         // K=V; Setup's comes on top
	WorkingDir string   `json:"working_dir,omitempty"` // of commands where there is no workspace
	User       string   `json:"user,omitempty"`        // of commands: NAME or UID[:GROUP or GID]
}

// Network is the machine's only interface. The zero value means none.
type Network struct {
	Address string `json:"address"` // with prefix length
	Gateway string `json:"gateway"`
	DNS     string `json:"dns"`
	MTU     int    `json:"mtu"`
}

// Clock sets the machine's time.
type Clock struct {
	UnixNano int64 `json:"unix_nano"`
}

// PowerOff asks for a clean end: sessions are ended, file systems unmounted.
type PowerOff struct{}

// Sessions asks for the default user's sessions.
type Sessions struct{}

// KillSession asks for the end of one of them and of what runs in it.
type KillSession struct {
	Name string `json:"name"`
}

// Reply answers a request.
type Reply struct {
	Error string    `json:"error,omitempty"`
	Code  shed.Code `json:"code,omitempty"` // of the error, if it has one
}

// maxJSON bounds a message, in bytes: the largest that a peer may make us hold.
const maxJSON = 4 << 20

// WriteMessage writes v as one message.
func WriteMessage(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxJSON {
		return fmt.Errorf("a message of %d bytes is over the limit of %d", len(b), maxJSON)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// ReadMessage reads one message into v.
func ReadMessage(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxJSON {
		return fmt.Errorf("a message of %d bytes is over the limit of %d", n, maxJSON)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// Call sends req on conn, waits for the reply until ctx is done, and returns
// its error. On error conn is closed; else the caller owns it still.
func Call(ctx context.Context, conn net.Conn, req Request) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := call(conn, req)
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
	}
	return err
}

func call(conn net.Conn, req Request) error {
	if err := WriteMessage(conn, req); err != nil {
		return err
	}
	var reply Reply
	if err := ReadMessage(conn, &reply); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the agent ended the request without an answer")
		}
		return err
	}
	if reply.Error != "" {
		return &replyError{Reply{Error: cut(reply.Error), Code: shed.Code(cut(string(reply.Code)))}}
	}
	return nil
}

// maxError is how much is taken of what a guest, which need not be the agent, says of an error, in
// bytes: it is kept and logged.
const maxError = 1000

func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxError)], "") }

// replyError is what the agent answers instead of doing what it is asked.
type replyError struct{ Reply }

func (e *replyError) Error() string { return e.Reply.Error }

// ReplyCode returns the code that the agent gave the error in err's chain, or "".
func ReplyCode(err error) shed.Code {
	var reply *replyError
	if errors.As(err, &reply) {
		return reply.Code
	}
	return ""
}

// Exec asks for a command on conn. On error conn is closed; else it carries the exec protocol.
func Exec(ctx context.Context, conn net.Conn, cmd shed.Command) error {
	req := Request{Exec: &cmd}
	if cmd.Attach != nil {
		return Call(ctx, conn, req)
	}
	err := WriteMessage(conn, req)
	if err != nil {
		conn.Close()
	}
	return err
}
