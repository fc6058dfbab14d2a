package s3

import (
	"bytes"
	"context"
	"errors"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/s3response"

	"holdfast/store"
)

// page is what a listing asks for.
type page struct {
	prefix, delimiter string
	after             string   // a key, or a common prefix
	version           *version // of that key: the listing begins behind it
	max               int
	all               bool // versions and delete markers too
}

// listed is what it gets: entries and prefixes count alike.
type listed struct {
	prefixes  []types.CommonPrefix
	n         int
	truncated bool
	name      string  // of the last entry, or the last prefix
	version   *object // of the last entry
}

// list walks a page, and calls f for each entry. It does not look at what it passes over: a key's older versions, and all
// that is behind a common prefix, cost one seek.
func list(r store.Reader, k *bucket, p page, f func(name string, o *object, latest bool)) (out listed, err error) {
	if p.max <= 0 {
		return out, nil
	}
	all := appendName(append([]byte{rowObject}, k.id[:]...), p.prefix)
	if len(p.prefix) > maxKey { // there are none
		return out, nil
	}
	c := r.Scan(all, behind(all))
	defer func() { err = errors.Join(err, c.Close()) }()
	var ok bool
	var seen string // whose newest version was passed
	switch cut, whole := p.common(p.after); {
	case p.after == "":
		ok = c.Next()
	case whole && cut == p.after: // a prefix that was listed
		ok = c.Seek(later(all, behind(appendName(append([]byte{rowObject}, k.id[:]...), p.after))))
	case p.version != nil: // it may be gone, and so may all that were newer
		from := later(all, append(objectKey(k.id, p.after, *p.version), 0))
		if ok = c.Seek(later(all, nameKey(rowObject, k.id, p.after))); ok && bytes.Compare(c.Key(), from) < 0 {
			seen = p.after
			ok = c.Seek(from)
		}
	default:
		ok = c.Seek(later(all, behind(nameKey(rowObject, k.id, p.after))))
	}
	for ok {
		name, v, err := splitVersion(c.Key())
		if err != nil {
			return out, err
		}
		latest := name != seen
		seen = name
		if prefix, ok := p.common(name); ok {
			o, err := shownBehind(c, p.all)
			if err != nil {
				return out, err
			}
			if !o { // a delete marker alone makes no prefix: look on
				if ok = c.Seek(behind(nameKey(rowObject, k.id, name))); !ok {
					break
				}
				continue
			}
			if out.n == p.max {
				out.truncated = true
				return out, nil
			}
			out.prefixes = append(out.prefixes, types.CommonPrefix{Prefix: &prefix})
			out.n, out.name, out.version = out.n+1, prefix, nil
			if !c.Seek(behind(appendName(append([]byte{rowObject}, k.id[:]...), prefix))) {
				break
			}
			continue
		}
		o, err := parseObject(c.Value(), v)
		if err != nil {
			return out, err
		}
		if p.all || !o.marker {
			if out.n == p.max {
				out.truncated = true
				return out, nil
			}
			f(name, o, latest)
			out.n, out.name, out.version = out.n+1, name, o
		}
		if p.all || k.versioning == unversioned {
			ok = c.Next()
		} else {
			ok = c.Seek(behind(nameKey(rowObject, k.id, name)))
		}
	}
	return out, nil
}

// shownBehind says whether the row at a cursor is one that a listing shows.
func shownBehind(c store.Cursor, all bool) (bool, error) {
	if all {
		return true, nil
	}
	o, err := parseObject(c.Value(), version{})
	return err == nil && !o.marker, err
}

func later(a, b []byte) []byte {
	if bytes.Compare(a, b) > 0 {
		return a
	}
	return b
}

// common is the prefix that a key is listed under, if it is under one.
func (p *page) common(name string) (string, bool) {
	if p.delimiter == "" || !strings.HasPrefix(name, p.prefix) {
		return "", false
	}
	before, _, ok := strings.Cut(name[len(p.prefix):], p.delimiter)
	return p.prefix + before + p.delimiter, ok
}

// objects lists current versions.
func (b *objects) list(name string, p page, owner bool) (out []s3response.Object, l listed, err error) {
	k, err := b.bucket(name)
	if err != nil {
		return nil, l, err
	}
	var by *types.Owner
	if owner {
		acl, err := auth.ParseACL(k.acl)
		if err != nil {
			return nil, l, err
		}
		by = &types.Owner{ID: &acl.Owner}
	}
	out = make([]s3response.Object, 0, min(p.max, 1000))
	err = b.view(func(r store.Reader) (err error) {
		l, err = list(r, k, p, func(name string, o *object, _ bool) {
			out = append(out, s3response.Object{
				Key: &name, ETag: quoted(o.etag), LastModified: &o.modified, Size: &o.size, StorageClass: types.ObjectStorageClass(o.storageClass()), Owner: by,
				ChecksumAlgorithm: []types.ChecksumAlgorithm{types.ChecksumAlgorithm(o.sum.algorithm)}, ChecksumType: o.sum.kind(),
			})
		})
		return err
	})
	return out, l, err
}

func limit(p *int32) int {
	if p == nil {
		return 0
	}
	return int(*p)
}

func (b *objects) ListObjects(_ context.Context, in *s3.ListObjectsInput) (out s3response.ListObjectsResult, err error) {
	p := page{prefix: str(in.Prefix), delimiter: str(in.Delimiter), after: str(in.Marker), max: limit(in.MaxKeys)}
	found, l, err := b.list(*in.Bucket, p, true)
	if err != nil {
		return out, err
	}
	out = s3response.ListObjectsResult{Name: in.Bucket, Prefix: text(p.prefix), Marker: text(p.after), Delimiter: text(p.delimiter), MaxKeys: in.MaxKeys, IsTruncated: &l.truncated, Contents: found, CommonPrefixes: l.prefixes}
	if l.truncated {
		out.NextMarker = &l.name
	}
	return out, nil
}

func (b *objects) ListObjectsV2(_ context.Context, in *s3.ListObjectsV2Input) (out s3response.ListObjectsV2Result, err error) {
	p := page{prefix: str(in.Prefix), delimiter: str(in.Delimiter), after: max(str(in.StartAfter), str(in.ContinuationToken)), max: limit(in.MaxKeys)}
	found, l, err := b.list(*in.Bucket, p, in.FetchOwner != nil && *in.FetchOwner)
	if err != nil {
		return out, err
	}
	n := int32(l.n)
	out = s3response.ListObjectsV2Result{
		Name: in.Bucket, Prefix: text(p.prefix), StartAfter: text(str(in.StartAfter)), ContinuationToken: text(str(in.ContinuationToken)), Delimiter: text(p.delimiter), MaxKeys: in.MaxKeys,
		KeyCount: &n, IsTruncated: &l.truncated, Contents: found, CommonPrefixes: l.prefixes,
	}
	if l.truncated {
		out.NextContinuationToken = &l.name
	}
	return out, nil
}

// markerID is what NextVersionIdMarker calls a version: its place, so that a listing goes on there when the version is gone.
func (o *object) markerID() string {
	if o.at == (version{}) {
		return nullVersion
	}
	return o.at.String()
}

// place reads what markerID wrote, or a version's own name. A null version that is gone was the oldest if markerID named it.
func place(r store.Reader, k *bucket, name, id string) (*version, error) {
	if id != nullVersion {
		v, err := parseVersion(id)
		return &v, err
	}
	o, err := nullObject(r, k, name)
	if err != nil || o == nil {
		return &version{}, err
	}
	return &o.at, nil
}

func (b *objects) ListObjectVersions(_ context.Context, in *s3.ListObjectVersionsInput) (out s3response.ListVersionsResult, err error) {
	p := page{prefix: str(in.Prefix), delimiter: str(in.Delimiter), after: str(in.KeyMarker), max: limit(in.MaxKeys), all: true}
	k, err := b.bucket(*in.Bucket)
	if err != nil {
		return out, err
	}
	out = s3response.ListVersionsResult{Name: in.Bucket, Prefix: &p.prefix, Delimiter: &p.delimiter, KeyMarker: &p.after, VersionIdMarker: in.VersionIdMarker, MaxKeys: in.MaxKeys}
	err = b.view(func(r store.Reader) error {
		if id := str(in.VersionIdMarker); id != "" && p.after != "" {
			if p.version, err = place(r, k, p.after, id); err != nil {
				return err
			}
		}
		l, err := list(r, k, p, func(name string, o *object, latest bool) {
			id := o.id()
			if o.marker {
				out.DeleteMarkers = append(out.DeleteMarkers, types.DeleteMarkerEntry{Key: &name, VersionId: &id, IsLatest: &latest, LastModified: &o.modified})
				return
			}
			out.Versions = append(out.Versions, s3response.ObjectVersion{
				Key: &name, VersionId: &id, IsLatest: &latest, LastModified: &o.modified, ETag: quoted(o.etag), Size: &o.size,
				StorageClass: types.ObjectVersionStorageClass(o.storageClass()), ChecksumAlgorithm: []types.ChecksumAlgorithm{types.ChecksumAlgorithm(o.sum.algorithm)}, ChecksumType: o.sum.kind(),
			})
		})
		out.IsTruncated, out.CommonPrefixes = &l.truncated, l.prefixes
		if l.truncated {
			out.NextKeyMarker = &l.name
			if l.version != nil {
				out.NextVersionIdMarker = text(l.version.markerID())
			}
		}
		return err
	})
	return out, err
}
