//go:build linux

// Command shed-agent is the first program in every shed's VM. It is put in
// the initramfs by shed-server, and is of no use anywhere else.
package main

import "github.com/charliek/shed/internal/agent/guest"

func main() { guest.Main() }
