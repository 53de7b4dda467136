//go:build linux

package main

import (
	"encoding/binary"
	"os"

	"github.com/cavaliergopher/cpio"
)

const tinyLine = "floor is up"

// tinyInit is the smallest init for x86-64 that tells that it runs: an ELF file of one segment that
// writes a line and waits for signals for ever.
func tinyInit() []byte {
	const base, headers = 0x400000, 64 + 56
	msg := []byte(tinyLine + "\n")
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 0x10, 0, 0, 0, // lea rsi, [rip+16]: the line
		0xba, byte(len(msg)), 0, 0, 0, // mov edx, its length
		0x0f, 0x05, // syscall
		0xb8, 34, 0, 0, 0, // mov eax, 34 (pause)
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // again
	}
	code = append(code, msg...)
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2)            // executable
	b = le.AppendUint16(b, 62)           // x86-64
	b = le.AppendUint32(b, 1)            // version
	b = le.AppendUint64(b, base+headers) // entry
	b = le.AppendUint64(b, 64)           // program headers
	b = le.AppendUint64(b, 0)            // section headers
	b = le.AppendUint32(b, 0)            // flags
	for _, n := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, n)
	}
	b = le.AppendUint32(b, 1) // load
	b = le.AppendUint32(b, 5) // read, execute
	for _, n := range []uint64{0, base, base, uint64(headers + len(code)), uint64(headers + len(code)), 0x1000} {
		b = le.AppendUint64(b, n)
	}
	return append(b, code...)
}

// writeInitramfs writes an initramfs that has the program init and nothing else.
func writeInitramfs(name string, init []byte) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	w := cpio.NewWriter(f)
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(init))}); err != nil {
		return err
	}
	if _, err := w.Write(init); err != nil {
		return err
	}
	return w.Close()
}
