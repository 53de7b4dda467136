//go:build linux

// Command bench measures what a shed costs against what it can't cost less than: the same
// machine monitor and kernel with nothing of ours in it. It drives the real programs in
// bin/ and prints a table in Markdown.
package main

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/kernel"
	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/qemu"
)

// presets are the images that a server builds; sheds have the first by default.
var presets = []string{"base", "extensions", "full"}

// The machine shape of all measurements.
const (
	cpus     = 2
	memoryMB = 1024
)

func main() {
	runs := flag.Int("n", 10, "runs of each measurement")
	bin := flag.String("bin", "bin", "directory of the programs")
	idle := flag.Duration("idle", time.Minute, "how long an idle shed is watched")
	state := flag.String("cache", "", "state directory to copy images and kernel from, so as not to make them")
	image := flag.String("image", "base", "`image` to pull and convert; a preset that isn't there is built first")
	flag.Parse()
	b, err := newBench(*bin, *runs, *state, *image)
	if err == nil {
		err = b.run(*idle)
		b.close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	*server
	dir   string
	runs  int
	image string   // that is pulled and converted
	left  []string // what could not be measured, and why
}

// newBench starts a server of its own, with the image made that sheds have by default, and the one to pull.
func newBench(bin string, runs int, cache, image string) (*bench, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "shed-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{dir: dir, runs: runs, image: image}
	if err := b.prepare(bin, cache); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *bench) prepare(bin, cache string) error {
	if cache != "" {
		state := filepath.Join(b.dir, "state")
		if err := os.Mkdir(state, 0o700); err != nil {
			return err
		}
		for _, d := range []string{"images", "layers", "kernels"} {
			if out, err := exec.Command("cp", "-a", "--reflink=auto", filepath.Join(cache, d), state).CombinedOutput(); err != nil {
				return fmt.Errorf("copying the cache: %w: %s", err, out)
			}
		}
	}
	home, err := newHome(filepath.Join(b.dir, "home"))
	if err != nil {
		return err
	}
	if b.server, err = startServer(bin, b.dir, home); err != nil {
		return err
	}
	// Each is built upon those before it, which so cost next to nothing.
	names := presets[:slices.Index(presets, b.image)+1]
	if len(names) == 0 {
		names = []string{presets[0], b.image}
	}
	for _, name := range names {
		_, err := b.client.InspectImage(context.Background(), name)
		switch {
		case err == nil:
		case shed.ErrorCode(err) == shed.CodeNoImage && slices.Contains(presets, name):
			if _, err := b.shed("image", "build", name); err != nil {
				return err
			}
		default:
			return err
		}
	}
	return nil
}

func (b *bench) close() {
	if b.server != nil {
		b.server.close()
	}
	os.RemoveAll(b.dir)
}

// median measures n times.
func (b *bench) median(f func() (time.Duration, error)) (time.Duration, error) {
	ds := make([]time.Duration, 0, b.runs)
	for range b.runs {
		d, err := f()
		if err != nil {
			return 0, err
		}
		ds = append(ds, d)
	}
	return mid(ds), nil
}

func mid[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

func (b *bench) run(idle time.Duration) error {
	fmt.Printf("medians of %d, %d CPU, %d MB\n\n| what | measured | beside it | limit |\n| --- | --- | --- | --- |\n", b.runs, cpus, memoryMB)
	for _, f := range []func() error{
		b.create, b.exec, b.throughput, func() error { return b.idle(idle) }, b.connect, b.lists,
		// What comes now needs the memory, and neither sheds nor their kernel.
		func() error { return b.client.Delete(context.Background(), "x", nil) },
		b.pulls, b.conversion, b.disk,
	} {
		if err := f(); err != nil {
			return err
		}
	}
	for _, l := range b.left {
		fmt.Printf("\nNOT MEASURED: %s\n", l)
	}
	return nil
}

// leaveOut says what is not measured and why, at once and after the table.
func (b *bench) leaveOut(format string, args ...any) {
	l := fmt.Sprintf(format, args...)
	fmt.Fprintln(os.Stderr, "bench: NOT MEASURED:", l)
	b.left = append(b.left, l)
}

func row(what, measured, beside, limit string) {
	fmt.Printf("| %s | %s | %s | %s |\n", what, measured, beside, limit)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d.Microseconds())/1000) }

// create measures a new shed's time to its first output, in turn with the floor.
func (b *bench) create() error {
	floor, err := b.newFloor()
	if err != nil {
		return err
	}
	var floors, totals, creates, firsts []time.Duration
	phases := map[string][]time.Duration{}
	var used []int64
	for i := range b.runs {
		d, err := floor.boot()
		if err != nil {
			return err
		}
		floors = append(floors, d)
		name := fmt.Sprintf("c%d", i)
		d, err = b.shed("create", name, "--cpus", fmt.Sprint(cpus), "--memory", fmt.Sprint(memoryMB))
		if err != nil {
			return err
		}
		creates = append(creates, d)
		s, err := b.client.Get(context.Background(), name)
		if err != nil {
			return err
		}
		used = append(used, s.DiskUsed)
		before := time.Now()
		if _, err := b.shed("exec", name, "--", "echo", "hello"); err != nil {
			return err
		}
		first := time.Since(before)
		firsts = append(firsts, first)
		totals = append(totals, d+first)
		if err := b.client.Delete(context.Background(), name, nil); err != nil {
			return err
		}
		// The phases are seen by a client of the API: the CLI prints them for people.
		_, err = b.client.Create(context.Background(), shed.CreateOptions{Name: name, CPUs: cpus, MemoryMB: memoryMB}, func(e shed.Event) {
			if e.Done {
				phases[e.Phase] = append(phases[e.Phase], e.Elapsed)
			}
		})
		if err != nil {
			return err
		}
		if err := b.client.Delete(context.Background(), name, nil); err != nil {
			return err
		}
	}
	f := mid(floors)
	limit := f*3/2 + 300*time.Millisecond
	row("floor: QEMU's start to a line of a bare init", ms(f), "", "")
	row("`shed create` and first output of `shed exec`", ms(mid(totals)), fmt.Sprintf("%.2f × floor", float64(mid(totals))/float64(f)), "1.5 × floor + 300 ms = "+ms(limit))
	row("… of it `shed create`", ms(mid(creates)), "", "")
	row("… of it the first `shed exec`", ms(mid(firsts)), "", "")
	for _, p := range []string{"disk", "boot"} {
		row("phase "+p, ms(mid(phases[p])), "", "")
	}
	row("disk that a new shed costs, just created", fmt.Sprintf("%.2f MB", float64(mid(used))/1e6), "", "4 MB")
	return nil
}

// exec measures a command in a running shed against a fork and exec inside it.
func (b *bench) exec() error {
	if _, err := b.shed("create", "x", "--cpus", fmt.Sprint(cpus), "--memory", fmt.Sprint(memoryMB)); err != nil {
		return err
	}
	// Only a guest at rest can be compared.
	if _, err := b.shed("exec", "x", "--", "sh", "-c", "until systemctl is-system-running >/dev/null; do sleep 1; done; sleep 5"); err != nil {
		return err
	}
	d, err := b.median(func() (time.Duration, error) { return b.shed("exec", "x", "--", "true") })
	if err != nil {
		return err
	}
	const loops = 200
	inside, err := b.median(func() (time.Duration, error) {
		out, _, err := b.output(nil, "exec", "x", "--", "bash", "-c",
			fmt.Sprintf("s=$EPOCHREALTIME; for ((i=0;i<%d;i++)); do /bin/true; done; e=$EPOCHREALTIME; echo $(( (${e/./} - ${s/./}) * 1000 / %d ))", loops, loops))
		if err != nil {
			return 0, err
		}
		var ns int64
		_, err = fmt.Sscan(out, &ns)
		return time.Duration(ns), err
	})
	if err != nil {
		return err
	}
	row("`shed exec x -- true`, whole process", ms(d), "fork and exec inside: "+ms(inside), "60 ms more: "+ms(inside+60*time.Millisecond))
	return nil
}

const total = 256 << 20

func rate(n int64, d time.Duration) string {
	return fmt.Sprintf("%.0f MB/s", float64(n)/1e6/d.Seconds())
}

// throughput moves 256 MB through exec and over the bare port.
func (b *bench) throughput() error {
	const file = "/dev/shm/zeros"
	if _, err := b.shed("exec", "x", "--", "sh", "-c", fmt.Sprintf("head -c %d /dev/zero > %s", total, file)); err != nil {
		return err
	}
	out, err := b.median(func() (time.Duration, error) {
		cmd := b.command("exec", "x", "--", "cat", file)
		start := time.Now()
		err := cmd.Run() // its output goes to /dev/null
		return time.Since(start), err
	})
	if err != nil {
		return err
	}
	in, err := b.median(func() (time.Duration, error) {
		_, d, err := b.output(io.LimitReader(zeros{}, total), "exec", "-i", "x", "--", "sh", "-c", "exec cat > /dev/null")
		return d, err
	})
	if err != nil {
		return err
	}
	f, err := b.newFloor()
	if err != nil {
		return err
	}
	bareOut, bareIn, err := f.port(b)
	if err != nil {
		return err
	}
	row("`shed exec x -- cat`, 256 MB from the shed", rate(total, out), "bare virtio-serial port: "+rate(total, bareOut), "")
	row("`shed exec x -- cat`, 256 MB to the shed", rate(total, in), "bare virtio-serial port: "+rate(total, bareIn), "")
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// floor is the same monitor, kernel and shape with an init that does nothing.
type floor struct {
	driver *qemu.Driver
	dir    string
	spec   vm.Spec
	bundle *kernel.Bundle
	n      int
}

func (b *bench) newFloor() (*floor, error) {
	store, err := kernel.Open(filepath.Join(b.state, "kernels"))
	if err != nil {
		return nil, err
	}
	bundle, err := store.Default(context.Background(), nil)
	if err != nil {
		return nil, err
	}
	binary, err := qemu.FindBinary()
	if err != nil {
		return nil, err
	}
	accel, _, err := qemu.DetectAccel(context.Background(), binary, filepath.Join(b.dir, "kvm.json"))
	if err != nil {
		return nil, err
	}
	f := &floor{driver: &qemu.Driver{Accel: accel}, dir: b.dir, bundle: bundle}
	f.spec = vm.Spec{CPUs: cpus, MemoryMB: memoryMB, Kernel: bundle.Kernel(), Initrd: filepath.Join(b.dir, "floor.cpio")}
	return f, writeInitramfs(f.spec.Initrd, tinyInit())
}

func (f *floor) start() (vm.Machine, time.Time, error) {
	f.n++
	dir := filepath.Join(f.dir, fmt.Sprintf("floor%d", f.n))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, time.Time{}, err
	}
	f.spec.Console = filepath.Join(dir, "console.log")
	start := time.Now()
	m, err := f.driver.Start(context.Background(), dir, f.spec)
	return m, start, err
}

// bootRetry is when a boot that hangs, as some do under emulation, is tried again.
const bootRetry = time.Minute

func (f *floor) boot() (time.Duration, error) {
	for {
		m, start, err := f.start()
		if err != nil {
			return 0, err
		}
		for time.Since(start) < bootRetry {
			if text, _ := os.ReadFile(f.spec.Console); bytes.Contains(text, []byte(tinyLine)) {
				d := time.Since(start)
				return d, m.Kill()
			}
			time.Sleep(time.Millisecond)
		}
		if err := m.Kill(); err != nil {
			return 0, err
		}
	}
}

// port measures the bare port, from and to the guest.
func (f *floor) port(b *bench) (out, in time.Duration, err error) {
	guest := filepath.Join(f.dir, "guest")
	build := exec.Command("go", "build", "-o", guest, "./test/bench/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("building the bare guest: %w: %s", err, text)
	}
	if f.spec.Initrd, err = f.bundle.Initramfs(context.Background(), guest); err != nil {
		return 0, 0, err
	}
	m, _, err := f.start()
	if err != nil {
		return 0, 0, err
	}
	defer m.Kill()
	conn, err := m.DialLink(context.Background())
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	send := func() (time.Duration, error) {
		start := time.Now()
		if _, err := conn.Write([]byte{'s'}); err != nil {
			return 0, err
		}
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(conn, total), make([]byte, 64<<10))
		return time.Since(start), err
	}
	if _, err := send(); err != nil { // waits for the boot
		text, _ := os.ReadFile(f.spec.Console)
		return 0, 0, fmt.Errorf("the bare guest: %w\n%s", err, text)
	}
	if out, err = b.median(send); err != nil {
		return 0, 0, err
	}
	in, err = b.median(func() (time.Duration, error) {
		start := time.Now()
		if _, err := conn.Write([]byte{'r'}); err != nil {
			return 0, err
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, io.LimitReader(zeros{}, total), make([]byte, 64<<10)); err != nil {
			return 0, err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return time.Since(start), err
	})
	return out, in, err
}
