package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/charliek/shed"
)

const (
	// connectTimeout is for the server to answer: to be connected with, and between two steps of the login that wait for it alone.
	connectTimeout = 5 * time.Second
	// proxyTimeout is connectTimeout where there is a proxy, which has a login of its own.
	proxyTimeout = 20 * time.Second

	// refusedPause is how long the login isn't tried again with keys that have been refused.
	refusedPause = 30 * time.Second

	keepAlive        = 2 * time.Second // between two requests for a sign of life
	maxMissed        = 3               // how many intervals may pass without any
	keepAliveRequest = "keepalive@openssh.com"
)

// remote is a server that is reached by SSH. Its connections are streams of one SSH connection, which is
// made when it is needed, and anew when it is lost.
type remote struct {
	name, host string
	port       int
	label      string // for messages
	keys       *keyring
	note       func(format string, args ...any) // what -v says
	// check decides about the server's key, before the login.
	check func(key ssh.PublicKey) error
	// prefer are keys whose types the server is to prove itself with, if it can.
	prefer []ssh.PublicKey

	connectTimeout time.Duration

	ctx    context.Context // of all connections
	cancel context.CancelFunc
	parts  sync.WaitGroup

	dialing atomic.Bool // the server hasn't taken the connection yet

	mu   sync.Mutex
	last *link
}

func newRemote(name, label string, server Server, keys *keyring, note func(string, ...any)) *remote {
	r := &remote{
		name: name, label: label, host: server.Host, port: server.sshPort(), keys: keys, note: note,
		connectTimeout: connectTimeout,
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// pinned makes r accept the keys that file has for the server's address, and no other.
func (r *remote) pinned(file, addr string) error {
	keys, err := PinnedKeys(file, addr)
	if err != nil {
		return err
	}
	r.prefer = keys
	r.check = func(key ssh.PublicKey) error { return checkPinned(r.name, r.label, addr, file, keys, key) }
	return nil
}

func checkPinned(name, label, addr, file string, pinned []ssh.PublicKey, key ssh.PublicKey) error {
	if hasKey(pinned, key) {
		return nil
	}
	host, port, _ := net.SplitHostPort(addr)
	again := "shed server add " + host + " --name " + name + " --ssh-port " + port
	if len(pinned) == 0 {
		return shed.Errorf(shed.CodeUnreachable, "%s is not known: no host key is pinned for it", label).
			WithHint("compare its key with `ssh-keygen -lf` on the server, then: shed server remove %s; %s --fingerprint %s",
				name, again, ssh.FingerprintSHA256(key))
	}
	return shed.Errorf(shed.CodeUnreachable, "%s has another host key than the one that is pinned in %s: now %s, before %s. "+
		"Somebody may be in between, or the server was installed anew", label, file, describeKeys([]ssh.PublicKey{key}), describeKeys(pinned)).
		WithHint("if you know that it was installed anew: shed server remove %s; %s --fingerprint %s", name, again, ssh.FingerprintSHA256(key))
}

// close ends all connections, and returns when nothing of them runs any more.
func (r *remote) close() {
	r.cancel()
	r.parts.Wait()
}

// dial connects to the HTTP API. Reading and writing fail when the SSH connection is lost.
func (r *remote) dial(ctx context.Context) (net.Conn, error) {
	for {
		l, isNew := r.link()
		select {
		case <-l.ready:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if l.err != nil {
			return nil, l.err
		}
		conn, err := l.client.DialContext(ctx, "unix", apiSocket)
		if err == nil {
			return &stream{conn, l}, nil
		}
		var refused *ssh.OpenChannelError
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.As(err, &refused) && refused.Reason == ssh.Prohibited:
			return nil, shed.Errorf(shed.CodeUnreachable, "%s refuses: %s", r.label, refused.Message).
				WithHint("use a key whose line of authorized keys on the server has no such options")
		case errors.As(err, &refused):
			return nil, shed.Errorf(shed.CodeUnreachable, "%s has no HTTP API for us: %s", r.label, refused.Message)
		case isNew:
			return nil, r.explain(err, nil)
		}
		r.forget(l) // it had been lost
	}
}

// link returns the SSH connection, which may not be ready yet. isNew says that it was begun now.
func (r *remote) link() (l *link, isNew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != nil && !r.last.lost() {
		return r.last, false
	}
	l = &link{ready: make(chan struct{})}
	r.last = l
	r.parts.Go(func() { r.run(l) })
	return l, true
}

func (r *remote) forget(l *link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == l {
		r.last = nil
	}
}

// link is an SSH connection, or the attempt to make one.
type link struct {
	ready  chan struct{} // closed when the following are set
	client *ssh.Client
	conn   *watchedConn
	err    error
	until  time.Time    // err stands, and no login is tried
	tick   *time.Ticker // each time, a sign of life is asked for

	silent atomic.Bool // it was given up
}

// lost reports whether l is no use any more.
func (l *link) lost() bool {
	select {
	case <-l.ready:
		if l.err != nil {
			return !time.Now().Before(l.until)
		}
		return l.conn.failed.Load()
	default:
		return false
	}
}

// run connects l and returns when it has ended.
func (r *remote) run(l *link) {
	l.client, l.conn, l.err = r.connect(r.ctx)
	if errors.Is(l.err, ErrRefused) {
		l.until = time.Now().Add(refusedPause)
	}
	l.tick = time.NewTicker(keepAlive)
	defer l.tick.Stop()
	close(l.ready)
	if l.err != nil {
		return
	}
	ctx, cancel := context.WithCancel(r.ctx)
	var watching sync.WaitGroup
	watching.Go(func() { r.watch(ctx, l) })
	l.client.Wait()
	cancel()
	watching.Wait()
}

// watch closes the connection when ctx ends, or when the server gives no sign of life. Intervals are counted, and not
// the time: this machine may have slept.
func (r *remote) watch(ctx context.Context, l *link) {
	var asking sync.WaitGroup
	defer asking.Wait()
	defer l.conn.Close() // which asking waits for
	answered := make(chan struct{}, 1)
	waiting, missed, heard := false, 0, l.conn.heard.Load()
	for {
		select {
		case <-ctx.Done():
			return
		case <-answered:
			waiting = false
			continue
		case <-l.tick.C:
		}
		now := l.conn.heard.Load()
		if missed++; now != heard {
			missed, heard = 0, now
		}
		if missed >= maxMissed {
			r.note("%s gave no sign of life for %s", r.label, maxMissed*keepAlive)
			l.silent.Store(true)
			return
		}
		if !waiting {
			waiting = true
			asking.Go(func() {
				l.client.SendRequest(keepAliveRequest, true, nil) // any answer will do
				answered <- struct{}{}
			})
		}
	}
}

// connect makes an SSH connection to the server and logs in. A server doesn't wait for a login for long: one that has ended
// the connection while the user was asked for a passphrase is connected with again.
func (r *remote) connect(ctx context.Context) (*ssh.Client, *watchedConn, error) {
	for {
		unlocked := r.keys.unlocked.Load()
		client, conn, err := r.connectOnce(ctx)
		if err == nil || errors.Is(err, ErrRefused) || ctx.Err() != nil || r.keys.unlocked.Load() == unlocked {
			return client, conn, err
		}
		r.note("%s: connecting again with the key that is unlocked now: %v", r.label, err)
	}
}

func (r *remote) connectOnce(ctx context.Context) (*ssh.Client, *watchedConn, error) {
	start := time.Now()
	s, err := loadSettings(ctx, r.host, r.port)
	if err != nil {
		r.note("%s: the configuration of OpenSSH is not used: %v", r.label, err)
	}
	timeout := r.connectTimeout
	var nc net.Conn
	if s.proxy != nil {
		timeout = max(timeout, proxyTimeout)
		r.note("%s: through %q", r.label, s.proxy)
		nc, err = dialProxy(s.proxy)
	} else {
		r.dialing.Store(true)
		nc, err = (&net.Dialer{Timeout: timeout}).DialContext(ctx, "tcp", net.JoinHostPort(s.hostName, fmt.Sprint(r.port)))
		r.dialing.Store(false)
	}
	if err != nil {
		return nil, nil, r.explain(err, nil)
	}
	conn := &watchedConn{Conn: nc}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	client, a, err := r.login(ctx, conn, s, timeout)
	if !stop() && err == nil {
		client.Close()
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if proxy, ok := nc.(*proxyConn); ok {
			if last := proxy.said.Last(); last != "" {
				err = fmt.Errorf("%w; the proxy said: %s", err, last)
			}
		}
		return nil, nil, r.explain(err, a)
	}
	r.note("%s: logged in after %s", r.label, time.Since(start).Round(time.Millisecond))
	return client, conn, nil
}

// attempt is what is known about a login that may fail.
type attempt struct {
	conn     *watchedConn
	refusal  error // of the server's key
	locked   error // a key that could not be unlocked
	keyGood  bool
	offered  []ssh.PublicKey
	problems []error
}

// login logs in on conn. The server has timeout for each answer; the user has no limit.
func (r *remote) login(ctx context.Context, conn *watchedConn, s settings, timeout time.Duration) (*ssh.Client, *attempt, error) {
	a := &attempt{conn: conn}
	closeAgent := func() {}
	defer func() { closeAgent() }()
	var done atomic.Bool
	more := func() {
		if !done.Load() {
			conn.SetDeadline(time.Now().Add(timeout))
		}
	}
	config := &ssh.ClientConfig{
		User:          apiUser,
		ClientVersion: "SSH-2.0-shed",
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			err := r.check(key)
			if !done.Load() { // later, keys are exchanged anew now and then
				a.refusal, a.keyGood = err, err == nil
				more()
			}
			return err
		},
		HostKeyAlgorithms: algorithms(r.prefer),
		Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() (signers []ssh.Signer, err error) {
			conn.SetDeadline(time.Time{})
			defer more()
			signers, closeAgent, a.problems = r.keys.signers(ctx, s)
			for i, signer := range signers {
				signers[i] = &loginKey{signer, a, func(on bool) {
					if on {
						more()
					} else {
						conn.SetDeadline(time.Time{})
					}
				}}
			}
			return signers, nil
		})},
	}
	more()
	c, channels, requests, err := ssh.NewClientConn(conn, net.JoinHostPort(r.host, fmt.Sprint(r.port)), config)
	done.Store(true)
	if err != nil {
		return nil, a, err
	}
	conn.SetDeadline(time.Time{})
	return ssh.NewClient(c, channels, requests), a, nil
}

// algorithms returns those that a server may prove itself with, those of the keys first. nil is the default.
func algorithms(keys []ssh.PublicKey) []string {
	if len(keys) == 0 {
		return nil
	}
	var first, rest []string
	for _, algorithm := range ssh.SupportedAlgorithms().HostKeys {
		kind := algorithm
		if kind == ssh.KeyAlgoRSASHA256 || kind == ssh.KeyAlgoRSASHA512 {
			kind = ssh.KeyAlgoRSA
		}
		to := &rest
		for _, key := range keys {
			if key.Type() == kind {
				to = &first
			}
		}
		*to = append(*to, algorithm)
	}
	return append(first, rest...)
}

// loginKey is a key that notes that it is offered, and has no limit of time to sign.
type loginKey struct {
	ssh.Signer
	a     *attempt
	limit func(bool)
}

func (k *loginKey) PublicKey() ssh.PublicKey {
	public := k.Signer.PublicKey()
	if !hasKey(k.a.offered, public) {
		k.a.offered = append(k.a.offered, public)
	}
	return public
}

func (k *loginKey) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (sig *ssh.Signature, err error) {
	k.limit(false)
	defer k.limit(true)
	sig, err = sign(k.Signer, rand, data, algorithm)
	k.a.locked = err
	return sig, err
}

// watchedConn knows whether something was read from it, how that began, and whether it works.
type watchedConn struct {
	net.Conn
	heard  atomic.Int64 // bytes
	failed atomic.Bool
	mu     sync.Mutex
	began  []byte
	close  sync.Once
	err    error
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.heard.Add(int64(n))
	c.mu.Lock()
	if room := 64 - len(c.began); room > 0 {
		c.began = append(c.began, b[:min(n, room)]...)
	}
	c.mu.Unlock()
	if err != nil {
		c.failed.Store(true)
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.failed.Store(true)
	c.close.Do(func() { c.err = c.Conn.Close() })
	return c.err
}

// firstLine returns what the other side said first, if that is no greeting of SSH.
func (c *watchedConn) firstLine() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	line, _, _ := strings.Cut(string(c.began), "\n")
	if line = strings.TrimSpace(line); strings.HasPrefix(line, "SSH-") {
		return ""
	}
	return line
}

// stream is a connection to the HTTP API.
type stream struct {
	net.Conn
	l *link
}

// Read tells the end of the SSH connection, for which the stream ends too, from that of the stream.
func (s *stream) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if errors.Is(err, io.EOF) && s.l.conn.failed.Load() {
		err = s.l.lostError()
	}
	return n, err
}

func (s *stream) Write(b []byte) (int, error) {
	n, err := s.Conn.Write(b)
	if err != nil && s.l.conn.failed.Load() {
		err = s.l.lostError()
	}
	return n, err
}

func (s *stream) CloseWrite() error {
	return s.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

func (l *link) lostError() error {
	if l.silent.Load() {
		return errors.New("it gave no sign of life")
	}
	return io.ErrUnexpectedEOF
}
