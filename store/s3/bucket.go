package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"

	"holdfast/store"
)

func bucketKey(name string) []byte { return append([]byte{rowBucket}, name...) }

// find reads a bucket.
func find(r store.Reader, name string) (*bucket, error) {
	row, ok, err := r.Get(bucketKey(name))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, s3err.GetBucketErr(s3err.ErrNoSuchBucket, name)
	}
	return parseBucket(row)
}

// bucket reads one, which the caller does not change, from the cache if it can. No other process changes buckets: a front
// end that has lost the store is refused by the store when it reads an object, and does not see that it may not read a
// bucket's rules for as long as the heartbeat takes.
func (b *objects) bucket(name string) (k *bucket, err error) {
	b.buckets.RLock()
	k, changes := b.buckets.known[name], b.buckets.changes
	b.buckets.RUnlock()
	if k != nil {
		return k, nil
	}
	err = b.view(func(r store.Reader) (err error) {
		k, err = find(r, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	b.buckets.Lock()
	defer b.buckets.Unlock()
	if b.buckets.changes == changes { // nothing has changed since k was read
		if len(b.buckets.known) >= maxKnown {
			clear(b.buckets.known)
		}
		b.buckets.known[strings.Clone(name)] = k
	}
	return k, nil
}

const maxKnown = 4096

// forget is called before and after a change of a bucket, so that nobody keeps what was read meanwhile.
func (b *objects) forget(name string) {
	b.buckets.Lock()
	defer b.buckets.Unlock()
	delete(b.buckets.known, name)
	b.buckets.changes++
}

// change changes a bucket.
func (b *objects) change(name string, f func(*bucket) error) error {
	defer b.forget(name)
	b.forget(name)
	return b.update(func(tx store.Tx) error {
		k, err := find(tx, name)
		if err != nil {
			return err
		}
		if err := f(k); err != nil {
			return err
		}
		tx.Set(bucketKey(name), k.encode())
		return nil
	})
}

// document returns one of a bucket's documents, or the error that says that there is none.
func (b *objects) document(name string, f func(*bucket) []byte, none s3err.ErrorCode) ([]byte, error) {
	k, err := b.bucket(name)
	if err != nil {
		return nil, err
	}
	if d := f(k); d != nil {
		return d, nil
	}
	return nil, s3err.GetBucketErr(none, name)
}

func (b *objects) ListBuckets(_ context.Context, in s3response.ListBucketsInput) (s3response.ListAllMyBucketsResult, error) {
	out := s3response.ListAllMyBucketsResult{Owner: s3response.CanonicalUser{ID: in.Owner}, Prefix: in.Prefix}
	err := b.walkBuckets(in.Prefix, in.ContinuationToken, func(name string, k *bucket) (bool, error) {
		if !in.IsAdmin {
			acl, err := auth.ParseACL(k.acl)
			if err != nil || acl.Owner != in.Owner {
				return true, err
			}
		}
		if list := out.Buckets.Bucket; len(list) == int(in.MaxBuckets) {
			if len(list) > 0 {
				out.ContinuationToken = list[len(list)-1].Name
			}
			return false, nil
		}
		out.Buckets.Bucket = append(out.Buckets.Bucket, s3response.ListAllMyBucketsEntry{Name: name, CreationDate: k.created})
		return true, nil
	})
	return out, err
}

// walkBuckets calls f for each bucket behind after until it returns false.
func (b *objects) walkBuckets(prefix, after string, f func(string, *bucket) (bool, error)) error {
	return b.view(func(r store.Reader) (err error) {
		c := r.Scan(bucketKey(prefix), behind(bucketKey(prefix)))
		defer func() { err = errors.Join(err, c.Close()) }()
		for ok := c.Next(); ok; ok = c.Next() {
			name := string(c.Key()[1:])
			if name <= after {
				ok = c.Seek(append(bucketKey(after), 0))
				if !ok {
					break
				}
				name = string(c.Key()[1:])
			}
			k, err := parseBucket(c.Value())
			if err != nil {
				return err
			}
			if more, err := f(name, k); err != nil || !more {
				return err
			}
		}
		return nil
	})
}

func (b *objects) ListBucketsAndOwners(context.Context) (out []s3response.Bucket, err error) {
	err = b.walkBuckets("", "", func(name string, k *bucket) (bool, error) {
		acl, err := auth.ParseACL(k.acl)
		out = append(out, s3response.Bucket{Name: name, Owner: acl.Owner})
		return true, err
	})
	return out, err
}

func (b *objects) HeadBucket(_ context.Context, in *s3.HeadBucketInput) (*s3.HeadBucketOutput, error) {
	_, err := b.bucket(*in.Bucket)
	return &s3.HeadBucketOutput{}, err
}

func (b *objects) CreateBucket(ctx context.Context, in *s3.CreateBucketInput, acl []byte) error {
	owner, _ := ctx.Value("bucket-owner").(auth.Account)
	name := *in.Bucket
	k := &bucket{created: b.now(), acl: acl, ownership: string(in.ObjectOwnership)}
	rand.Read(k.id[:])
	if c := in.CreateBucketConfiguration; c != nil {
		tags, err := backend.ParseCreateBucketTags(c.Tags)
		if err != nil {
			return err
		}
		k.tags, k.tagged = tags, tags != nil
	}
	if in.ObjectLockEnabledForBucket != nil && *in.ObjectLockEnabledForBucket {
		var err error
		if k.lock, err = json.Marshal(auth.BucketLockConfig{Enabled: true, CreatedAt: &k.created}); err != nil {
			return fmt.Errorf("create bucket %s: %w", name, err)
		}
		k.versioning = versioned
	}
	defer b.forget(name)
	return b.update(func(tx store.Tx) error {
		row, ok, err := tx.Get(bucketKey(name))
		if err != nil {
			return err
		}
		if ok {
			old, err := parseBucket(row)
			if err != nil {
				return err
			}
			if acl, err := auth.ParseACL(old.acl); err == nil && acl.Owner == owner.Access {
				return s3err.GetBucketErr(s3err.ErrBucketAlreadyOwnedByYou, name)
			}
			return s3err.GetBucketErr(s3err.ErrBucketAlreadyExists, name)
		}
		tx.Set(bucketKey(name), k.encode())
		return nil
	})
}

// DeleteBucket leaves uploads that are under way to runExpiry.
func (b *objects) DeleteBucket(_ context.Context, name string) error {
	defer b.forget(name)
	b.forget(name)
	return b.update(func(tx store.Tx) error {
		k, err := find(tx, name)
		if err != nil {
			return err
		}
		all := append([]byte{rowObject}, k.id[:]...)
		c := tx.Scan(all, behind(all))
		used := c.Next()
		if err := c.Close(); err != nil {
			return err
		}
		switch {
		case used && k.versioning != unversioned:
			return s3err.GetBucketErr(s3err.ErrVersionedBucketNotEmpty, name)
		case used:
			return s3err.GetBucketErr(s3err.ErrBucketNotEmpty, name)
		}
		tx.Delete(bucketKey(name))
		if b.spare > 0 {
			b.trash(tx, bucketKey(name), k.encode())
		}
		return nil
	})
}

func (b *objects) PutBucketAcl(_ context.Context, name string, acl []byte) error {
	return b.change(name, func(k *bucket) error { k.acl = acl; return nil })
}

func (b *objects) GetBucketAcl(_ context.Context, in *s3.GetBucketAclInput) ([]byte, error) {
	k, err := b.bucket(*in.Bucket)
	if err != nil {
		return nil, err
	}
	return k.acl, nil
}

func (b *objects) ChangeBucketOwner(ctx context.Context, name, owner string) error {
	return auth.UpdateBucketACLOwner(ctx, b, name, owner)
}

func (b *objects) PutBucketVersioning(_ context.Context, name string, status types.BucketVersioningStatus) error {
	return b.change(name, func(k *bucket) error {
		switch status {
		case types.BucketVersioningStatusEnabled:
			k.versioning = versioned
		case types.BucketVersioningStatusSuspended:
			if k.locks() {
				return s3err.GetAPIError(s3err.ErrSuspendedVersioningNotAllowed)
			}
			k.versioning = suspended
		}
		return nil
	})
}

func (b *objects) GetBucketVersioning(_ context.Context, name string) (out s3response.GetBucketVersioningOutput, err error) {
	k, err := b.bucket(name)
	if err != nil {
		return out, err
	}
	status := types.BucketVersioningStatusEnabled
	switch k.versioning {
	case unversioned:
		return out, nil
	case suspended:
		status = types.BucketVersioningStatusSuspended
	}
	out.Status = &status
	return out, nil
}

func (b *objects) PutBucketPolicy(_ context.Context, name string, policy []byte) error {
	return b.change(name, func(k *bucket) error { k.policy = policy; return nil })
}

func (b *objects) GetBucketPolicy(_ context.Context, name string) ([]byte, error) {
	return b.document(name, func(k *bucket) []byte { return k.policy }, s3err.ErrNoSuchBucketPolicy)
}

func (b *objects) DeleteBucketPolicy(ctx context.Context, name string) error {
	return b.PutBucketPolicy(ctx, name, nil)
}

func (b *objects) PutBucketOwnershipControls(_ context.Context, name string, o types.ObjectOwnership) error {
	return b.change(name, func(k *bucket) error { k.ownership = strings.Clone(string(o)); return nil })
}

func (b *objects) GetBucketOwnershipControls(_ context.Context, name string) (types.ObjectOwnership, error) {
	k, err := b.bucket(name)
	if err == nil && k.ownership == "" {
		err = s3err.GetBucketErr(s3err.ErrOwnershipControlsNotFound, name)
	}
	if err != nil {
		return "", err
	}
	return types.ObjectOwnership(k.ownership), nil
}

func (b *objects) DeleteBucketOwnershipControls(ctx context.Context, name string) error {
	return b.PutBucketOwnershipControls(ctx, name, "")
}

func (b *objects) PutBucketCors(_ context.Context, name string, cors []byte) error {
	return b.change(name, func(k *bucket) error { k.cors = cors; return nil })
}

func (b *objects) GetBucketCors(_ context.Context, name string) ([]byte, error) {
	return b.document(name, func(k *bucket) []byte { return k.cors }, s3err.ErrNoSuchCORSConfiguration)
}

func (b *objects) DeleteBucketCors(ctx context.Context, name string) error {
	return b.PutBucketCors(ctx, name, nil)
}

func (b *objects) PutBucketWebsite(_ context.Context, name string, website []byte) error {
	return b.change(name, func(k *bucket) error { k.website = website; return nil })
}

func (b *objects) GetBucketWebsite(_ context.Context, name string) ([]byte, error) {
	return b.document(name, func(k *bucket) []byte { return k.website }, s3err.ErrNoSuchWebsiteConfiguration)
}

func (b *objects) DeleteBucketWebsite(ctx context.Context, name string) error {
	return b.PutBucketWebsite(ctx, name, nil)
}

func (b *objects) PutBucketTagging(_ context.Context, name string, tags map[string]string) error {
	return b.change(name, func(k *bucket) error { k.tags, k.tagged = tags, tags != nil; return nil })
}

func (b *objects) GetBucketTagging(_ context.Context, name string) (map[string]string, error) {
	k, err := b.bucket(name)
	if err == nil && !k.tagged {
		err = s3err.GetBucketErr(s3err.ErrBucketTaggingNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	if k.tags == nil {
		return map[string]string{}, nil
	}
	return maps.Clone(k.tags), nil
}

func (b *objects) DeleteBucketTagging(ctx context.Context, name string) error {
	return b.PutBucketTagging(ctx, name, nil)
}

// locks says whether objects of a bucket can be locked.
func (k *bucket) locks() bool {
	var c auth.BucketLockConfig
	return k.lock != nil && json.Unmarshal(k.lock, &c) == nil && c.Enabled
}

func (b *objects) PutObjectLockConfiguration(_ context.Context, name string, config []byte) error {
	return b.change(name, func(k *bucket) error {
		if k.versioning != versioned {
			return s3err.GetAPIError(s3err.ErrObjectLockConfigurationNotAllowed)
		}
		k.lock = bytes.Clone(config)
		return nil
	})
}

func (b *objects) GetObjectLockConfiguration(_ context.Context, name string) ([]byte, error) {
	return b.document(name, func(k *bucket) []byte { return k.lock }, s3err.ErrObjectLockConfigurationNotFound)
}
