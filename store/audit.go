package store

import (
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

const (
	tableAudit  = 'u' // INDEX of a member: AuditRecord
	auditLeaves = 4
)

// AuditRecord is how a location has answered challenges.
type AuditRecord struct {
	Passed, Failed uint64
	Last           time.Time     // of all
	LastFailed     time.Time     // zero: never
	Shard          disperse.Name // that it failed with last
}

func (a *AuditRecord) append(b []byte) []byte {
	be := binary.BigEndian
	ms := func(t time.Time) uint64 {
		if t.IsZero() {
			return 0
		}
		return uint64(t.UnixMilli())
	}
	b = be.AppendUint64(be.AppendUint64(b, a.Passed), a.Failed)
	b = be.AppendUint64(be.AppendUint64(b, ms(a.Last)), ms(a.LastFailed))
	return append(b, a.Shard[:]...)
}

func parseAudit(b []byte) (a AuditRecord, err error) {
	if len(b) != 64 {
		return a, fmt.Errorf("record of audits: %w", errRow)
	}
	be := binary.BigEndian
	at := func(v uint64) time.Time {
		if v == 0 {
			return time.Time{}
		}
		return time.UnixMilli(int64(v))
	}
	return AuditRecord{be.Uint64(b), be.Uint64(b[8:]), at(be.Uint64(b[16:])), at(be.Uint64(b[24:])), disperse.Name(b[32:])}, nil
}

// Audited is what a round of challenges found.
type Audited struct {
	Passed, Failed int
	Silent         int // locations that did not answer: that is no failure
}

// Audit has locations prove that they hold n shards, each by leaves drawn at random, and records how they did. What they
// cannot prove is made anew; who gives a wrong proof gets nothing new while others are there.
func (s *Store) Audit(ctx context.Context, n int) (sum Audited, err error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return sum, err
	}
	defer end()
	type result struct {
		passed, failed uint64
		shard          disperse.Name
	}
	results := map[uint16]*result{}
	for range n {
		r, err := s.randomRecord(ctx)
		if err != nil {
			return sum, fmt.Errorf("audit: %w", err)
		}
		if r == nil {
			break
		}
		coder, err := s.coder(r.Scheme)
		if err != nil {
			return sum, fmt.Errorf("audit: %w", err)
		}
		i := rand.IntN(r.Scheme.N)
		m := s.memberAt(r.Members[i])
		if !r.durable(i) || !m.usable() {
			sum.Silent++
			continue
		}
		x := results[m.index]
		if x == nil {
			x = &result{}
			results[m.index] = x
		}
		switch err := s.challenge(ctx, m, r.Names[i], int64(shardSize(coder, r))); {
		case err == nil:
			sum.Passed++
			x.passed++
		case errors.Is(err, disperse.ErrProof) || gone(err):
			if !s.still(r, i) {
				continue // it was removed or moved meanwhile
			}
			sum.Failed++
			x.failed++
			x.shard = r.Names[i]
			s.log.Warn("a location failed an audit", "location", m.ID, "segment", r.ID, "shard", i, "error", err)
			if !gone(err) {
				m.lied(r.Names[i])
			}
			s.notice(r.ID, true)
		case ctx.Err() != nil:
			sum.Silent++
		default:
			// Who has the shard can give it instead of a proof; who answers, and gives neither, has failed.
			switch st := s.lookAt(ctx, m, r.Names[i], shardSize(coder, r), true); {
			case st == good:
				sum.Passed++
				x.passed++
			case st == noAnswer && !s.answers(ctx, m):
				sum.Silent++
			case s.still(r, i):
				sum.Failed++
				x.failed++
				x.shard = r.Names[i]
				s.log.Warn("a location gives neither a proof nor the shard", "location", m.ID, "segment", r.ID, "shard", i, "error", err)
				s.notice(r.ID, true)
			}
		}
	}
	if len(results) == 0 {
		return sum, nil
	}
	now := time.Now()
	err = s.update(ctx, func(t *tx) error {
		for i, x := range results {
			key := binary.BigEndian.AppendUint16(ownKey(tableAudit), i)
			b, ok, err := t.get(key)
			if err != nil {
				return err
			}
			var a AuditRecord
			if ok {
				if a, err = parseAudit(b); err != nil {
					return err
				}
			}
			a.Passed, a.Failed, a.Last = a.Passed+x.passed, a.Failed+x.failed, now
			if x.failed > 0 {
				a.LastFailed, a.Shard = now, x.shard
			}
			t.set(key, a.append(nil))
		}
		return nil
	})
	if err != nil {
		return sum, fmt.Errorf("record audits: %w", err)
	}
	return sum, nil
}

// answers says whether a member says anything at all.
func (s *Store) answers(ctx context.Context, m *member) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := m.Location.Status(ctx)
	return err == nil
}

// challenge asks for leaves that nobody could know before.
func (s *Store) challenge(ctx context.Context, m *member, n disperse.Name, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, lateLimit)
	defer cancel()
	leaves := make([]int, min(auditLeaves, disperse.Leaves(size)))
	for i := range leaves {
		var b [8]byte
		crand.Read(b[:])
		leaves[i] = int(binary.BigEndian.Uint64(b[:]) % uint64(disperse.Leaves(size)))
	}
	begin := time.Now()
	p, err := m.Location.Prove(ctx, n, leaves)
	m.answered(err, time.Since(begin))
	if err != nil {
		return err
	}
	return p.Check(location.Name(n), size, leaves)
}

// still says whether a record is still in use, and its shard where it was.
func (s *Store) still(r *record, i int) bool {
	now, _, _, err := s.find(r.ID)
	if err != nil || now == nil {
		return errors.Is(err, ErrLost) // a block has no row there
	}
	return now.Names[i] == r.Names[i]
}

// randomRecord draws a segment, or the block of a small body: nil if there is none.
func (s *Store) randomRecord(ctx context.Context) (r *record, err error) {
	var id disperse.ID
	crand.Read(id[:])
	err = s.view(ctx, func(v *view) error {
		c := v.scan(ownKey(tableSegment), ownKey(tableSegment+1), 2)
		ok := c.Seek(id[:])
		if !ok {
			ok = c.Seek(nil)
		}
		// Gaps between IDs differ: a few steps more even out who is drawn.
		for j := rand.IntN(32); ok && j > 0; j-- {
			if !c.Next() {
				c.Seek(nil)
			}
		}
		var b []byte
		if ok {
			b = append(b, c.Value()...)
		}
		if err := c.Close(); err != nil || !ok {
			return err
		}
		if at, ok := parseSpot(b); ok {
			if b, ok, err = v.get(sequenceKey(tableBlock, at.sequence)); err != nil || !ok {
				return err
			}
		} else {
			b = b[1:]
		}
		rec, err := parseRecord(b)
		r = &rec
		return err
	})
	return r, err
}
