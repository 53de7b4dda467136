package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// maxUncompressed bounds an uncompressed kernel or module, in bytes.
const maxUncompressed = 256 << 20

// The first bytes of compressed data. The LZ4 frame is the legacy one, the only one
// that Linux can unpack.
const (
	gzipMagic = "\x1f\x8b"
	xzMagic   = "\xfd7zXZ\x00"
	zstdMagic = "\x28\xb5\x2f\xfd"
	lz4Magic  = "\x02\x21\x4c\x18"
)

// uncompress returns the kernel that vmlinuz holds: the ELF file in an x86 bzImage,
// or an arm64 Image, which may be compressed with gzip or be in an EFI zboot image.
func uncompress(vmlinuz []byte) ([]byte, error) {
	at := func(offset int, magic string) bool {
		return len(vmlinuz) >= offset && bytes.HasPrefix(vmlinuz[offset:], []byte(magic))
	}
	var out []byte
	var err error
	switch {
	case at(0x202, "HdrS"):
		out, err = uncompressBzImage(vmlinuz)
	case at(4, "zimg"):
		out, err = uncompressZboot(vmlinuz)
	case at(0, gzipMagic):
		out, err = decompress(vmlinuz, maxUncompressed)
	default:
		out = vmlinuz
	}
	if err != nil {
		return nil, fmt.Errorf("unpacking the kernel: %w", err)
	}
	isELF := bytes.HasPrefix(out, []byte("\x7fELF"))
	isImage := len(out) >= 64 && string(out[56:60]) == "ARM\x64"
	if !isELF && !isImage {
		return nil, errors.New("unpacking the kernel: what is in it is neither an ELF file nor an arm64 Image")
	}
	return out, nil
}

// uncompressBzImage follows the kernel's Documentation/arch/x86/boot.rst.
func uncompressBzImage(b []byte) ([]byte, error) {
	if len(b) < 0x250 {
		return nil, errors.New("the setup header is cut off")
	}
	if version := binary.LittleEndian.Uint16(b[0x206:]); version < 0x208 {
		return nil, fmt.Errorf("boot protocol %#x doesn't tell where the payload is", version)
	}
	sectors := int64(b[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(b[0x248:]))
	return uncompressPayload(b, start, int64(binary.LittleEndian.Uint32(b[0x24c:])))
}

// uncompressZboot follows the kernel's drivers/firmware/efi/libstub/zboot-header.S.
func uncompressZboot(b []byte) ([]byte, error) {
	if len(b) < 0x20 {
		return nil, errors.New("the zboot header is cut off")
	}
	return uncompressPayload(b, int64(binary.LittleEndian.Uint32(b[8:])), int64(binary.LittleEndian.Uint32(b[12:])))
}

// uncompressPayload unpacks a payload that ends with its uncompressed size.
func uncompressPayload(b []byte, start, length int64) ([]byte, error) {
	if start+length > int64(len(b)) || length < 8 {
		return nil, fmt.Errorf("the payload, %d bytes at %d, is not within the file", length, start)
	}
	payload := b[start : start+length]
	end := len(payload) - 4
	size := int64(binary.LittleEndian.Uint32(payload[end:]))
	if size > maxUncompressed {
		return nil, fmt.Errorf("it says that it is %d bytes uncompressed", size)
	}
	// gzip's own format ends with the size, to the others it is appended.
	if !bytes.HasPrefix(payload, []byte(gzipMagic)) {
		payload = payload[:end]
	}
	out, err := decompress(payload, size)
	if err != nil {
		return nil, err
	}
	if int64(len(out)) != size {
		return nil, fmt.Errorf("it is %d bytes uncompressed instead of %d", len(out), size)
	}
	return out, nil
}

// decompress returns what b holds, at most limit bytes, by the format that it begins like.
func decompress(b []byte, limit int64) ([]byte, error) {
	var r io.Reader
	var err error
	in := bytes.NewReader(b)
	switch has := func(magic string) bool { return bytes.HasPrefix(b, []byte(magic)) }; {
	case has(gzipMagic):
		r, err = gzip.NewReader(in)
	case has(xzMagic):
		r, err = xz.NewReader(in, xz.DefaultDictMax)
	case has(zstdMagic):
		var d *zstd.Decoder
		d, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxUncompressed))
		if err == nil {
			defer d.Close()
			r = d
		}
	case has(lz4Magic):
		r = lz4.NewReader(in)
	default:
		return nil, errors.New("it is compressed in an unknown way")
	}
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("it is more than %d bytes uncompressed", limit)
	}
	return out, nil
}
