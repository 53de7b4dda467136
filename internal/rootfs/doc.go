// Package rootfs makes the block devices that a shed's root file system is
// assembled from: one read-only ext4 image for each layer of an OCI image,
// shared by all sheds, and one writable ext4 image, the upper, for each shed.
// Where a machine can't have as many disks as an image has layers, those at the bottom are merged into one.
//
// All files appear under their final names complete and synced, or not at all.
package rootfs
