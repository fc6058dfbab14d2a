package disperse

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// A secret is shared as its length, itself, zeros up to a padded length, and the digest of all that. What is padded with
// does not matter: fewer than k shares of anything are uniform.
const secretFrame = 4 + sha256.Size

func secretSize(length int) int { return padded(length + secretFrame) }

// SecretShardSize is the size of each shard of a secret of so many bytes.
func (c *Coder) SecretShardSize(length int) int { return secretSize(length) + trailerSize }

// Split shares a secret among n places, each byte for itself: what fewer than k of them have is independent of it, whatever
// is computed on. There must be at least two. Each shard is as large as the secret.
func (c *Coder) Split(id ID, mac *Key, places []Place, secret []byte) (*Encoded, error) {
	k := c.scheme.K
	if k < 2 || len(secret) > MaxSecret {
		return nil, fmt.Errorf("secret %v: %d bytes with scheme %v: at most %d, and k at least 2", id, len(secret), c.scheme, MaxSecret)
	}
	if err := c.placed(id, places); err != nil {
		return nil, err
	}
	w := c.begin()
	defer c.end(w)
	size := secretSize(len(secret))
	rows := make([]byte, k*size)
	defer clear(rows)
	first := rows[:size]
	binary.BigEndian.PutUint32(first, uint32(len(secret)))
	copy(first[4:], secret)
	sum := sha256.Sum256(first[:size-sha256.Size])
	copy(first[size-sha256.Size:], sum[:])
	if err := c.read(rows[size:]); err != nil {
		return nil, fmt.Errorf("secret %v: randomness: %w", id, err)
	}
	e := c.encoded(size + trailerSize)
	for i := range k {
		w.rows[i] = rows[i*size : (i+1)*size]
	}
	for i, s := range e.Shards {
		w.rows[k+i] = s[:size]
		t := trailer(s[size:])
		t.fill(kindSecret, c.scheme, i, id, size, places[i])
		// Salt: who knows the names and fewer than k shards could try secrets otherwise, for they determine the other shares.
		if err := c.read(t.share()); err != nil {
			e.Release()
			return nil, fmt.Errorf("secret %v: randomness: %w", id, err)
		}
	}
	if err := c.shamir.Encode(w.rows); err != nil {
		e.Release()
		return nil, fmt.Errorf("secret %v: share: %w", id, err)
	}
	m := newStamper(mac, &w.tree)
	for i, s := range e.Shards {
		e.Names[i] = m.stamp(s)
	}
	return e, nil
}

// Join appends the secret to dst. shards[i] is shard i, or nil; the first k are checked by their MACs and used.
func (c *Coder) Join(dst []byte, id ID, mac *Key, shards [][]byte) ([]byte, error) {
	k, n := c.scheme.K, c.scheme.N
	if len(shards) != n {
		return nil, fmt.Errorf("secret %v: %d shards of %d", id, len(shards), n)
	}
	w := c.begin()
	defer c.end(w)
	m, size, have := newStamper(mac, &w.tree), 0, 0
	for i, s := range shards {
		if s == nil || have == k {
			continue
		}
		payload, t, err := m.check(s)
		if err != nil {
			return nil, fmt.Errorf("secret %v: shard %d: %w", id, i, err)
		}
		if size == 0 {
			size = len(payload)
		}
		if t.stamp() != (Stamp{c.scheme, i, id, Place(t[offPlace:offShare]), true}) || len(payload) != size || size > secretSize(MaxSecret) || size < secretSize(0) {
			return nil, fmt.Errorf("secret %v: shard %d is not of it: %w", id, i, ErrAuth)
		}
		w.rows[k+i] = payload
		have++
	}
	if have < k {
		return nil, fmt.Errorf("secret %v: %d of %d: %w", id, have, k, ErrFew)
	}
	first := make([]byte, size)
	defer clear(first)
	w.rows[0], w.want[0] = first[:0], true
	if err := c.shamir.ReconstructSome(w.rows, w.want); err != nil {
		return nil, fmt.Errorf("secret %v: share: %w", id, err)
	}
	body, sum := first[:size-sha256.Size], sha256.Sum256(first[:size-sha256.Size])
	length := int64(binary.BigEndian.Uint32(body))
	if !bytes.Equal(sum[:], first[len(body):]) || length > int64(len(body)-4) || secretSize(int(length)) != size {
		return nil, fmt.Errorf("secret %v: digest: %w", id, ErrAuth)
	}
	return append(dst, body[4:4+length]...), nil
}
