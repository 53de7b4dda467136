//go:build linux

// Command init is the first and only program in the machines that vmtest boots.
package main

import "github.com/charliek/shed/internal/vm/vmtest/guest"

func main() { guest.Main() }
