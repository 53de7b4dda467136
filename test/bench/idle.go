//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/charliek/shed/internal/proclock"
)

// idle watches what a shed at rest takes: its keeper's and its monitor's share of one
// processor, and their memory without the guest's own.
func (b *bench) idle(watch time.Duration) error {
	pids, err := b.pids("x")
	if err != nil {
		return err
	}
	before, err := cpuTime(pids)
	if err != nil {
		return err
	}
	time.Sleep(watch)
	after, err := cpuTime(pids)
	if err != nil {
		return err
	}
	row("idle shed: share of one CPU, keeper and QEMU", fmt.Sprintf("%.2f %%", 100*(after-before).Seconds()/watch.Seconds()), "over "+watch.String(), "")
	x, err := b.client.Get(context.Background(), "x")
	if err != nil {
		return err
	}
	row("disk of a shed that has started all its services", fmt.Sprintf("%.2f MB", float64(x.DiskUsed)/1e6), "after 256 MB through exec and the other measurements", "4 MB")
	var sum, guest int64
	for _, pid := range pids {
		s, g, err := memory(pid)
		if err != nil {
			return err
		}
		sum, guest = sum+s, guest+g
	}
	row("idle shed: memory of keeper and QEMU", fmt.Sprintf("%d MB", (sum-guest)>>10), fmt.Sprintf("beyond the %d MB that the guest touched", guest>>10), "")
	return nil
}

// pids returns the processes of a shed: QEMU, and the keeper that started it.
func (b *bench) pids(name string) ([]int, error) {
	vmm, err := proclock.Find(filepath.Join(b.state, "sheds", name, "run", "vmm.lock"), 0)
	if err != nil {
		return nil, err
	}
	stat, err := statFields(vmm.PID())
	if err != nil {
		return nil, err
	}
	keeper, err := strconv.Atoi(stat[1])
	return []int{vmm.PID(), keeper}, err
}

// statFields are the fields of proc(5)'s stat after the command's name: state first.
func statFields(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:])), nil
}

func cpuTime(pids []int) (time.Duration, error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	var sum time.Duration
	for _, pid := range pids {
		f, err := statFields(pid)
		if err != nil {
			return 0, err
		}
		for _, field := range f[11:13] {
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, err
			}
			sum += time.Duration(n) * tick
		}
	}
	return sum, nil
}

// memory returns a process's resident memory in KiB, and how much of it is a guest's: the
// mapping that has the size of the machine's memory.
func memory(pid int) (sum, guest int64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var size int64
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		key, value, _ := strings.Cut(sc.Text(), ":")
		n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch key {
		case "Size":
			size = n
		case "Pss":
			sum += n
			if size == memoryMB<<10 {
				guest += n
			}
		}
	}
	return sum, guest, sc.Err()
}
