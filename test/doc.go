// Package test holds the end-to-end tests: scripts that drive the real programs
// and real machines as a user would, and a test that kills the server over and over.
//
//	go test ./test                                # all, some minutes
//	go test ./test -run TestScripts/life          # one script
//	SHED_KILL_ROUNDS=200 go test ./test -run TestKill
//
// They need what the server needs (QEMU, mmdebstrap, e2fsprogs) and an OpenSSH client, and no
// privileges. An image and a kernel are built once, and kept in SHED_TEST_CACHE, or below the user's
// cache directory. With -short nothing runs.
package test
