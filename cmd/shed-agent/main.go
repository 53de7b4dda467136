//go:build linux

// By default Go's runtime keeps a file of its cgroup open, and at shutdown the root file system
// could not be unmounted for that.
//go:debug containermaxprocs=0

// Command shed-agent is the first program in every shed's VM. It is put in
// the initramfs by shed-server, and is of no use anywhere else.
package main

import "github.com/charliek/shed/internal/agent/guest"

func main() { guest.Main() }
