package rootfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
)

// padInodeBitmaps marks what the inode bitmaps of the ext4 file system f have
// beyond their group's last inode as in use. tar2ext4 leaves it clear, to
// which Linux doesn't object and e2fsck does.
func padInodeBitmaps(f *os.File) error {
	// Offsets are those of ext4_super_block and ext4_group_desc.
	var super [1024]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		return fmt.Errorf("reading the superblock: %w", err)
	}
	inodes := binary.LittleEndian.Uint32(super[0x0:])
	perGroup := binary.LittleEndian.Uint32(super[0x28:])
	if perGroup == 0 || perGroup%8 != 0 || perGroup > blockSize*8 {
		return fmt.Errorf("the superblock has %d inodes per group", perGroup)
	}
	padding := bytes.Repeat([]byte{0xff}, blockSize-int(perGroup/8))
	for group := range int64(inodes / perGroup) {
		var bitmap [4]byte
		if _, err := f.ReadAt(bitmap[:], blockSize+group*32+0x4); err != nil {
			return fmt.Errorf("reading a group descriptor: %w", err)
		}
		block := int64(binary.LittleEndian.Uint32(bitmap[:]))
		if _, err := f.WriteAt(padding, block*blockSize+int64(perGroup/8)); err != nil {
			return fmt.Errorf("writing an inode bitmap: %w", err)
		}
	}
	return nil
}
