package overlay

import (
	"net/netip"
	"testing"
	"time"
)

func TestThreeNodesMesh(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	var paths []string
	var addrs []netip.Addr
	for i, b := range l.boxes {
		must(t, Firewall{Main: b.ns}.Apply())
		m := b.join("shop", 30001)
		p, a := m.attach([]string{"a", "b", "c"}[i])
		ms, paths, addrs = append(ms, m), append(paths, p), append(addrs, a)
	}
	mesh(t, ms...)
	at := netip.AddrPortFrom(addrs[1], 8080)
	listen(t, paths[1], at, "hello")
	start := time.Now()
	reachable(t, paths[0], at, "hello")
	t.Log("first answer after", time.Since(start))
	reachable(t, paths[2], at, "hello")
}
