//go:build linux

package guest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/charliek/shed/internal/agent"
)

// setupNetwork brings up the loopback and the machine's only interface, by the
// ioctls of netdevice(7): a netlink library would double what they need.
func setupNetwork(cfg agent.Network) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := setUp(fd, "lo"); err != nil {
		return fmt.Errorf("bringing up lo: %w", err)
	}
	if cfg.Address == "" {
		return nil
	}
	prefix, err := netip.ParsePrefix(cfg.Address)
	if err != nil {
		return err
	}
	gateway, err := netip.ParseAddr(cfg.Gateway)
	if err != nil {
		return err
	}
	name, err := waitForInterface()
	if err != nil {
		return err
	}
	steps := []struct {
		what string
		do   func() error
	}{
		{"address", func() error { return ioctlAddr(fd, name, unix.SIOCSIFADDR, prefix.Addr()) }},
		{"netmask", func() error {
			mask := net.CIDRMask(prefix.Bits(), 32)
			return ioctlAddr(fd, name, unix.SIOCSIFNETMASK, netip.AddrFrom4([4]byte(mask)))
		}},
		{"MTU", func() error {
			ifr, err := unix.NewIfreq(name)
			if err != nil {
				return err
			}
			ifr.SetUint32(uint32(cfg.MTU))
			return unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr)
		}},
		{"state", func() error { return setUp(fd, name) }},
		{"default route", func() error { return addDefaultRoute(fd, gateway) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("setting the %s of %s: %w", s.what, name, err)
		}
	}
	return nil
}

// waitForInterface returns the first interface that is backed by a device.
func waitForInterface() (string, error) {
	for deadline := time.Now().Add(deviceTimeout); time.Now().Before(deadline); time.Sleep(devicePoll) {
		entries, err := os.ReadDir("/sys/class/net")
		if err != nil {
			return "", err
		}
		for _, e := range entries {
			if _, err := os.Stat("/sys/class/net/" + e.Name() + "/device"); err == nil {
				return e.Name(), nil
			}
		}
	}
	return "", fmt.Errorf("no network interface came up in %v", deviceTimeout)
}

func setUp(fd int, name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func ioctlAddr(fd int, name string, req uint, addr netip.Addr) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := ifr.SetInet4Addr(addr.AsSlice()); err != nil {
		return err
	}
	return unix.IoctlIfreq(fd, req, ifr)
}

// addDefaultRoute adds a route by SIOCADDRT, whose argument is the kernel's struct rtentry
// (include/uapi/linux/route.h).
func addDefaultRoute(fd int, gateway netip.Addr) error {
	const rtfUp, rtfGateway = 1, 2
	type rtentry struct {
		pad1                  uint64
		dst, gateway, genmask unix.RawSockaddrInet4
		flags                 uint16
		pad2                  int16
		pad3                  uint64
		pad4                  uintptr
		metric                int16
		dev                   uintptr
		mtu, window           uint64
		irtt                  uint16
	}
	rt := rtentry{flags: rtfUp | rtfGateway}
	rt.dst.Family, rt.genmask.Family, rt.gateway.Family = unix.AF_INET, unix.AF_INET, unix.AF_INET
	rt.gateway.Addr = gateway.As4()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&rt)))
	if errno != 0 && errno != unix.EEXIST {
		return errno
	}
	return nil
}
