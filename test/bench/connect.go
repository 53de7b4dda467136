//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/creack/pty"
)

// peer is OpenSSH's server in the shed x, reached over a tunnel, beside which what connects to a shed is measured.
const peer = "openssh"

// connect measures connections to the shed x, in turn with OpenSSH's.
func (b *bench) connect() error {
	conf, err := b.startPeer()
	if err != nil {
		return err
	}
	ours, theirs := []string{"-F", conf, "shed-x"}, []string{"-F", conf, peer}
	for _, f := range []func(ours, theirs []string) error{b.sshTrue, b.keystrokes, b.scp, b.rsync} {
		if err := f(ours, theirs); err != nil {
			return err
		}
	}
	_, err = b.shed("tunnels", "stop", "x")
	return err
}

// peerPackages are OpenSSH's server, and what it needs that the image may not have.
var peerPackages = []string{"openssh-server", "openssh-sftp-server", "libwrap0", "libnsl2", "libtirpc3", "libtirpc-common", "ucf", "runit-helper"}

// startPeer starts OpenSSH's server in the shed and a tunnel to it. It returns an ssh_config(5) file that knows the
// shed as shed-x, and OpenSSH in it as peer.
func (b *bench) startPeer() (conf string, err error) {
	dir := filepath.Join(b.dir, "debs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	download := exec.Command("apt-get", append([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, peerPackages...)...)
	download.Dir = dir
	if _, _, err := timed(download); err != nil {
		return "", err
	}
	tar, _, err := timed(exec.Command("tar", "-C", dir, "-c", "."))
	if err != nil {
		return "", err
	}
	key, err := os.ReadFile(filepath.Join(b.home, ".ssh", "id_ed25519.pub"))
	if err != nil {
		return "", err
	}
	// Its packages want to be configured in ways that don't matter here.
	script := `set -e; mkdir /tmp/debs; cd /tmp/debs; tar x
sudo dpkg --force-depends --unpack *.deb >/dev/null 2>&1
id sshd >/dev/null 2>&1 || sudo useradd -r -d /run/sshd -s /usr/sbin/nologin sshd
sudo usermod -p '*' shed # a locked user may not log in without PAM
sudo mkdir -p /run/sshd; sudo ssh-keygen -A >/dev/null
mkdir -p -m 700 ~/.ssh; echo "$1" > ~/.ssh/authorized_keys
sudo /usr/sbin/sshd -f /dev/null -o 'Subsystem sftp internal-sftp' -o UsePAM=no -o UseDNS=no -o MaxStartups=100 -o StrictModes=no -p 22 </dev/null`
	if _, _, err := b.output(strings.NewReader(tar), "exec", "-i", "x", "--", "sh", "-c", script, "sh", strings.TrimSpace(string(key))); err != nil {
		return "", err
	}
	said, _, err := b.output(nil, "tunnels", "start", "x", "-d", "-t", "0:22")
	if err != nil {
		return "", err
	}
	var port int
	if _, err := fmt.Sscanf(said, "localhost:%d ", &port); err != nil {
		return "", fmt.Errorf("the tunnel's port in %q: %w", said, err)
	}
	hosts, _, err := b.output(nil, "ssh-config", "x")
	if err != nil {
		return "", err
	}
	conf = filepath.Join(b.dir, "ssh_config")
	text := fmt.Sprintf("Host %s\n  HostName 127.0.0.1\n  Port %d\n  User shed\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n\n%s\nHost *\n  IdentityFile %s\n  IdentitiesOnly yes\n  BatchMode yes\n",
		peer, port, hosts, filepath.Join(b.home, ".ssh", "id_ed25519"))
	return conf, os.WriteFile(conf, []byte(text), 0o600)
}

// inTurn measures ours and theirs, runs times each, and returns the medians.
func inTurn(runs int, ours, theirs func() (time.Duration, error)) (our, their time.Duration, err error) {
	var durations [2][]time.Duration
	for range runs {
		for i, f := range []func() (time.Duration, error){ours, theirs} {
			d, err := f()
			if err != nil {
				return 0, 0, err
			}
			durations[i] = append(durations[i], d)
		}
	}
	return mid(durations[0]), mid(durations[1]), nil
}

// compare measures ours and theirs in turn, and prints a row of the medians as show has them.
func compare(what string, runs int, ours, theirs func() (time.Duration, error), show func(time.Duration) string) error {
	our, their, err := inTurn(runs, ours, theirs)
	if err != nil {
		return err
	}
	row(what, show(our), "OpenSSH in the shed, over a tunnel: "+show(their), "")
	return nil
}

func process(name string, args ...string) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		_, d, err := timed(exec.Command(name, args...))
		return d, err
	}
}

func (b *bench) sshTrue(ours, theirs []string) error {
	return compare("`ssh shed-x true`, whole process", b.runs, process("ssh", append(ours, "true")...), process("ssh", append(theirs, "true")...), ms)
}

func (b *bench) scp(ours, theirs []string) error {
	file := filepath.Join(b.dir, "zeros")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(file, total); err != nil {
		return err
	}
	defer os.Remove(file)
	const there = "/dev/shm/scp"
	runs := min(b.runs, slowRuns)
	to := func(host []string) func() (time.Duration, error) {
		return process("scp", append(slices.Clone(host[:2]), "-q", file, host[2]+":"+there)...)
	}
	from := func(host []string) func() (time.Duration, error) {
		return process("scp", append(slices.Clone(host[:2]), "-q", host[2]+":"+there, file)...)
	}
	for _, way := range []struct {
		name string
		f    func([]string) func() (time.Duration, error)
	}{{"to", to}, {"from", from}} {
		what := fmt.Sprintf("`scp`, 256 MB %s the shed; medians of %d", way.name, runs)
		if err := compare(what, runs, way.f(ours), way.f(theirs), func(d time.Duration) string { return rate(total, d) }); err != nil {
			return err
		}
	}
	_, err := b.shed("exec", "x", "--", "rm", there)
	return err
}

// rsync sends many small files to an empty directory.
func (b *bench) rsync(ours, theirs []string) error {
	const files = 10_000
	dir := filepath.Join(b.dir, "small")
	for i := range files {
		file := filepath.Join(dir, fmt.Sprint(i%100), fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, bytes.Repeat([]byte{byte(i)}, 100+i%4000), 0o644); err != nil {
			return err
		}
	}
	defer os.RemoveAll(dir)
	send := func(host []string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			if _, err := b.shed("exec", "x", "--", "rm", "-rf", "/tmp/small"); err != nil {
				return 0, err
			}
			return process("rsync", "-a", "-e", "ssh -F "+host[1], dir+"/", host[2]+":/tmp/small/")()
		}
	}
	runs := min(b.runs, slowRuns)
	return compare(fmt.Sprintf("`rsync` of %d small files to the shed; medians of %d", files, runs), runs, send(ours), send(theirs), ms)
}

// keystrokes measures from a key to its echo on the terminal, with tmux in between on both sides.
func (b *bench) keystrokes(_, theirs []string) error {
	our, err := openTerminal(b.command("attach", "x", "-S", "ours"))
	if err != nil {
		return err
	}
	defer our.close()
	their, err := openTerminal(exec.Command("ssh", append(append([]string{"-tt"}, theirs...), "tmux new-session -A -s theirs")...))
	if err != nil {
		return err
	}
	defer their.close()
	var ours, others []time.Duration
	for i := range 40 * b.runs {
		for t, ds := range map[*terminal]*[]time.Duration{our: &ours, their: &others} {
			d, err := t.echo(i)
			if err != nil {
				return err
			}
			*ds = append(*ds, d)
		}
	}
	p99 := func(ds []time.Duration) time.Duration { slices.Sort(ds); return ds[len(ds)*99/100] }
	row(fmt.Sprintf("key to echo through `shed attach`, %d keys", len(ours)),
		fmt.Sprintf("p50 %s, p99 %s", ms1(mid(ours)), ms1(p99(ours))),
		fmt.Sprintf("`ssh` to OpenSSH in the shed, over a tunnel, with tmux too: p50 %s, p99 %s", ms1(mid(others)), ms1(p99(others))), "")
	return nil
}

func ms1(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// terminal is a program with a terminal, in which `cat` reads what is typed.
type terminal struct {
	cmd    *exec.Cmd
	pty    *os.File
	output chan []byte
}

// quiet is how long a terminal says nothing when it has said all.
const quiet = 300 * time.Millisecond

func openTerminal(cmd *exec.Cmd) (*terminal, error) {
	cmd.Env = append(cmd.Environ(), "TERM=xterm-256color")
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		return nil, err
	}
	t := &terminal{cmd: cmd, pty: f, output: make(chan []byte, 1024)}
	go func() {
		defer close(t.output)
		for {
			buf := make([]byte, 4096)
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			t.output <- buf[:n]
		}
	}()
	// A shell's prompt comes a while after the screen is cleared for it.
	err = t.await("$")
	if err == nil {
		t.settle()
		_, err = t.pty.WriteString("cat >/dev/null\r")
	}
	if err != nil {
		t.close()
		return nil, fmt.Errorf("%s: %w", cmd, err)
	}
	t.settle()
	return t, nil
}

// await reads until the terminal shows text.
func (t *terminal) await(text string) error {
	var all []byte
	timeout := time.After(time.Minute)
	for {
		select {
		case b, ok := <-t.output:
			if !ok {
				return fmt.Errorf("it has ended: %q", all)
			}
			if all = append(all, b...); bytes.Contains(all, []byte(text)) {
				return nil
			}
		case <-timeout:
			return fmt.Errorf("no %q within a minute: %q", text, all)
		}
	}
}

// settle reads until nothing comes any more.
func (t *terminal) settle() {
	for {
		select {
		case _, ok := <-t.output:
			if !ok {
				return
			}
		case <-time.After(quiet):
			return
		}
	}
}

// echo types the i-th key and returns how long its echo took.
func (t *terminal) echo(i int) (time.Duration, error) {
	if i%60 == 59 { // before the line is full
		if _, err := t.pty.WriteString("\r"); err != nil {
			return 0, err
		}
		t.settle()
	}
	key := string(rune('a' + i%26))
	start := time.Now()
	if _, err := t.pty.WriteString(key); err != nil {
		return 0, err
	}
	if err := t.await(key); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

func (t *terminal) close() {
	t.pty.Close()
	t.cmd.Process.Kill()
	t.cmd.Wait()
}

// servers are how many there are beside the bench's own, in the comparison of lists.
const servers = 9

// lists measures a list of ten servers' sheds, nine of them reached by SSH and one of these dead, beside that of one.
func (b *bench) lists() error {
	for i := range servers {
		name := fmt.Sprintf("s%d", i)
		dir := filepath.Join(b.dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		s, err := startServer(b.bin, dir, b.home)
		if err != nil {
			return err
		}
		err = b.add(name, s)
		if i == 0 {
			s.close()
		} else {
			defer s.close()
		}
		if err != nil {
			return err
		}
	}
	one := func() (time.Duration, error) { return b.shed("list", "-s", "bench") }
	overSSH := func() (time.Duration, error) { return b.shed("list", "-s", "s1") }
	all := func() (time.Duration, error) { return b.shed("list", "--all") }
	allTime, oneTime, err := inTurn(b.runs, all, one)
	if err != nil {
		return err
	}
	sshTime, err := b.median(overSSH)
	if err != nil {
		return err
	}
	row("`shed list --all` of 10 servers: one local, 9 by SSH, one of these dead", ms(allTime),
		fmt.Sprintf("`shed list` of the local one: %s; of one by SSH: %s", ms(oneTime), ms(sshTime)), "")
	return nil
}

// add makes a server, reached by SSH, one of those that the CLI knows.
func (b *bench) add(name string, s *server) error {
	info, err := s.client.Info(context.Background())
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(info.SSH)
	if err != nil {
		return err
	}
	_, err = b.shed("server", "add", host, "--name", name, "--ssh-port", port)
	return err
}
