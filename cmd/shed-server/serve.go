//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/charliek/shed/internal/engine"
	"github.com/charliek/shed/internal/image"
	"github.com/charliek/shed/internal/keeper"
	"github.com/charliek/shed/internal/kernel"
	"github.com/charliek/shed/internal/rootfs"
	"github.com/charliek/shed/internal/sshd"
	"github.com/charliek/shed/internal/state"
	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/qemu"
)

// A machine under emulation shares its processors with everything else on the host.
const (
	bootTimeoutKVM = 30 * time.Second
	bootTimeoutTCG = 90 * time.Second
)

// serve runs the server until ctx is done. Sheds run on.
func serve(ctx context.Context, cfg config) (err error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	// Of two servers that are started at once, the one that has the lock may replace the socket.
	dir, err := state.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	// Listening comes before all that takes time: whoever connects early waits for an answer.
	listeners, err := listen(cfg)
	if err != nil {
		return err
	}
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	images, err := openImages(cfg, dir)
	if err != nil {
		return err
	}
	defer images.Close()
	e, info, err := newEngine(ctx, cfg, dir, images, log)
	if err != nil {
		return err
	}
	defer e.Close()
	hostKey, err := sshd.LoadOrCreateHostKey(dir.Path(hostKeyFile))
	if err != nil {
		return err
	}
	keys := authorizedKeys(cfg)
	if n, problems := keys.Usable(); n == 0 {
		if len(problems) == 0 {
			problems = []string{"there is none"}
		}
		log.Warn("nobody can log in by SSH: no key is authorized", "why", strings.Join(problems, "; "), "hint", authorizeHint)
	}
	sshServer := sshd.New(sshd.Config{
		Sheds: e, HostKey: hostKey, AuthorizedKeys: keys, Log: log,
		API: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", cfg.Socket)
		},
	})
	info.SSH = listeners[2].Addr().String()
	fingerprint := ssh.FingerprintSHA256(hostKey.PublicKey())
	handler := api.NewServer(api.Config{
		Sheds: e, Images: e, Info: info, Log: log,
		HostKey: shed.HostKey{Key: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(hostKey.PublicKey()))), Fingerprint: fingerprint},
	})
	switch {
	case cfg.httpAddress() != cfg.BindAddress:
		log.Info("the HTTP API is on loopback only, where SSH is needed to get from elsewhere", "bind_address", cfg.BindAddress, "http", listeners[1].Addr())
	case !net.ParseIP(cfg.BindAddress).IsLoopback():
		log.Warn("the HTTP API is open to everybody who reaches this address", "address", listeners[1].Addr())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return api.Serve(ctx, listeners[0], handler, log) })
	g.Go(func() error { return api.Serve(ctx, listeners[1], handler, log) })
	g.Go(func() error { return sshServer.Serve(ctx, listeners[2]) })
	log.Info("serving", "socket", cfg.Socket, "http", listeners[1].Addr(), "ssh", listeners[2].Addr(), "host_key", fingerprint,
		"state", cfg.StateDir, "backend", info.Backend, "accel", info.Accel)
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	log.Info("ended; sheds run on")
	return nil
}

// hostKeyFile is in the state directory.
const hostKeyFile = "ssh_host_ed25519_key"

func authorizedKeys(cfg config) sshd.AuthorizedKeys {
	keys := sshd.AuthorizedKeys{Lines: cfg.Auth.AuthorizedKeys, Files: []string{expandHome("~/.ssh/authorized_keys")}}
	if cfg.Auth.AuthorizedKeysFile != "" {
		keys.Files = append(keys.Files, cfg.Auth.AuthorizedKeysFile)
	}
	return keys
}

// authorizeHint is for who wants to use SSH.
const authorizeHint = "add a public key to ~/.ssh/authorized_keys, or to auth.authorized_keys in the configuration"

// listen opens the Unix socket and the HTTP and SSH ports, in this order.
func listen(cfg config) (listeners []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
		}
	}()
	l, err := listenUnix(cfg.Socket)
	if err != nil {
		return nil, err
	}
	listeners = append(listeners, l)
	for _, p := range []struct {
		key, address string
		port         int
	}{{"http_port", cfg.httpAddress(), cfg.HTTPPort}, {"ssh_port", cfg.BindAddress, cfg.SSHPort}} {
		addr := net.JoinHostPort(p.address, fmt.Sprint(p.port))
		l, err := net.Listen("tcp", addr)
		if errors.Is(err, unix.EADDRINUSE) {
			return listeners, shed.Errorf(shed.CodeConflict, "%s: something else listens on %s", p.key, addr).
				WithHint("`ss -ltnp` shows what; stop it, or set %s to another port", p.key)
		}
		if err != nil {
			return listeners, fmt.Errorf("%s: %w", p.key, err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// listenUnix listens on a socket that only this user can connect to, and replaces one
// that a server left behind.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, shed.Errorf(shed.CodeConflict, "another shed-server listens on %s", path).
			WithHint("stop it first, or set socket to another path")
	} else if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(path)
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// newEngine wires the engine to what is on this machine.
func newEngine(ctx context.Context, cfg config, dir *state.Dir, images *image.Store, log *slog.Logger) (*engine.Engine, shed.Info, error) {
	var info shed.Info
	kernels, err := kernel.Open(dir.Path("kernels"))
	if err != nil {
		return nil, info, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, info, err
	}
	agent, err := findAgent(program)
	if err != nil {
		return nil, info, err
	}
	binary, err := qemu.FindBinary()
	if err != nil {
		return nil, info, err
	}
	accel, reason, err := qemu.DetectAccel(ctx, binary, dir.Path("kvm.json"))
	if ctx.Err() != nil {
		return nil, info, ctx.Err()
	}
	if err != nil {
		log.Warn("whether KVM works is found out again at the next start", "err", err)
	}
	timeout := bootTimeoutKVM
	if accel == qemu.TCG {
		timeout = bootTimeoutTCG
		log.Warn("sheds run in software emulation, which is slow", "why", firstLine(reason))
	}
	info = shed.Info{
		Name: cfg.Name, Version: version, Backend: "qemu", Backends: []string{"qemu"},
		Accel: string(accel), StateDir: cfg.StateDir,
	}
	backend := cfg.QEMU.backend()
	backend.Driver, backend.Accel, backend.BootTimeout = &qemu.Driver{Accel: accel}, string(accel), timeout
	e, err := engine.New(ctx, engine.Config{
		State: dir, Images: images, Kernels: kernels,
		Backends:       map[string]engine.Backend{"qemu": backend},
		DefaultBackend: "qemu", Program: program, AgentBinary: agent, ServerName: cfg.Name, Version: version,
		EnvFile: cfg.EnvFile, AllowHostPorts: cfg.Network.AllowHostPorts, Log: log,
	})
	return e, info, err
}

func openImages(cfg config, dir *state.Dir) (*image.Store, error) {
	layers, err := rootfs.OpenLayers(dir.Path("layers"))
	if err != nil {
		return nil, err
	}
	return image.Open(cfg.QEMU.ImagesDir, layers)
}

// findAgent returns the agent for the guest, which is installed beside the server or below
// its prefix.
func findAgent(program string) (string, error) {
	name := "shed-agent-linux-" + runtime.GOARCH
	bin := filepath.Dir(program)
	for _, dir := range []string{bin, filepath.Join(bin, "..", "lib", "shed")} {
		if file := filepath.Join(dir, name); fileExists(file) {
			return filepath.Abs(file)
		}
	}
	return "", shed.Errorf(shed.CodeInvalid, "%s is neither beside shed-server, in %s, nor in ../lib/shed", name, bin).
		WithHint("`make build` puts it there")
}

func fileExists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// keep is the process of one shed, which it shuts down when ctx is done.
func keep(ctx context.Context, dir string) error {
	// This is sent too where it is a login session that ends.
	ctx, stop := signal.NotifyContext(ctx, unix.SIGHUP)
	defer stop()
	return keeper.Run(ctx, dir, func(cfg keeper.Config) (vm.Driver, error) {
		if cfg.Driver != "qemu" {
			return nil, fmt.Errorf("there is no driver %q", cfg.Driver)
		}
		return &qemu.Driver{Accel: qemu.Accel(cfg.Accel)}, nil
	})
}
