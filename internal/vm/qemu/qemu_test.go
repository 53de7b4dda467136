//go:build linux

package qemu

import (
	"testing"

	"github.com/charliek/shed/internal/vm"
	"github.com/charliek/shed/internal/vm/vmtest"
)

func TestDriver(t *testing.T) {
	binary, err := FindBinary()
	if err != nil {
		t.Fatal(err)
	}
	vmtest.Run(t, func(testing.TB) vm.Driver { return &Driver{Binary: binary, Accel: TCG} })
}
