package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newVersion(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of client and server",
		Args:  noArgs,
		RunE: c.action(func(ctx context.Context, _ []string) error {
			info, err := c.serverInfo(ctx)
			if c.json {
				answer := struct {
					Client clientInfo `json:"client"`
					Server *shed.Info `json:"server"`
				}{Client: newClientInfo()}
				if err == nil {
					answer.Server = &info
				}
				return c.printJSON(answer)
			}
			client := newClientInfo()
			fmt.Fprintf(c.out, "client: %s (%s, %s)\n", client.Version, client.Go, client.Platform)
			if err != nil {
				c.message("server: %s", err)
				return nil
			}
			_, err = fmt.Fprintf(c.out, "server: %s (%s, %s with %s)\n", info.Version, printable(info.Name), info.Backend, info.Accel)
			return err
		}),
	}
}

func (c *cli) serverInfo(ctx context.Context) (shed.Info, error) {
	client, err := c.connect()
	if err != nil {
		return shed.Info{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return client.Info(ctx)
}

type clientInfo struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// version is set by the linker; `go install` leaves it to the build information.
var version string

func newClientInfo() clientInfo {
	v := version
	if build, ok := debug.ReadBuildInfo(); ok && v == "" {
		v = build.Main.Version
	}
	return clientInfo{Version: v, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
}
