package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// binarySize is a flag's value in units of unit bytes, as in 512, 512M, 4G or 1T.
type binarySize struct {
	n       int64
	unit    int64 // of a bare number and of n
	example string
}

func (s *binarySize) String() string {
	if s.n == 0 {
		return ""
	}
	return strconv.FormatInt(s.n, 10)
}

func (s *binarySize) Type() string { return "size" }

func (s *binarySize) Set(value string) error {
	v := strings.ToUpper(strings.TrimSpace(value))
	v = strings.TrimSuffix(strings.TrimSuffix(v, "B"), "I")
	unit := s.unit
	if i := strings.IndexAny(v, "KMGT"); i >= 0 && i == len(v)-1 {
		unit = 1 << (10 * (1 + strings.IndexByte("KMGT", v[i])))
		v = v[:i]
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/unit || n*unit%s.unit != 0 {
		return fmt.Errorf("%q is no size: use a number like %s", value, s.example)
	}
	s.n = n * unit / s.unit
	return nil
}
