package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// xzELF is testELF as the kernel's build compresses it: with the filter for x86's calls.
const xzELF = "" +
	"fd377a585a0000016922de360201040021010800d2b974cbe0011b00585d003f9145847069d009ac" +
	"4ecee06f643279853f44042314d30016b4b668c5d37b9df1e8145d093b792e8199a36bf0495a65d3" +
	"608bbfe573e2ad8c545608b6cdbcb4c6136710187738f15d4f78a2f68098ee487f72ab981bd13400" +
	"e12a46cc0001709c0200000086db88763e300d8b020000000001595a" +
	""

func testELF() []byte {
	return []byte("\x7fELF" + strings.Repeat("\xe8\x00\x10\x00\x00\x90\x90", 40))
}

func compressed(t testing.TB, w io.WriteCloser, buf *bytes.Buffer, data []byte) []byte {
	t.Helper()
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	var buf bytes.Buffer
	return compressed(t, gzip.NewWriter(&buf), &buf, data)
}

// payloads returns testELF in every format, as it is in a kernel: with its size at the end.
func payloads(t testing.TB) map[string][]byte {
	t.Helper()
	elf := testELF()
	xz, err := hex.DecodeString(xzELF)
	if err != nil {
		t.Fatal(err)
	}
	var zbuf, lbuf bytes.Buffer
	zw, err := zstd.NewWriter(&zbuf)
	if err != nil {
		t.Fatal(err)
	}
	lw := lz4.NewWriter(&lbuf)
	if err := lw.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	withSize := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, uint32(len(elf))) }
	return map[string][]byte{
		"gzip": gzipped(t, elf),
		"xz":   withSize(xz),
		"zstd": withSize(compressed(t, zw, &zbuf, elf)),
		"lz4":  withSize(compressed(t, lw, &lbuf, elf)),
	}
}

func bzImage(payload []byte) []byte {
	const setupSectors, offset = 2, 0x40
	b := make([]byte, (setupSectors+1)*512+offset)
	b[0x1f1] = setupSectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], offset)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(append(b, payload...), "what follows"...)
}

func zboot(payload []byte) []byte {
	b := make([]byte, 0x40)
	copy(b, "MZ\x00\x00zimg")
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)))
	binary.LittleEndian.PutUint32(b[12:], uint32(len(payload)))
	return append(b, payload...)
}

func TestUncompress(t *testing.T) {
	image := make([]byte, 100)
	copy(image[56:], "ARM\x64")
	type test struct{ in, want []byte }
	tests := map[string]test{
		"Image":    {image, image},
		"Image.gz": {gzipped(t, image), image},
		"ELF":      {testELF(), testELF()},
	}
	for name, p := range payloads(t) {
		tests["bzImage "+name] = test{bzImage(p), testELF()}
		tests["zboot "+name] = test{zboot(p), testELF()}
	}
	for name, test := range tests {
		got, err := uncompress(test.in)
		if err != nil || !bytes.Equal(got, test.want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func TestUncompressErrors(t *testing.T) {
	good := bzImage(payloads(t)["gzip"])
	change := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":      nil,
		"text":       []byte("no kernel"),
		"no ELF":     bzImage(gzipped(t, []byte("text and more text"))),
		"cut header": good[:0x220],
		"cut":        good[:len(good)-40],
		"old":        change(func(b []byte) { b[0x206] = 7 }),
		"offset":     change(func(b []byte) { binary.LittleEndian.PutUint32(b[0x248:], 1<<32-1) }),
		"length":     change(func(b []byte) { binary.LittleEndian.PutUint32(b[0x24c:], 1<<32-1) }),
		"no payload": change(func(b []byte) { binary.LittleEndian.PutUint32(b[0x24c:], 0) }),
		"format":     bzImage(append([]byte("????????"), 8, 0, 0, 0)),
		"size":       bzImage(binary.LittleEndian.AppendUint32(bytes.Clone(payloads(t)["zstd"][:len(payloads(t)["zstd"])-4]), 10)),
		"huge":       bzImage(binary.LittleEndian.AppendUint32([]byte(zstdMagic+"...."), 1<<31)),
	} {
		if out, err := uncompress(b); err == nil {
			t.Errorf("%s: %d bytes and no error", name, len(out))
		}
	}
}

func FuzzUncompress(f *testing.F) {
	for _, p := range payloads(f) {
		f.Add(bzImage(p))
		f.Add(zboot(p))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := uncompress(b)
		if err == nil && len(out) == 0 {
			t.Error("neither a kernel nor an error")
		}
	})
}
