package sshd

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"
)

// openFiles returns how many files this process has open.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// usage is what a server that isn't used has.
type usage struct {
	goroutines, files int
	heap              uint64 // bytes
}

func usageNow(t *testing.T) usage {
	t.Helper()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{runtime.NumGoroutine(), openFiles(t), m.HeapAlloc}
}

// awaitUsage waits until nothing more than before is used. The heap may have grown by what is remembered of clients and
// logged.
func awaitUsage(t *testing.T, before usage) {
	t.Helper()
	const slack = 4 << 20
	for {
		now := usageNow(t)
		if now.goroutines <= before.goroutines && now.files <= before.files && now.heap <= before.heap+slack {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// checkLog fails where a client's bytes have reached the log as they are.
func (ts *testServer) checkLog() {
	ts.t.Helper()
	for line := range strings.Lines(ts.logged.String()) {
		line = strings.TrimSuffix(line, "\n")
		if strings.ContainsFunc(line, unicode.IsControl) || len(line) > 4000 {
			ts.t.Errorf("logged %.4000q", line)
		}
	}
}

// Before they have logged in, clients can send what they like.
func TestMalformedHandshakes(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = time.Hour })
	ts.mustDial("box").Close()
	before := usageNow(t)
	packet := func(length uint32, rest ...byte) string {
		return "SSH-2.0-x\r\n" + string(append(binary.BigEndian.AppendUint32(nil, length), rest...))
	}
	kex := kexInitPayload()
	kexPacket := func(payload []byte) string {
		return packet(uint32(1+len(payload)+8), append(append([]byte{8}, payload...), make([]byte, 8)...)...)
	}
	var endless []byte
	for range 5000 {
		endless = append(endless, strings.Repeat("y", 200)+"\r\n"...)
	}
	for name, sent := range map[string]string{
		"control bytes":              "SSH-2.0-\x1b[31m\x00\x7f\a\r\n" + strings.Repeat("\x1b]0;x\a", 100),
		"lines and no version":       string(endless),
		"one line without an end":    strings.Repeat("z", 10<<20),
		"only a version":             "SSH-2.0-x\r\n",
		"an old version":             "SSH-1.99-\xff\r\n",
		"NULs":                       string(make([]byte, 1<<20)),
		"a packet of 4 GB":           packet(math.MaxUint32, 4),
		"a packet of 2 GB":           packet(math.MaxInt32, 4),
		"a packet of 256 KB":         packet(256<<10, append([]byte{4, msgKexInit}, make([]byte, 300<<10)...)...),
		"a packet of no bytes":       packet(0),
		"a packet of a byte":         packet(1, 0),
		"all padding":                packet(12, append([]byte{11}, make([]byte, 11)...)...),
		"more padding than packet":   packet(12, append([]byte{255}, make([]byte, 11)...)...),
		"half a packet":              kexPacket(kex)[:60],
		"an empty KEXINIT":           kexPacket([]byte{msgKexInit}),
		"a short KEXINIT":            kexPacket(kex[:len(kex)-20]),
		"a KEXINIT of wrong lengths": kexPacket(append(append([]byte{}, kex[:17]...), bytes.Repeat([]byte{0xff}, 200)...)),
		"two KEXINITs":               kexPacket(kex) + kexPacket(kex)[len("SSH-2.0-x\r\n"):],
		"no key of the exchange":     kexPacket(kex) + kexPacket([]byte{msgECDHInit, 0, 0, 0, 0})[len("SSH-2.0-x\r\n"):],
		"a key that is too long":     kexPacket(kex) + kexPacket([]byte{msgECDHInit, 0xff, 0xff, 0xff, 0xff})[len("SSH-2.0-x\r\n"):],
		"a key of zeros":             kexPacket(kex) + kexPacket(append([]byte{msgECDHInit, 0, 0, 0, 32}, make([]byte, 32)...))[len("SSH-2.0-x\r\n"):],
		"keys before the exchange":   kexPacket([]byte{msgNewKeys}),
		"a login in the clear":       kexPacket(message(msgUserauth, struct{ A, B, C string }{"box", "ssh-connection", "none"})),
		"a channel in the clear":     kexPacket(message(msgChannelOpen, struct{ A string }{"session"})),
		"endless disconnects":        kexPacket(bytes.Repeat([]byte{msgDisconnect}, 1000)),
	} {
		conn, err := net.Dial("tcp", ts.addr)
		if err != nil {
			t.Fatal(err)
		}
		var sending sync.WaitGroup
		sending.Go(func() {
			io.WriteString(conn, sent) // which fails where the server has enough
			conn.(*net.TCPConn).CloseWrite()
		})
		io.Copy(io.Discard, conn) // the server ends it
		conn.Close()
		sending.Wait()
		if c, err := ts.dial("box", ts.signer); err != nil {
			t.Errorf("after %s: %v", name, err)
		} else {
			c.Close()
		}
	}
	awaitUsage(t, before)
	ts.checkLog()
}

// In place of a login, too.
func TestMalformedLogins(t *testing.T) {
	ts := newTestServer(t, func(s *Server) { s.gate.burst = time.Hour })
	ts.mustDial("box").Close()
	before := usageNow(t)
	service := message(msgServiceRequest, struct{ S string }{"ssh-userauth"})
	login := func(r loginRequest) []byte { return message(msgUserauth, r) }
	key := ts.signer.PublicKey().Marshal()
	const hostile = "\x1b[31m\r\nlevel=ERROR msg=\"forged\"\x00\a\u202e\x7f"
	for name, packets := range map[string][][]byte{
		"no service":            {message(msgServiceRequest, struct{ S string }{hostile})},
		"a name of controls":    {service, login(loginRequest{hostile, "ssh-connection", "publickey", false, ssh.KeyAlgoED25519, key})},
		"a method of controls":  {service, login(loginRequest{"box", "ssh-connection", hostile, false, "", nil})},
		"a service of controls": {service, login(loginRequest{"box", hostile, "publickey", false, "", nil})},
		"another algorithm":     {service, login(loginRequest{"box", "ssh-connection", "publickey", true, hostile, key})},
		"a name of 200 KB":      {service, login(loginRequest{strings.Repeat("\x1b", 200<<10), "ssh-connection", "publickey", false, ssh.KeyAlgoED25519, key})},
		"a key of 200 KB":       {service, login(loginRequest{"box", "ssh-connection", "publickey", false, ssh.KeyAlgoED25519, make([]byte, 200<<10)})},
		"a packet of 10 MB":     {service, login(loginRequest{User: strings.Repeat("x", 10<<20)})},
		"no signature":          {service, login(loginRequest{"box", "ssh-connection", "publickey", true, ssh.KeyAlgoED25519, key})},
		"a wrong signature": {service, append(login(loginRequest{"box", "ssh-connection", "publickey", true, ssh.KeyAlgoED25519, key}),
			ssh.Marshal(struct{ S []byte }{ssh.Marshal(ssh.Signature{Format: ssh.KeyAlgoED25519, Blob: make([]byte, 64)})})...)},
		"a certificate of nothing": {service, login(loginRequest{"box", "ssh-connection", "publickey", true, ssh.CertAlgoED25519v01, ssh.Marshal(struct{ S string }{ssh.CertAlgoED25519v01})})},
		"nothing of a request":     {service, {msgUserauth}},
		"a channel":                {service, message(msgChannelOpen, struct{ A string }{"session"})},
		"an unknown message":       {{255, 1, 2, 3}},
		// Packets ahead of an error, which nobody takes any more.
		"no service, and more":  slices.Repeat([][]byte{message(msgServiceRequest, struct{ S string }{"none"})}, 1000),
		"many services":         slices.Repeat([][]byte{service}, 1000),
		"many short packets":    slices.Repeat([][]byte{{0xee}}, 1000),
		"many empty requests":   append([][]byte{service}, slices.Repeat([][]byte{{msgUserauth}}, 1000)...),
		"many requests":         append([][]byte{service}, slices.Repeat([][]byte{login(loginRequest{"box", "ssh-connection", "x", false, "", nil})}, 1000)...),
		"many large requests":   append([][]byte{service}, slices.Repeat([][]byte{login(loginRequest{"box", "ssh-connection", "x", false, "", make([]byte, 100<<10)})}, 50)...),
		"a new exchange, often": append([][]byte{service}, slices.Repeat([][]byte{kexInitPayload(), {0xee}}, 100)...),
	} {
		if name == "a new exchange, often" && raceDetector {
			t.Log("NOT TESTED under the race detector: " + name + ". Package ssh then reads the algorithms that it has agreed on while it agrees on others")
			continue
		}
		c, err := dialRawClient(ts.addr)
		if err != nil {
			t.Fatal(name, err)
		}
		var sending sync.WaitGroup
		sending.Go(func() {
			for _, p := range packets {
				if c.send(p) != nil {
					break
				}
			}
			c.Conn.(*net.TCPConn).CloseWrite()
		})
		for {
			payload, err := c.receiveAny()
			if err != nil {
				break
			}
			if payload[0] == msgUserauthOK {
				t.Error(name, "is in")
			}
		}
		c.Close()
		sending.Wait()
		if c, err := ts.dial("box", ts.signer); err != nil {
			t.Errorf("after %s: %v", name, err)
		} else {
			c.Close()
		}
	}
	awaitUsage(t, before)
	ts.checkLog()
	if strings.Contains(ts.logged.String(), "\nlevel=ERROR msg=\"forged\"") {
		t.Error("a client has forged a line of the log")
	}
}

// openChannel opens a session and returns the server's number of it.
func (c *rawClient) openChannel(window uint32) (uint32, error) {
	if err := c.send(message(msgChannelOpen, channelOpen{"session", 0, window, 1 << 15})); err != nil {
		return 0, err
	}
	reply, err := c.receive(msgChannelOpened)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(reply[5:]), nil
}

// ping returns an error if the server doesn't serve the connection any more.
func (c *rawClient) ping() error {
	if err := c.send(message(msgGlobalRequest, globalRequest{keepAliveRequest, true})); err != nil {
		return err
	}
	_, err := c.receive(msgRequestSuccess)
	return err
}

// Clients that are logged in can send what they like, too: it costs them their connection at most.
func TestMalformedPackets(t *testing.T) {
	ts := newTestServer(t)
	ts.mustDial("box").Close()
	before := usageNow(t)
	other := ts.mustDial("box")
	probe := func() error {
		_, _, err := other.SendRequest(keepAliveRequest, true, nil)
		return err
	}
	if err := probe(); err != nil {
		t.Fatal(err)
	}
	u32 := binary.BigEndian.AppendUint32
	onChannel := func(number byte, id uint32, rest ...byte) []byte { return append(u32([]byte{number}, id), rest...) }
	exec := func(id uint32, script string) []byte {
		return message(msgChannelRequest, struct {
			ID    uint32
			Type  string
			Reply bool
			S     string
		}{id, "exec", true, script})
	}
	env := func(id uint32, name, value string) []byte {
		return message(msgChannelRequest, struct {
			ID          uint32
			Type        string
			Reply       bool
			Name, Value string
		}{id, "env", false, name, value})
	}
	repeat := func(n int, p []byte) [][]byte { return slices.Repeat([][]byte{p}, n) }
	global := func(kind string, reply bool) []byte { return message(msgGlobalRequest, globalRequest{kind, reply}) }
	data := func(id uint32, n int) []byte {
		return onChannel(msgChannelData, id, append(u32(nil, uint32(n)), make([]byte, n)...)...)
	}
	for name, test := range map[string]struct {
		packets func(id uint32) [][]byte
		lives   bool // the connection has to
	}{
		"every message, empty": {func(uint32) (all [][]byte) {
			for n := range 256 {
				all = append(all, []byte{byte(n)})
			}
			return all
		}, false},
		"data for no channel":             {func(uint32) [][]byte { return [][]byte{data(99, 10)} }, false},
		"data for the highest channel":    {func(uint32) [][]byte { return [][]byte{data(math.MaxUint32, 10)} }, false},
		"a request for no channel":        {func(uint32) [][]byte { return [][]byte{exec(99, "true")} }, true},
		"a success for no channel":        {func(uint32) [][]byte { return [][]byte{onChannel(msgChannelSuccess, 7)} }, false},
		"an answer to no request":         {func(uint32) [][]byte { return repeat(10_000, []byte{msgRequestSuccess}) }, true},
		"a channel that nobody asked for": {func(id uint32) [][]byte { return [][]byte{onChannel(msgChannelOpened, id, make([]byte, 12)...)} }, false},
		"a length of data that is wrong":  {func(id uint32) [][]byte { return [][]byte{onChannel(msgChannelData, id, 0xff, 0xff, 0xff, 0xff, 1)} }, false},
		"less data than said":             {func(id uint32) [][]byte { return [][]byte{onChannel(msgChannelData, id, 0, 0, 0, 9, 1)} }, false},
		"unknown extended data": {func(id uint32) [][]byte {
			return [][]byte{onChannel(msgExtendedData, id, append(u32(u32(nil, 99), 1), 'x')...)}
		}, true},
		"more than the window": {func(id uint32) [][]byte { return repeat(200, data(id, 30_000)) }, false},
		"more than the window, extended": {func(id uint32) [][]byte {
			return repeat(200, onChannel(msgExtendedData, id, append(u32(u32(nil, 1), 30_000), make([]byte, 30_000)...)...))
		}, false},
		"a packet above the limit": {func(id uint32) [][]byte { return [][]byte{data(id, 100_000)} }, false},
		"a window that overflows":  {func(id uint32) [][]byte { return repeat(2, onChannel(msgWindowAdjust, id, 0xff, 0xff, 0xff, 0xff)) }, false},
		"closed twice":             {func(id uint32) [][]byte { return repeat(2, onChannel(msgChannelClose, id)) }, false},
		"ended a thousand times":   {func(id uint32) [][]byte { return repeat(1000, onChannel(msgChannelEOF, id)) }, true},
		"data after the end":       {func(id uint32) [][]byte { return [][]byte{onChannel(msgChannelEOF, id), data(id, 10)} }, true},
		"a flood of requests":      {func(uint32) [][]byte { return repeat(10_000, global("no-such-request\x1b[31m", false)) }, true},
		"a flood with answers":     {func(uint32) [][]byte { return repeat(10_000, global(keepAliveRequest, true)) }, true},
		"a flood of forwards":      {func(uint32) [][]byte { return repeat(1000, append(global("tcpip-forward", true), 0xff, 0xff)) }, true},
		"a flood of environment":   {func(id uint32) [][]byte { return repeat(1000, env(id, "A", strings.Repeat("x", 30_000))) }, true},
		"environment with newlines": {func(id uint32) [][]byte {
			return [][]byte{env(id, "A", "b\nC=d"), env(id, "E\nF", "g"), env(id, "A=B", "c")}
		}, true},
		"environment with NULs": {func(id uint32) [][]byte {
			return [][]byte{env(id, "A", "b\x00C=d"), env(id, "\x00", ""), env(id, "\xff", "\xff")}
		}, true},
		"a terminal of garbage": {func(id uint32) [][]byte {
			junk := make([]byte, 20_000)
			rand.Read(junk)
			return [][]byte{message(msgChannelRequest, struct {
				ID                        uint32
				Type                      string
				Reply                     bool
				Term                      string
				Cols, Rows, Width, Height uint32
				Modes                     []byte
			}{id, "pty-req", true, "\x1b[31m", math.MaxUint32, math.MaxUint32, 1, 1, junk}), exec(id, "true")}
		}, true},
		"channels without end": {func(uint32) [][]byte {
			return repeat(2000, message(msgChannelOpen, channelOpen{"\x1b]0;x\a", 5, 0, 1 << 15}))
		}, true},
		"a channel of packets of no bytes": {func(uint32) [][]byte {
			return [][]byte{message(msgChannelOpen, channelOpen{"session", 5, 0, 0})}
		}, false},
		"a second key exchange of garbage": {func(uint32) [][]byte { return [][]byte{{msgKexInit}, {1, 2, 3}} }, false},
		"keys without an exchange":         {func(uint32) [][]byte { return [][]byte{{msgNewKeys}} }, false},
		"a second login": {func(uint32) [][]byte {
			return [][]byte{message(msgUserauth, struct{ A, B, C string }{"box", "ssh-connection", "none"})}
		}, false},
	} {
		c, err := dialRawClient(ts.addr)
		if err == nil {
			err = c.logIn("box", ts.signer)
		}
		if err != nil {
			t.Fatal(name, err)
		}
		id, err := c.openChannel(1 << 20)
		if err != nil {
			t.Fatal(name, err)
		}
		var sending sync.WaitGroup
		sending.Go(func() {
			for _, p := range test.packets(id) {
				if c.send(p) != nil {
					return
				}
			}
			c.send(global("last", true))
		})
		// Whatever is answered, it is read: until the last, or the end.
		const failure = 82
		for {
			var payload []byte
			if payload, err = c.receiveAny(); err != nil || payload[0] == failure {
				break
			}
		}
		if err == nil && name != "a flood of forwards" {
			sending.Wait()
			err = c.ping()
		}
		if test.lives && err != nil {
			t.Errorf("%s has cost the connection: %v", name, err)
		}
		c.Close()
		sending.Wait()
		if err := probe(); err != nil {
			t.Fatalf("after %s, another connection: %v", name, err)
		}
	}
	other.Close()
	awaitUsage(t, before)
	ts.checkLog()
}

// A packet that isn't what its sender has signed ends the connection.
func TestWrongMAC(t *testing.T) {
	ts := newTestServer(t)
	for name, flaw := range map[string]func([]byte){
		"MAC":     func(p []byte) { p[len(p)-1] ^= 1 },
		"payload": func(p []byte) { p[6] ^= 1 },
		"length":  func(p []byte) { p[2] ^= 1 },
		"padding": func(p []byte) { p[4] ^= 0xff },
	} {
		c, err := dialRawClient(ts.addr)
		if err == nil {
			err = c.logIn("box", ts.signer)
		}
		if err == nil {
			err = c.ping()
		}
		if err != nil {
			t.Fatal(err)
		}
		c.sendFlawed([]byte{msgRequestSuccess}, flaw)
		c.Conn.(*net.TCPConn).CloseWrite() // a wrong length may have the server wait for the rest
		if payload, err := c.receive(msgRequestSuccess); err == nil {
			t.Errorf("%s: answered %q", name, payload)
		}
		c.Close()
	}
}
