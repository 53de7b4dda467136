package main

import (
	"fmt"
	"strings"
	"time"
)

// timeLimit is a flag's value, as in 90s, 10m or 1h30m.
type timeLimit time.Duration

func (l *timeLimit) String() string {
	s := time.Duration(*l).String()
	if strings.HasSuffix(s, "m0s") {
		return strings.TrimSuffix(s, "0s")
	}
	return s
}

func (l *timeLimit) Type() string { return "time" }

func (l *timeLimit) Set(value string) error {
	d, err := time.ParseDuration(strings.TrimSpace(value))
	if err != nil || d <= 0 {
		return fmt.Errorf("%q is no time: use a number with a unit, like 10m", value)
	}
	*l = timeLimit(d)
	return nil
}
