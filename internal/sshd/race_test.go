//go:build race

package sshd

// raceDetector says whether the tests run under the race detector.
const raceDetector = true
