package node

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"holdfast/access"
	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// logService gives a workload's output to whom the contract's account allows, and to nobody else. It is reached through
// gateways under the node's ServiceName; TLS ends here.
//
//	GET /v1/logs/{workload}?follow=1&tail=100
//	GET /v1/volumes/{workload}/{volume}   []Snapshot of a volume of it, oldest first
type logService struct {
	agent *Agent
	spki  [32]byte
}

func (a *Agent) logHandler() http.Handler {
	l := &logService{a, sha256.Sum256(a.cfg.Keys.TLS.Leaf.RawSubjectPublicKeyInfo)}
	mux := http.NewServeMux()
	mux.Handle("GET /v1/logs/{workload}", l)
	mux.HandleFunc("GET /v1/volumes/{workload}/{volume}", l.snapshots)
	return mux
}

// Snapshot is one of a volume, as its node shows it to its owner.
type Snapshot struct {
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	Digest   string    `json:"digest"` // of its manifest, in hexadecimal
}

func (l *logService) snapshots(w http.ResponseWriter, r *http.Request) {
	work := l.workload(w, r)
	if work == nil {
		return
	}
	i := slices.IndexFunc(work.Volumes, func(v WorkVolume) bool { return v.Name == r.PathValue("volume") })
	if i < 0 {
		http.Error(w, "it has no such volume", http.StatusNotFound)
		return
	}
	all, err := l.agent.savers.snapshots(r.Context(), work.Volumes[i].ID)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	out := []Snapshot{}
	for _, s := range all {
		out = append(out, Snapshot{s.Sequence, s.Time, s.Digest.String()})
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(out)
}

// ServeHTTP implements http.Handler.
func (l *logService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	work := l.workload(w, r)
	if work == nil {
		return
	}
	tail, err := strconv.Atoi(r.URL.Query().Get("tail"))
	if err != nil || tail < 0 || tail > 100_000 {
		tail = 1000
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	out := flusher{w, http.NewResponseController(w)}
	out.rc.Flush()
	err = l.agent.runner.Logs(r.Context(), work.Instance, r.URL.Query().Get("follow") == "1", tail, out)
	if err != nil && !errors.Is(err, r.Context().Err()) {
		fmt.Fprintf(w, "holdfast: logs end here: %v\n", err)
	}
}

// workload is the one that a request is about, if it is its account's and that may read its logs; else it answers.
func (l *logService) workload(w http.ResponseWriter, r *http.Request) *Workload {
	lookup := func(id identity.AccountID) (*identity.Account, error) {
		return api.Get[identity.Account](r.Context(), l.agent.client, ledger.AccountKey(id))
	}
	account, device, err := access.Verify(r, l.spki, time.Now(), lookup)
	if err == nil {
		err = account.Allows(identity.ActReadLogs, []identity.DeviceID{device})
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return nil
	}
	id, err := contract.ParseWorkloadID(r.PathValue("workload"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil
	}
	l.agent.mu.Lock()
	work := l.agent.wanted[id]
	var owner identity.AccountID
	if v := l.agent.current; v != nil && work != nil {
		for _, c := range v.Contracts {
			if c.Record.ID == work.Contract {
				owner = c.Record.Account
			}
		}
	}
	l.agent.mu.Unlock()
	if work == nil || owner != account.ID { // one answer for both: a stranger learns nothing
		http.Error(w, "no such workload of yours on this node", http.StatusNotFound)
		return nil
	}
	return work
}

// flusher sends each line as it comes.
type flusher struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}
