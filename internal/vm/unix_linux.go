package vm

import (
	"context"
	"fmt"
	"net"
	"os"
)

// DialUnix connects to the socket called name in dir. The path may be longer than
// the 107 bytes that fit an address: it is reached through a descriptor of dir.
func DialUnix(ctx context.Context, dir, name string) (net.Conn, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), name))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s in %s: %w", name, dir, err)
	}
	return conn, nil
}
