package lab

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"holdfast/internal/box"

	"golang.org/x/sys/unix"
)

// Capture records every packet on the grid's internet until the test ends, and returns what it has so far.
func (l *Lab) Capture() func() string {
	l.T.Helper()
	pcap := filepath.Join(l.T.TempDir(), "pcap")
	cmd := exec.Command("nsenter", "--net="+l.Box("internet").NetNS(), "tcpdump", "-i", "any", "-s", "0", "-U", "-w", pcap)
	says, err := cmd.StderrPipe()
	if err != nil {
		l.T.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.T.Fatal(err)
	}
	l.T.Cleanup(func() { cmd.Process.Signal(unix.SIGTERM); cmd.Wait() })
	listening := false
	for s := bufio.NewScanner(says); !listening && s.Scan(); {
		listening = strings.Contains(s.Text(), "listening on")
	}
	if !listening {
		l.T.Fatal("tcpdump ended before it listened")
	}
	return func() string { b, _ := os.ReadFile(pcap); return string(b) }
}

// hidden checks that a capture holds packets, and the wire marker in none of them. The control: on a plain connection
// across the same wire the same capture shows it.
func (l *Lab) hidden(captured func() string) {
	l.T.Helper()
	l.Until("captured packets", func() bool { return len(captured()) > 20_000 })
	for form, m := range Forms(wireMarker) {
		if strings.Contains(captured(), string(m)) {
			l.T.Errorf("the capture shows the marker (%s)", form)
		}
	}
	top := l.Topology()
	to := netip.AddrPortFrom(top.Addresses(box.Uplink{Segment: 12, Host: 2})[0].Addr(), 9)
	err := box.Within(l.Attacker(2, 14).NetNS(), func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(wireMarker))
		return err
	})
	if err != nil {
		l.T.Fatal(err)
	}
	l.Until("the marker on a plain link", func() bool { return strings.Contains(captured(), wireMarker) })
}
