package network
import ("testing";"net";"os";"os/exec";"fmt";"time";"io";"strings")
func TestZZQemu(t *testing.T) {
	port := serveTCP(t, func(c *net.TCPConn) {
		b := make([]byte, 1); io.ReadFull(c, b)
		switch b[0] { case 'd': buf := make([]byte, 1<<20); for range 100 { c.Write(buf) }; case 'u': io.Copy(io.Discard, c) }
	})
	n, err := New(Config{AllowHostPorts: []int{port,1}}); if err != nil { t.Fatal(err) }
	defer n.Close()
	for _, mtu := range strings.Fields(os.Getenv("MTUS")) {
		s := "/tmp/netx/q/s.sock"; os.Remove(s)
		extra := os.Getenv("DEV")
		cmd := exec.Command("qemu-system-x86_64","-M","microvm,acpi=on,rtc=on","-accel","tcg","-cpu","max","-smp","1","-m","512","-nodefaults","-no-user-config","-nographic","-serial","stdio","-kernel","/tmp/netx/q/boot/vmlinuz-6.1.0-56-amd64","-initrd","/tmp/netx/q/initrd.gz","-no-reboot",
			"-append","console=ttyS0 quiet reboot=t panic=-1 tsc=reliable tsc_early_khz=2596120 lpj=10384480 mtu="+mtu+fmt.Sprintf(" port=%d",port),
			"-netdev","stream,id=n0,server=on,addr.type=unix,addr.path="+s,"-device","virtio-net-device,netdev=n0,mac="+GuestMAC+extra)
		out, _ := cmd.StdoutPipe(); cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil { t.Fatal(err) }
		var c net.Conn
		for range 100 { if c, err = net.Dial("unix", s); err == nil { break }; time.Sleep(50*time.Millisecond) }
		if err != nil { t.Fatal(err) }
		done := make(chan error)
		go func() { done <- n.Serve(t.Context(), c) }()
		time.AfterFunc(150*time.Second, func() { cmd.Process.Kill() })
		io.Copy(os.Stdout, out)
		fmt.Println(cmd.Wait(), <-done)
	}
}
