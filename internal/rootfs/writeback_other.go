//go:build !linux

package rootfs

import "os"

func startWriteback(*os.File, int64, int64) {}
