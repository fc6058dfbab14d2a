package node

import (
	"testing"
	"time"
)

func TestVerdictOfHealthChecks(t *testing.T) {
	const interval, period = 30 * time.Second, 10 * time.Second
	type check struct {
		at     time.Duration // since the start
		passed bool
	}
	for _, c := range []struct {
		name       string
		checks     []check
		ok, failed bool
	}{
		{"none yet", nil, false, false},
		{"the first success is enough", []check{{time.Second, false}, {2 * time.Second, true}}, true, false},
		{"failures in the start period and the first interval do not count", []check{{1 * time.Second, false}, {9 * time.Second, false}, {12 * time.Second, false}, {25 * time.Second, false}, {39 * time.Second, false}}, false, false},
		{"one who starts slowly has all retries, an interval each", []check{{41 * time.Second, false}, {43 * time.Second, false}, {72 * time.Second, false}, {75 * time.Second, false}, {95 * time.Second, true}}, true, false},
		{"one who never starts has failed then", []check{{41 * time.Second, false}, {72 * time.Second, false}, {103 * time.Second, false}}, false, true},
		{"a failure after a success is not the end", []check{{time.Second, true}, {32 * time.Second, false}, {63 * time.Second, false}}, true, false},
		{"three are", []check{{time.Second, true}, {32 * time.Second, false}, {63 * time.Second, false}, {94 * time.Second, false}}, false, true},
		{"a success in between begins anew", []check{{time.Second, true}, {32 * time.Second, false}, {63 * time.Second, false}, {94 * time.Second, true}, {125 * time.Second, false}, {156 * time.Second, false}}, true, false},
	} {
		begin := time.Unix(1_700_000_000, 0)
		v := verdict{retries: 3, interval: interval, last: begin.Add(period)}
		for _, x := range c.checks {
			v.add(begin.Add(x.at), x.passed)
		}
		if v.ok != c.ok || v.failures >= v.retries != c.failed {
			t.Errorf("%s: healthy %v, failures %d", c.name, v.ok, v.failures)
		}
	}
}
