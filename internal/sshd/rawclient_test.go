package sshd

import (
	"bufio"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Numbers of messages (RFC 4253, 4252 and 4254).
const (
	msgDisconnect     = 1
	msgServiceRequest = 5
	msgKexInit        = 20
	msgNewKeys        = 21
	msgECDHInit       = 30
	msgUserauth       = 50
	msgUserauthOK     = 52
	msgGlobalRequest  = 80
	msgRequestSuccess = 81
	msgChannelOpen    = 90
	msgChannelOpened  = 91
	msgWindowAdjust   = 93
	msgChannelData    = 94
	msgExtendedData   = 95
	msgChannelEOF     = 96
	msgChannelClose   = 97
	msgChannelRequest = 98
	msgChannelSuccess = 99
)

// rawClient speaks as much of SSH as it takes to send packets that no client would.
type rawClient struct {
	net.Conn
	in       *bufio.Reader
	session  []byte
	sent     uint32
	out      cipher.Stream // nil: in the clear
	outMAC   []byte
	received cipher.Stream
}

// dialRawClient exchanges keys and no more.
func dialRawClient(addr string) (c *rawClient, err error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	c = &rawClient{Conn: conn, in: bufio.NewReader(conn)}
	const version = "SSH-2.0-raw"
	if _, err := io.WriteString(conn, version+"\r\n"); err != nil {
		return nil, err
	}
	server, err := c.in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	return c, c.exchangeKeys(version, strings.TrimRight(server, "\r\n"))
}

func (c *rawClient) exchangeKeys(version, server string) error {
	kexInit := kexInitPayload()
	if err := c.send(kexInit); err != nil {
		return err
	}
	serverInit, err := c.receive(msgKexInit)
	if err != nil {
		return err
	}
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	public := key.PublicKey().Bytes()
	if err := c.send(message(msgECDHInit, struct{ Q []byte }{public})); err != nil {
		return err
	}
	reply, err := c.receive(msgECDHInit + 1)
	if err != nil {
		return err
	}
	var answer struct{ HostKey, Q, Signature []byte }
	if err := ssh.Unmarshal(reply[1:], &answer); err != nil {
		return err
	}
	peer, err := ecdh.X25519().NewPublicKey(answer.Q)
	if err != nil {
		return err
	}
	shared, err := key.ECDH(peer)
	if err != nil {
		return err
	}
	secret := ssh.Marshal(struct{ K *big.Int }{new(big.Int).SetBytes(shared)})
	h := sha256.Sum256(append(ssh.Marshal(struct {
		VC, VS                  string
		IC, IS, HostKey, QC, QS []byte
	}{version, server, kexInit, serverInit, answer.HostKey, public, answer.Q}), secret...))
	c.session = h[:]
	if err := c.send([]byte{msgNewKeys}); err != nil {
		return err
	}
	if _, err := c.receive(msgNewKeys); err != nil {
		return err
	}
	derive := func(letter byte) []byte {
		sum := sha256.Sum256(slices.Concat(secret, c.session, []byte{letter}, c.session))
		return sum[:]
	}
	stream := func(iv, key byte) (cipher.Stream, error) {
		block, err := aes.NewCipher(derive(key)[:16])
		if err != nil {
			return nil, err
		}
		return cipher.NewCTR(block, derive(iv)[:16]), nil
	}
	var errOut, errIn error
	c.out, errOut = stream('A', 'C')
	c.received, errIn = stream('B', 'D')
	c.outMAC = derive('E')
	return errors.Join(errOut, errIn)
}

// kexInitPayload offers one way only.
func kexInitPayload() []byte {
	return message(msgKexInit, struct {
		Cookie                                 [16]byte
		Kex, HostKey, CipherOut, CipherIn      []string
		MACOut, MACIn, CompressOut, CompressIn []string
		LanguagesOut, LanguagesIn              []string
		FirstFollows                           bool
		Reserved                               uint32
	}{
		Kex: []string{"curve25519-sha256"}, HostKey: []string{ssh.KeyAlgoED25519},
		CipherOut: []string{"aes128-ctr"}, CipherIn: []string{"aes128-ctr"},
		MACOut: []string{"hmac-sha2-256"}, MACIn: []string{"hmac-sha2-256"},
		CompressOut: []string{"none"}, CompressIn: []string{"none"},
	})
}

// send sends a packet.
func (c *rawClient) send(payload []byte) error { return c.sendFlawed(payload, func([]byte) {}) }

// sendFlawed sends a packet that flaw has changed, just before it goes out.
func (c *rawClient) sendFlawed(payload []byte, flaw func(packet []byte)) error {
	const block = aes.BlockSize
	padding := block - (5+len(payload))%block
	if padding < 4 {
		padding += block
	}
	packet := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)+padding))
	packet = append(append(append(packet, byte(padding)), payload...), make([]byte, padding)...)
	if c.out != nil {
		mac := hmac.New(sha256.New, c.outMAC)
		binary.Write(mac, binary.BigEndian, c.sent)
		mac.Write(packet)
		c.out.XORKeyStream(packet, packet)
		packet = mac.Sum(packet)
	}
	c.sent++
	flaw(packet)
	_, err := c.Write(packet)
	return err
}

// receive returns the payload of the next packet that is a message of this number.
func (c *rawClient) receive(want byte) ([]byte, error) {
	for {
		payload, err := c.receiveAny()
		if err != nil {
			return nil, err
		}
		if payload[0] == want {
			return payload, nil
		}
		if payload[0] == msgDisconnect {
			return nil, fmt.Errorf("disconnected: %q", payload[1:])
		}
	}
}

func (c *rawClient) receiveAny() ([]byte, error) {
	first := make([]byte, aes.BlockSize)
	if c.received == nil {
		first = first[:8]
	}
	if _, err := io.ReadFull(c.in, first); err != nil {
		return nil, err
	}
	if c.received != nil {
		c.received.XORKeyStream(first, first)
	}
	n := int(binary.BigEndian.Uint32(first))
	if n < 2 || n > 1<<20 || 4+n < len(first) {
		return nil, fmt.Errorf("a packet of %d bytes", n)
	}
	rest := make([]byte, 4+n-len(first))
	if _, err := io.ReadFull(c.in, rest); err != nil {
		return nil, err
	}
	if c.received != nil {
		c.received.XORKeyStream(rest, rest)
		if _, err := c.in.Discard(sha256.Size); err != nil {
			return nil, err
		}
	}
	packet := append(first, rest...)
	end := len(packet) - int(packet[4])
	if end <= 5 {
		return nil, errors.New("a packet without a payload")
	}
	return packet[5:end], nil
}

// loginRequest is the body of msgUserauth, without the signature.
type loginRequest struct {
	User, Service, Method string
	Signed                bool
	Algorithm             string
	Key                   []byte
}

// logIn authenticates as user with key.
func (c *rawClient) logIn(user string, key ssh.Signer) error {
	if err := c.send(message(msgServiceRequest, struct{ S string }{"ssh-userauth"})); err != nil {
		return err
	}
	body := message(msgUserauth, loginRequest{
		user, "ssh-connection", "publickey", true, key.PublicKey().Type(), key.PublicKey().Marshal(),
	})
	signature, err := key.Sign(rand.Reader, append(ssh.Marshal(struct{ S []byte }{c.session}), body...))
	if err != nil {
		return err
	}
	if err := c.send(append(body, ssh.Marshal(struct{ S []byte }{ssh.Marshal(signature)})...)); err != nil {
		return err
	}
	_, err = c.receive(msgUserauthOK)
	return err
}

// channelOpen is the body of msgChannelOpen.
type channelOpen struct {
	Type              string
	ID, Window, Limit uint32
}

// globalRequest is the body of msgGlobalRequest.
type globalRequest struct {
	Type  string
	Reply bool
}

// message returns a message: its number and fields as ssh.Marshal has them.
func message(number byte, fields any) []byte { return append([]byte{number}, ssh.Marshal(fields)...) }
