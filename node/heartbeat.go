package node

import (
	"strings"

	"holdfast/ledger"
)

// fit cuts an unsigned heartbeat to what validators accept: reasons first, since a node that falls silent is a dead one,
// then the last reports. It returns how many reports went.
func fit(h *ledger.Heartbeat, limit int) (dropped int) {
	limit -= 128 // the signature
	for _, keep := range []int{32, 0} {
		if len(h.Encode()) <= limit {
			return 0
		}
		for i := range h.Workloads {
			r := &h.Workloads[i]
			r.Reason = strings.ToValidUTF8(r.Reason[:min(len(r.Reason), keep)], "")
		}
	}
	for len(h.Workloads) > 0 && len(h.Encode()) > limit {
		n := len(h.Workloads)/16 + 1
		h.Workloads = h.Workloads[:len(h.Workloads)-n]
		dropped += n
	}
	return dropped
}
