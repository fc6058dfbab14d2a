package overlay

import (
	"testing"
	"time"
)

// TestRulesAreReplacedWithoutAGap plays a stranger who probes all the time, while the node writes its rules anew.
func TestRulesAreReplacedWithoutAGap(t *testing.T) {
	l := newLab(t, 1)
	b := l.boxes[0]
	fw := Firewall{Main: b.ns}
	must(t, fw.Apply())
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { done <- n }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			fw.Egress = n%2 == 0 // chains come and go too
			if err := fw.Apply(); err != nil {
				t.Error(err)
				return
			}
			n++
		}
	}()
	answers := 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end) && answers == 0; {
		answers += probe(t, l, b)
	}
	close(stop)
	if n := <-done; n < 20 {
		t.Errorf("the rules were replaced %d times only", n)
	}
	if answers > 0 {
		t.Errorf("%d probes were answered while the rules were replaced", answers)
	}
	unprotect(t, b.ns)
	if n := probe(t, l, b); n < 1000 {
		t.Errorf("control: without rules the node answered %d times", n)
	}
}
