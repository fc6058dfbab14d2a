package overlay

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// stream sends b.N megabytes from one namespace to another over TCP.
func stream(b *testing.B, from, to string, at netip.AddrPort) {
	var l net.Listener
	must(b, within(to, func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	}))
	defer l.Close()
	got := make(chan int64)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n, _ := io.Copy(io.Discard, c)
			c.Close()
			if n > 0 {
				got <- n
			}
		}
	}()
	var c net.Conn
	if !soon(10*time.Second, func() (ok bool) {
		var err error
		c, err = dial(from, at, time.Second)
		return err == nil
	}) {
		b.Fatal("no connection")
	}
	chunk := make([]byte, 1<<20)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := c.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
	<-got
}

func BenchmarkThroughput(b *testing.B) {
	l := newLab(b, 2)
	var ms []*member
	for _, box := range l.boxes {
		ms = append(ms, box.join("bench", 30040))
	}
	pa, _ := ms[0].attach("a")
	pb, addr := ms[1].attach("b")
	here, near := ms[0].attach("near")
	mesh(b, ms...)
	b.Run("mesh", func(b *testing.B) { stream(b, pa, pb, netip.AddrPortFrom(addr, 80)) })
	b.Run("same-node", func(b *testing.B) { stream(b, pa, here, netip.AddrPortFrom(near, 80)) })
	b.Run("plain", func(b *testing.B) { stream(b, l.boxes[0].ns, l.boxes[1].ns, netip.AddrPortFrom(l.boxes[1].v6, 80)) })
}

func BenchmarkDial(b *testing.B) {
	l := newLab(b, 1)
	m := l.boxes[0].join("dial", 30041)
	path, addr := m.attach("w")
	at := netip.AddrPortFrom(addr, 80)
	listen(b, path, at, "hi")
	reachable(b, path, at, "hi")
	b.Run("network", func(b *testing.B) {
		for b.Loop() {
			c, err := m.Dial(b.Context(), at)
			must(b, err)
			c.Close()
		}
	})
	own := netip.MustParseAddrPort("[::1]:0")
	l2 := listen(b, "", own, "hi")
	b.Run("loopback", func(b *testing.B) {
		for b.Loop() {
			c, err := net.Dial("tcp", l2.Addr().String())
			must(b, err)
			c.Close()
		}
	})
}

func BenchmarkAttach(b *testing.B) {
	l := newLab(b, 1)
	m := l.boxes[0].join("att", 30042)
	for b.Loop() {
		m.attach("w")
		must(b, m.Detach(b.Context(), "w"))
	}
}
