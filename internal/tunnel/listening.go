package tunnel

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// reachable are the addresses, as /proc/net/tcp and tcp6 have them on little-endian machines, that
// a connection to localhost reaches: any and loopback, by IPv4, IPv6 and IPv4 in IPv6.
var reachable = []string{
	"00000000", "0100007F",
	"00000000000000000000000000000000", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F",
}

// Listening returns the ports, sorted, that localhost answers on, of what /proc/net/tcp and
// /proc/net/tcp6 say. ok is false if it is nothing that these can say.
func Listening(procNet string) (ports []int, ok bool) {
	const listen = "0A" // the kernel's TCP_LISTEN
	found := map[int]bool{}
	for line := range strings.Lines(procNet) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		if f[1] == "local_address" {
			ok = true
			continue
		}
		host, port, _ := strings.Cut(f[1], ":")
		if f[3] != listen || !slices.Contains(reachable, host) {
			continue
		}
		if n, err := strconv.ParseUint(port, 16, 16); err == nil {
			found[int(n)] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), ok
}

// Suggest returns how to forward a port of a shed: by the same number, unless only root may listen on that here.
func Suggest(remote int) Port {
	const unprivileged = 1024
	if remote < unprivileged {
		return Port{Local: remote + 8000, Remote: remote} // 80 is 8080
	}
	return Port{Local: remote, Remote: remote}
}
