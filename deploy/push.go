package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"holdfast/contract"
	"holdfast/seal"
	"holdfast/store"
)

// Place is where sealed blobs go.
type Place interface {
	HasBlob(ctx context.Context, d store.Digest) (bool, error)
	Put(ctx context.Context, d store.Digest, size int64, r io.Reader) error
}

// Push seals the blobs of an image and stores those that the place does not have. Every blob is verified while it is
// read. known are blobs that the same secret has sealed before, by digest: where the place still has them, they are not read
// again. done is called with the bytes that were stored or found.
func Push(ctx context.Context, s *Source, secret [32]byte, to Place, known map[string]contract.Blob, done func(int64)) (*contract.Image, error) {
	img := &contract.Image{Reference: s.Reference, Manifest: s.Manifest}
	for _, b := range s.Blobs {
		out, err := push(ctx, b, secret, to, known[b.Digest])
		if err != nil {
			return nil, fmt.Errorf("blob %s: %w", b.Digest, err)
		}
		if done != nil {
			done(b.Size)
		}
		img.Blobs = append(img.Blobs, out)
	}
	return img, nil
}

func push(ctx context.Context, b SourceBlob, secret [32]byte, to Place, known contract.Blob) (contract.Blob, error) {
	out := contract.Blob{Digest: b.Digest, Size: uint64(b.Size), Key: seal.BlobKey(secret, b.Digest)}
	if known.Key == out.Key && known.Size == out.Size && known.Digest == out.Digest {
		if have, err := to.HasBlob(ctx, known.Sealed); err != nil {
			return out, err
		} else if have {
			return known, nil
		}
	}
	// The first pass gives the sealed digest, under which it is found or stored; the second one sends it.
	h := sha256.New()
	if err := sealBlob(ctx, h, b, out.Key); err != nil {
		return out, err
	}
	out.Sealed = [32]byte(h.Sum(nil))
	have, err := to.HasBlob(ctx, out.Sealed)
	if err != nil || have {
		return out, err
	}
	r, w := io.Pipe()
	sealed := make(chan struct{})
	go func() {
		defer close(sealed)
		w.CloseWithError(sealBlob(ctx, w, b, out.Key))
	}()
	err = to.Put(ctx, out.Sealed, seal.Size(b.Size), r)
	r.Close() // ends a sealer that nobody reads from
	<-sealed
	return out, err
}

func sealBlob(ctx context.Context, to io.Writer, b SourceBlob, key [32]byte) error {
	r, err := b.Open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := seal.NewWriter(to, key)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(r, b.Size+1))
	switch {
	case err != nil:
		return err
	case n != b.Size || "sha256:"+hex.EncodeToString(h.Sum(nil)) != b.Digest:
		return ErrDigest
	}
	return w.Close()
}
