package s3

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/oklog/ulid/v2"
	"github.com/valyala/fasthttp"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/s3api/utils"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"

	"holdfast/store"
)

func getObject(r store.Reader, k *bucket, name string, v version) (*object, error) {
	row, ok, err := r.Get(objectKey(k.id, name, v))
	if err != nil || !ok {
		return nil, err
	}
	return parseObject(row, v)
}

// newest reads the current version of a key, nil if there is none. It may be a delete marker.
func newest(r store.Reader, k *bucket, name string) (o *object, err error) {
	if k.versioning == unversioned {
		return getObject(r, k, name, version{})
	}
	return following(r, k, name, nil)
}

// following reads the version that comes after one, which is older. After nil comes the newest.
func following(r store.Reader, k *bucket, name string, after *version) (o *object, err error) {
	from := nameKey(rowObject, k.id, name)
	to := behind(from)
	if after != nil {
		from = append(appendVersion(from, *after), 0)
	}
	c := r.Scan(from, to)
	defer func() { err = errors.Join(err, c.Close()) }()
	if !c.Next() {
		return nil, nil
	}
	_, v, err := splitVersion(c.Key())
	if err != nil {
		return nil, err
	}
	return parseObject(c.Value(), v)
}

// nullObject reads the version of a key that is called null.
func nullObject(r store.Reader, k *bucket, name string) (*object, error) {
	if o, err := getObject(r, k, name, version{}); err != nil || o != nil || k.versioning == unversioned {
		return o, err
	}
	at, ok, err := r.Get(nameKey(rowNull, k.id, name))
	if err != nil || !ok {
		return nil, err
	}
	if len(at) != idSize {
		return nil, errRow
	}
	return getObject(r, k, name, version(at))
}

// exact reads the version that a client names, nil if there is none.
func exact(r store.Reader, k *bucket, name, id string) (*object, error) {
	if id == nullVersion {
		return nullObject(r, k, name)
	}
	v, err := parseVersion(id)
	if err != nil {
		return nil, err
	}
	o, err := getObject(r, k, name, v)
	if o != nil && o.null { // it has another name
		return nil, err
	}
	return o, err
}

func parseVersion(id string) (version, error) {
	v, err := ulid.ParseStrict(id)
	if err != nil || v == (version{}) {
		return v, s3err.GetInvalidArgumentErr(s3err.InvalidArgVersionId, strings.Clone(id))
	}
	return v, nil
}

// lookup reads the version that a client asks for: the current one for "". A delete marker comes with an error.
func lookup(r store.Reader, k *bucket, name, id string) (o *object, err error) {
	if id == "" {
		o, err = newest(r, k, name)
	} else {
		o, err = exact(r, k, name, id)
	}
	switch {
	case err != nil:
		return nil, err
	case o == nil && id == "":
		return nil, s3err.GetAPIError(s3err.ErrNoSuchKey)
	case o == nil:
		if any, err := newest(r, k, name); err != nil || any == nil {
			return nil, errors.Join(err, s3err.GetAPIError(s3err.ErrNoSuchKey))
		}
		return nil, s3err.GetNoSuchVersionErr(strings.Clone(name), strings.Clone(id))
	case o.marker && id == "":
		return o, s3err.GetAPIError(s3err.ErrNoSuchKey)
	case o.marker:
		return o, s3err.GetAPIError(s3err.ErrMethodNotAllowed)
	}
	return o, nil
}

// read is lookup in a view of its own.
func (b *objects) read(where, name, id string) (*bucket, *object, error) {
	k, err := b.bucket(where)
	if err != nil {
		return nil, nil, err
	}
	var o *object
	err = b.view(func(r store.Reader) (err error) {
		o, err = lookup(r, k, name, id)
		return err
	})
	return k, o, err
}

// locked says that an object may not go: the front end has asked before, but in another change. Governance is the front
// end's alone, which knows who may pass over it.
func (b *objects) locked(o *object) bool {
	if o.hold == holdOn {
		return true
	}
	var r types.ObjectLockRetention
	return o.retention != nil && json.Unmarshal(o.retention, &r) == nil && r.Mode == types.ObjectLockRetentionModeCompliance &&
		r.RetainUntilDate != nil && r.RetainUntilDate.After(b.now())
}

// remove takes one version away.
func (b *objects) remove(tx store.Tx, k *bucket, name string, o *object) error {
	if b.locked(o) {
		return s3err.GetAPIError(s3err.ErrObjectLocked)
	}
	key := objectKey(k.id, name, o.at)
	tx.Delete(key)
	if o.null && o.at != (version{}) {
		tx.Delete(nameKey(rowNull, k.id, name))
	}
	switch {
	case b.spare > 0:
		b.trash(tx, key, o.encode())
	case len(o.body.Segments) > 0:
		tx.Drop(o.body)
	}
	return nil
}

// put makes o the current version of a key, and gives it its version.
func (b *objects) put(tx store.Tx, k *bucket, name string, o *object) error {
	o.at, o.null = version{}, k.versioning != versioned
	if o.null { // there is one null version
		old, err := nullObject(tx, k, name)
		if err != nil {
			return err
		}
		if old != nil {
			if err := b.remove(tx, k, name, old); err != nil {
				return err
			}
		}
	}
	if k.versioning != unversioned {
		last, err := newest(tx, k, name)
		if err != nil {
			return err
		}
		if last == nil {
			last = &object{}
		}
		o.at = b.next(last.at)
		if o.null {
			tx.Set(nameKey(rowNull, k.id, name), o.at[:])
		}
	}
	b.watch(tx, k, name, o)
	tx.Set(objectKey(k.id, name, o.at), o.encode())
	return nil
}

// condition of a PUT, on what is there now.
func condition(r store.Reader, k *bucket, name string, match, noneMatch *string) error {
	if match == nil && noneMatch == nil {
		return nil
	}
	o, err := newest(r, k, name)
	if err != nil {
		return err
	}
	if o == nil || o.marker {
		return backend.EvaluateObjectPutPreconditions("", match, noneMatch, false)
	}
	return backend.EvaluateObjectPutPreconditions(o.etag, match, noneMatch, true)
}

// write stores a body, and says what is wrong with it. size is what is announced, from which POST differs.
func (b *objects) write(class string, s *source, size int64, exact bool) (store.Body, error) {
	b.busy.Add(1)
	defer b.busy.Add(-1)
	hint := size
	if !exact {
		hint = -1
	}
	body, err := b.store.Write(context.Background(), class, s, hint)
	if err == nil && !s.ended { // the signature of the last chunk, and what a trailer says, come at the end
		var one [1]byte
		_, _ = io.ReadFull(s, one[:])
	}
	switch {
	case s.err != nil: // whatever the store makes of it
		if err == nil {
			b.store.Discard(body)
		}
		var known s3err.S3Error
		if !errors.As(s.err, &known) {
			return body, s3err.GetAPIError(s3err.ErrIncompleteBody)
		}
		return body, b.answer(s.err)
	case s.cut, exact && s.n > size, exact && s.ended && s.n < size:
		if err == nil {
			b.store.Discard(body)
		}
		if s.cut {
			return body, s3err.GetAPIError(s3err.ErrIncompleteBody)
		}
		return body, s3err.GetAPIError(s3err.ErrContentLengthMismatch)
	}
	return body, b.answer(err)
}

// keep runs a change that keeps body. The body goes unless the change may happen yet.
func (b *objects) keep(body store.Body, f func(store.Tx) error) error {
	b.busy.Add(1)
	defer b.busy.Add(-1)
	err := b.store.Update(context.Background(), f)
	if err != nil && !errors.Is(err, store.ErrBusy) && len(body.Segments) > 0 {
		b.store.Discard(body)
	}
	return b.answer(err)
}

// keepBody is called in that change. An empty body has nothing to keep.
func keepBody(tx store.Tx, body store.Body) {
	if len(body.Segments) > 0 {
		tx.Keep(body)
	}
}

// locks are what a request says about the lock of a new object.
func locks(k *bucket, mode types.ObjectLockMode, until *time.Time, hold types.ObjectLockLegalHoldStatus) (retention []byte, held byte, err error) {
	if hold == types.ObjectLockLegalHoldStatusOn {
		held = holdOn
	}
	if mode != "" {
		retention, err = json.Marshal(types.ObjectLockRetention{Mode: types.ObjectLockRetentionMode(mode), RetainUntilDate: until})
	}
	if (held != 0 || retention != nil) && !k.locks() {
		err = s3err.GetAPIError(s3err.ErrMissingObjectLockConfigurationNoSpaces)
	}
	return retention, held, err
}

// classOf is the storage class of a new object.
func (k *bucket) classOf(asked string) string {
	if asked != "" {
		return strings.Clone(asked)
	}
	return k.class
}

func (b *objects) PutObject(ctx context.Context, in s3response.PutObjectInput) (out s3response.PutObjectOutput, err error) {
	given := sums{in.ChecksumCRC32, in.ChecksumCRC32C, in.ChecksumCRC64NVME, in.ChecksumSHA1, in.ChecksumSHA256, in.ChecksumSHA512, in.ChecksumMD5, in.ChecksumXXHASH64, in.ChecksumXXHASH3, in.ChecksumXXHASH128}
	o := &object{headers: headers{
		contentType: str(in.ContentType), encoding: str(in.ContentEncoding), disposition: str(in.ContentDisposition), language: str(in.ContentLanguage),
		cacheControl: str(in.CacheControl), expires: str(in.Expires), redirect: str(in.WebsiteRedirectLocation), user: in.Metadata,
	}}
	k, name := *in.Bucket, str(in.Key)
	if err := checkName(name); err != nil {
		return out, err
	}
	if o.tags, err = backend.ParseObjectTags(str(in.Tagging)); err != nil {
		return out, err
	}
	early, err := b.bucket(k)
	if err != nil {
		return out, err
	}
	if o.retention, o.hold, err = locks(early, in.ObjectLockMode, in.ObjectLockRetainUntilDate, in.ObjectLockLegalHoldStatus); err != nil {
		return out, err
	}
	if in.IfMatch != nil || in.IfNoneMatch != nil { // asked again when it counts: this spares a client its body
		if err := b.view(func(r store.Reader) error { return condition(r, early, name, in.IfMatch, in.IfNoneMatch) }); err != nil {
			return out, err
		}
	}
	algorithm, want := given.one()
	if algorithm == "" {
		algorithm = string(in.ChecksumAlgorithm)
	}
	if algorithm == "" {
		algorithm = crc64
	}
	size, exact := int64(0), true
	if in.ContentLength != nil {
		size = *in.ContentLength
	}
	if _, ok := in.Body.(utils.MpFileReader); ok { // a form, whose end is found by reading it
		exact = false
	}
	src, err := b.etags.source(in.Body, size, algorithm, want, false)
	if err != nil {
		return out, b.answer(err)
	}
	defer src.close()
	src.pace = b.paceOf(ctx)
	if c, ok := ctx.(*fasthttp.RequestCtx); ok { // versitygw does not pass it on
		o.class = string(c.Request.Header.Peek("X-Amz-Storage-Class"))
	}
	o.class = early.classOf(o.class)
	if o.body, err = b.write(o.class, src, size, exact); err != nil {
		return out, err
	}
	o.size, o.modified, o.etag = o.body.Size, b.now(), src.etag()
	o.sum.algorithm, o.sum.value = src.sum()
	var versions bool
	err = b.keep(o.body, func(tx store.Tx) error {
		k, err := find(tx, k)
		if err != nil {
			return err
		}
		if err := condition(tx, k, name, in.IfMatch, in.IfNoneMatch); err != nil {
			return err
		}
		keepBody(tx, o.body)
		versions = k.versioning == versioned
		return b.put(tx, k, name, o)
	})
	if err != nil {
		return out, err
	}
	b.hold(o)
	out = s3response.PutObjectOutput{ETag: *quoted(o.etag), Size: &o.size, ChecksumType: o.sum.kind()}
	if versions {
		out.VersionID = o.id()
	}
	c := o.sum.sums()
	out.ChecksumCRC32, out.ChecksumCRC32C, out.ChecksumCRC64NVME, out.ChecksumSHA1, out.ChecksumSHA256 = c.crc32, c.crc32c, c.crc64nvme, c.sha1, c.sha256
	out.ChecksumSHA512, out.ChecksumMD5, out.ChecksumXXHASH64, out.ChecksumXXHASH3, out.ChecksumXXHASH128 = c.sha512, c.md5, c.xxhash64, c.xxhash3, c.xxhash128
	return out, nil
}

func checkName(name string) error {
	switch {
	case name == "":
		return s3err.GetAPIError(s3err.ErrNoSuchKey)
	case len(name) > maxKey:
		return s3err.GetKeyTooLongErr(int64(len(name)), maxKey)
	}
	return nil
}

// span is the part of an object that a request asks for.
type span struct {
	off, n int64
	text   *string // Content-Range
	parts  *int32
}

func (o *object) span(header *string, number *int32) (p span, err error) {
	if number == nil {
		var ok bool
		p.off, p.n, ok, err = backend.ParseObjectRange(o.size, str(header))
		if err == nil && ok {
			p.text = text(fmt.Sprintf("bytes %d-%d/%d", p.off, p.off+p.n-1, o.size))
		}
		return p, err
	}
	ends := o.parts
	if ends == nil { // it came in one
		ends = []int64{o.size}
	} else {
		n := int32(len(ends))
		p.parts = &n
	}
	i := int(*number) - 1
	if i < 0 || i >= len(ends) {
		return p, s3err.GetInvalidPartNumberRangeErr(int32(len(ends)), *number)
	}
	if i > 0 {
		p.off = ends[i-1]
	}
	p.n = ends[i] - p.off
	if o.size > 0 {
		p.text = text(fmt.Sprintf("bytes %d-%d/%d", p.off, p.off+p.n-1, o.size))
	}
	return p, nil
}

// shown is the version that an answer names.
func (o *object) shown(k *bucket, asked string) *string {
	if k.versioning == unversioned && asked == "" {
		return nil
	}
	return text(o.id())
}

func (o *object) tagCount() *int32 {
	if len(o.tags) == 0 {
		return nil
	}
	n := int32(len(o.tags))
	return &n
}

func (o *object) storageClass() string {
	if o.class == "" {
		return string(types.StorageClassStandard)
	}
	return o.class
}

func yes() *bool { t := true; return &t }

func (b *objects) GetObject(ctx context.Context, in *s3.GetObjectInput) (*s3.GetObjectOutput, error) {
	k, o, err := b.read(*in.Bucket, str(in.Key), str(in.VersionId))
	if err != nil {
		if o != nil {
			return &s3.GetObjectOutput{DeleteMarker: yes(), LastModified: &o.modified}, err
		}
		return nil, err
	}
	if err := backend.EvaluatePreconditions(o.etag, o.modified, backend.PreConditions{IfMatch: in.IfMatch, IfNoneMatch: in.IfNoneMatch, IfModSince: in.IfModifiedSince, IfUnmodeSince: in.IfUnmodifiedSince}); err != nil {
		return nil, err
	}
	p, err := o.span(in.Range, in.PartNumber)
	if err != nil {
		return nil, err
	}
	h := &o.headers
	out := &s3.GetObjectOutput{
		AcceptRanges: text("bytes"), ContentLength: &p.n, ContentRange: p.text, PartsCount: p.parts, ETag: quoted(o.etag), LastModified: &o.modified,
		VersionId: o.shown(k, str(in.VersionId)), StorageClass: types.StorageClass(o.storageClass()), TagCount: o.tagCount(), Metadata: h.user,
		ContentType: text(h.contentType), ContentEncoding: text(h.encoding), ContentDisposition: text(h.disposition), ContentLanguage: text(h.language),
		CacheControl: text(h.cacheControl), ExpiresString: text(h.expires), WebsiteRedirectLocation: text(h.redirect),
	}
	out.ObjectLockMode, out.ObjectLockRetainUntilDate, out.ObjectLockLegalHoldStatus = o.lock()
	if in.ChecksumMode == types.ChecksumModeEnabled && p.n == o.size {
		c := o.sum.sums()
		out.ChecksumType = o.sum.kind()
		out.ChecksumCRC32, out.ChecksumCRC32C, out.ChecksumCRC64NVME, out.ChecksumSHA1, out.ChecksumSHA256 = c.crc32, c.crc32c, c.crc64nvme, c.sha1, c.sha256
		out.ChecksumSHA512, out.ChecksumMD5, out.ChecksumXXHASH64, out.ChecksumXXHASH3, out.ChecksumXXHASH128 = c.sha512, c.md5, c.xxhash64, c.xxhash3, c.xxhash128
	}
	if out.Body, err = b.body(ctx, o.body, p.off, p.n); err != nil {
		return nil, err
	}
	return out, nil
}

// body reads n bytes from off.
func (b *objects) body(ctx context.Context, body store.Body, off, n int64) (io.ReadCloser, error) {
	if n == 0 {
		return io.NopCloser(strings.NewReader("")), nil
	}
	r, err := b.store.Read(context.Background(), body, off, n)
	if err != nil {
		return nil, b.answer(err)
	}
	b.busy.Add(1)
	return &sending{r: r, pace: b.paceOf(ctx), b: b}, nil
}

// sending is a body on its way to a client.
type sending struct {
	r    io.ReadCloser
	pace *pace // nil is any
	b    *objects
	once sync.Once
}

func (s *sending) Read(p []byte) (int, error) {
	if s.pace != nil { // what was read before has been taken
		if err := s.pace.conn.SetWriteDeadline(time.Now().Add(s.pace.patience)); err != nil {
			return 0, err
		}
	}
	n, err := s.r.Read(p)
	s.failed(err)
	return n, err
}

// WriteTo implements io.WriterTo: a store's reader writes what it has where it lies.
func (s *sending) WriteTo(w io.Writer) (int64, error) {
	if s.pace != nil {
		w = paced{w, s.pace}
	}
	n, err := io.Copy(w, s.r)
	s.failed(err)
	return n, err
}

// failed logs what the client cannot be told any more: it has the header.
func (s *sending) failed(err error) {
	if errors.Is(err, store.ErrLost) || errors.Is(err, store.ErrBusy) {
		s.b.log.Error("a body ends early", "error", err)
	}
}

func (s *sending) Close() error {
	s.once.Do(func() { s.b.busy.Add(-1) })
	return s.r.Close()
}

// lock is what an answer says of one.
func (o *object) lock() (mode types.ObjectLockMode, until *time.Time, hold types.ObjectLockLegalHoldStatus) {
	switch o.hold {
	case holdOn:
		hold = types.ObjectLockLegalHoldStatusOn
	case holdOff:
		hold = types.ObjectLockLegalHoldStatusOff
	}
	var r types.ObjectLockRetention
	if o.retention != nil && json.Unmarshal(o.retention, &r) == nil {
		mode, until = types.ObjectLockMode(r.Mode), r.RetainUntilDate
	}
	return mode, until, hold
}

func (b *objects) HeadObject(_ context.Context, in *s3.HeadObjectInput) (*s3.HeadObjectOutput, error) {
	k, o, err := b.read(*in.Bucket, str(in.Key), str(in.VersionId))
	if err != nil {
		if o != nil && str(in.VersionId) != "" {
			return &s3.HeadObjectOutput{DeleteMarker: yes(), LastModified: &o.modified}, err
		}
		return nil, err
	}
	if err := backend.EvaluatePreconditions(o.etag, o.modified, backend.PreConditions{IfMatch: in.IfMatch, IfNoneMatch: in.IfNoneMatch, IfModSince: in.IfModifiedSince, IfUnmodeSince: in.IfUnmodifiedSince}); err != nil {
		return nil, err
	}
	p, err := o.span(in.Range, in.PartNumber)
	if err != nil {
		return nil, err
	}
	h := &o.headers
	out := &s3.HeadObjectOutput{
		AcceptRanges: text("bytes"), ContentLength: &p.n, ContentRange: p.text, PartsCount: p.parts, ETag: quoted(o.etag), LastModified: &o.modified,
		VersionId: o.shown(k, str(in.VersionId)), StorageClass: types.StorageClass(o.storageClass()), TagCount: o.tagCount(), Metadata: h.user,
		ContentType: text(h.contentType), ContentEncoding: text(h.encoding), ContentDisposition: text(h.disposition), ContentLanguage: text(h.language),
		CacheControl: text(h.cacheControl), ExpiresString: text(h.expires), WebsiteRedirectLocation: text(h.redirect),
	}
	out.ObjectLockMode, out.ObjectLockRetainUntilDate, out.ObjectLockLegalHoldStatus = o.lock()
	if in.ChecksumMode == types.ChecksumModeEnabled && p.n == o.size {
		c := o.sum.sums()
		out.ChecksumType = o.sum.kind()
		out.ChecksumCRC32, out.ChecksumCRC32C, out.ChecksumCRC64NVME, out.ChecksumSHA1, out.ChecksumSHA256 = c.crc32, c.crc32c, c.crc64nvme, c.sha1, c.sha256
		out.ChecksumSHA512, out.ChecksumMD5, out.ChecksumXXHASH64, out.ChecksumXXHASH3, out.ChecksumXXHASH128 = c.sha512, c.md5, c.xxhash64, c.xxhash3, c.xxhash128
	}
	return out, nil
}

func (b *objects) GetObjectAttributes(_ context.Context, in *s3.GetObjectAttributesInput) (out s3response.GetObjectAttributesResponse, err error) {
	k, o, err := b.read(*in.Bucket, str(in.Key), str(in.VersionId))
	if err != nil {
		if o != nil && str(in.VersionId) != "" {
			return s3response.GetObjectAttributesResponse{DeleteMarker: yes()}, s3err.GetAPIError(s3err.ErrNoSuchKey)
		}
		return out, err
	}
	c := o.sum.sums()
	out = s3response.GetObjectAttributesResponse{
		ETag: text(o.etag), ObjectSize: &o.size, StorageClass: types.StorageClass(o.storageClass()), LastModified: &o.modified, VersionId: o.shown(k, str(in.VersionId)),
		Checksum: &types.Checksum{
			ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme, ChecksumSHA1: c.sha1, ChecksumSHA256: c.sha256, ChecksumSHA512: c.sha512,
			ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128, ChecksumType: o.sum.kind(),
		},
	}
	return out, nil
}

// retire ends a current version, which may be nil, and returns the delete marker that hides it if versions are kept.
func (b *objects) retire(tx store.Tx, k *bucket, name string, o *object) (*object, error) {
	if k.versioning != unversioned {
		m := &object{marker: true, modified: b.now()}
		return m, b.put(tx, k, name, m)
	}
	if o == nil {
		return nil, nil
	}
	return nil, b.remove(tx, k, name, o)
}

func (b *objects) DeleteObject(_ context.Context, in *s3.DeleteObjectInput) (out *s3.DeleteObjectOutput, err error) {
	name, id := str(in.Key), str(in.VersionId)
	if err := checkName(name); err != nil {
		return nil, err
	}
	if id != "" && id != nullVersion {
		if _, err := parseVersion(id); err != nil {
			return nil, err
		}
	}
	fits := func(o *object) error {
		return backend.EvaluateObjectDeletePreconditions(o.etag, o.modified, o.size, backend.ObjectDeletePreconditions{IfMatch: in.IfMatch, IfMatchLastModTime: in.IfMatchLastModifiedTime, IfMatchSize: in.IfMatchSize})
	}
	err = b.update(func(tx store.Tx) error {
		out = &s3.DeleteObjectOutput{}
		k, err := find(tx, *in.Bucket)
		if err != nil {
			return err
		}
		if id != "" {
			o, err := exact(tx, k, name, id)
			if k.versioning != unversioned || o != nil {
				out.VersionId = in.VersionId
			}
			if err != nil || o == nil {
				return err
			}
			if err := fits(o); err != nil {
				return err
			}
			out.DeleteMarker = &o.marker
			return b.remove(tx, k, name, o)
		}
		o, err := newest(tx, k, name)
		if err != nil {
			return err
		}
		if o != nil && !o.marker {
			if err := fits(o); err != nil {
				return err
			}
		}
		m, err := b.retire(tx, k, name, o)
		if m != nil {
			out.DeleteMarker, out.VersionId = yes(), text(m.id())
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (b *objects) DeleteObjects(ctx context.Context, in *s3.DeleteObjectsInput) (out s3response.DeleteResult, err error) {
	out.Deleted, out.Error = []types.DeletedObject{}, []types.Error{}
	for _, o := range in.Delete.Objects {
		res, err := b.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: in.Bucket, Key: o.Key, VersionId: o.VersionId, IfMatch: o.ETag, IfMatchLastModifiedTime: o.LastModifiedTime, IfMatchSize: o.Size})
		if err != nil {
			out.Error = append(out.Error, s3err.ObjectDeleteError(o.Key, o.VersionId, err))
			continue
		}
		d := types.DeletedObject{Key: o.Key, VersionId: o.VersionId, DeleteMarker: res.DeleteMarker}
		if d.DeleteMarker != nil && *d.DeleteMarker {
			d.DeleteMarkerVersionId = res.VersionId
		}
		out.Deleted = append(out.Deleted, d)
	}
	return out, nil
}

// origin is what a copy is made of.
type origin struct {
	bucket *bucket
	object *object
	name   string
	where  string // its bucket
	id     string
}

const maxCopy = 5 << 30

func (b *objects) origin(header, owner *string, pre backend.PreConditions) (s origin, err error) {
	if s.where, s.name, s.id, err = backend.ParseCopySource(str(header)); err != nil {
		return s, err
	}
	if owner != nil && *owner != "" {
		k, err := b.bucket(s.where)
		if err != nil {
			return s, err
		}
		if acl, err := auth.ParseACL(k.acl); err != nil || acl.Owner != *owner {
			return s, s3err.GetAPIError(s3err.ErrAccessDenied)
		}
	}
	if s.bucket, s.object, err = b.read(s.where, s.name, s.id); err != nil {
		if s.object != nil && s.id != "" {
			err = s3err.GetAPIError(s3err.ErrInvalidRequest) // a delete marker
		}
		return s, err
	}
	return s, backend.EvaluatePreconditions(s.object.etag, s.object.modified, pre)
}

// CopyObject reads and writes again: segments belong to one object. One that is copied onto itself keeps its body.
func (b *objects) CopyObject(_ context.Context, in s3response.CopyObjectInput) (out s3response.CopyObjectOutput, err error) {
	name := str(in.Key)
	if err := checkName(name); err != nil {
		return out, err
	}
	s, err := b.origin(in.CopySource, in.ExpectedSourceBucketOwner, backend.PreConditions{IfMatch: in.CopySourceIfMatch, IfNoneMatch: in.CopySourceIfNoneMatch, IfModSince: in.CopySourceIfModifiedSince, IfUnmodeSince: in.CopySourceIfUnmodifiedSince})
	if err != nil {
		return out, err
	}
	if s.object.size > maxCopy {
		return out, s3err.GetCopySourceObjectTooLargeErr(maxCopy)
	}
	early, err := b.bucket(*in.Bucket)
	if err != nil {
		return out, err
	}
	self := s.where == *in.Bucket && s.name == name && s.id == ""
	if self && in.MetadataDirective != types.MetadataDirectiveReplace && in.StorageClass == "" && str(in.WebsiteRedirectLocation) == "" {
		return out, s3err.GetAPIError(s3err.ErrInvalidCopyDest)
	}
	o := &object{etag: s.object.etag, sum: s.object.sum, class: early.classOf(string(in.StorageClass)), headers: s.object.headers, tags: s.object.tags}
	if in.MetadataDirective == types.MetadataDirectiveReplace || self {
		o.headers = headers{contentType: str(in.ContentType), encoding: str(in.ContentEncoding), disposition: str(in.ContentDisposition), language: str(in.ContentLanguage), cacheControl: str(in.CacheControl), expires: str(in.Expires), user: in.Metadata}
	}
	o.headers.redirect = str(in.WebsiteRedirectLocation) // is not copied
	if in.TaggingDirective == types.TaggingDirectiveReplace {
		if o.tags, err = backend.ParseObjectTags(str(in.Tagging)); err != nil {
			return out, err
		}
	}
	if o.retention, o.hold, err = locks(early, in.ObjectLockMode, in.ObjectLockRetainUntilDate, in.ObjectLockLegalHoldStatus); err != nil {
		return out, err
	}
	algorithm := string(in.ChecksumAlgorithm)
	if algorithm == "" {
		algorithm = s.object.sum.algorithm
	}
	if algorithm == "" {
		algorithm = crc64
	}
	r, err := b.body(context.Background(), s.object.body, 0, s.object.size)
	if err != nil {
		return out, err
	}
	src, err := b.etags.source(r, s.object.size, algorithm, "", false)
	if err == nil {
		defer src.close()
		o.body, err = b.write(o.class, src, s.object.size, true)
	}
	r.Close()
	if err != nil {
		return out, b.answer(err)
	}
	o.size, o.modified, o.etag = o.body.Size, b.now(), src.etag()
	o.sum.algorithm, o.sum.value = src.sum()
	o.sum.composite = false
	var versions bool
	err = b.keep(o.body, func(tx store.Tx) error {
		k, err := find(tx, *in.Bucket)
		if err != nil {
			return err
		}
		keepBody(tx, o.body)
		versions = k.versioning == versioned
		return b.put(tx, k, name, o)
	})
	if err != nil {
		return out, err
	}
	b.hold(o)
	c := o.sum.sums()
	out.CopyObjectResult = &s3response.CopyObjectResult{
		ETag: quoted(o.etag), LastModified: &o.modified, ChecksumType: o.sum.kind(), ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme,
		ChecksumSHA1: c.sha1, ChecksumSHA256: c.sha256, ChecksumSHA512: c.sha512, ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128,
	}
	if versions {
		out.VersionId = text(o.id())
	}
	if s.bucket.versioning != unversioned {
		out.CopySourceVersionId = text(s.object.id())
	}
	return out, nil
}

// alter changes what is kept beside a version.
func (b *objects) alter(where, name, id string, f func(*bucket, *object) error) error {
	var o *object
	err := b.update(func(tx store.Tx) error {
		k, err := find(tx, where)
		if err != nil {
			return err
		}
		o, err = lookup(tx, k, name, id)
		if o != nil && o.marker {
			err = s3err.GetAPIError(s3err.ErrMethodNotAllowed)
		}
		if err != nil {
			return err
		}
		if err := f(k, o); err != nil {
			return err
		}
		b.watch(tx, k, name, o)
		tx.Set(objectKey(k.id, name, o.at), o.encode())
		return nil
	})
	if err == nil {
		b.hold(o)
	}
	return err
}

// beside reads what is kept beside a version.
func (b *objects) beside(where, name, id string) (*bucket, *object, error) {
	k, o, err := b.read(where, name, id)
	if o != nil && o.marker {
		err = s3err.GetAPIError(s3err.ErrMethodNotAllowed)
	}
	return k, o, err
}

func (b *objects) GetObjectTagging(_ context.Context, where, name, id string) (map[string]string, error) {
	_, o, err := b.beside(where, name, id)
	if err != nil {
		return nil, err
	}
	if o.tags == nil {
		return map[string]string{}, nil
	}
	return o.tags, nil
}

func (b *objects) PutObjectTagging(_ context.Context, where, name, id string, tags map[string]string) error {
	tags = maps.Clone(tags)
	return b.alter(where, name, id, func(_ *bucket, o *object) error { o.tags = tags; return nil })
}

func (b *objects) DeleteObjectTagging(ctx context.Context, where, name, id string) error {
	return b.PutObjectTagging(ctx, where, name, id, nil)
}

func (b *objects) PutObjectLegalHold(_ context.Context, where, name, id string, on bool) error {
	return b.alter(where, name, id, func(k *bucket, o *object) error {
		if !k.locks() {
			return s3err.GetAPIError(s3err.ErrMissingObjectLockConfiguration)
		}
		if o.hold = holdOff; on {
			o.hold = holdOn
		}
		return nil
	})
}

func (b *objects) GetObjectLegalHold(_ context.Context, where, name, id string) (*bool, error) {
	k, o, err := b.beside(where, name, id)
	switch {
	case err != nil:
		return nil, err
	case !k.locks():
		return nil, s3err.GetAPIError(s3err.ErrMissingObjectLockConfiguration)
	case o.hold == 0:
		return nil, s3err.GetAPIError(s3err.ErrNoSuchObjectLockConfiguration)
	}
	on := o.hold == holdOn
	return &on, nil
}

func (b *objects) PutObjectRetention(_ context.Context, where, name, id string, retention []byte) error {
	return b.alter(where, name, id, func(k *bucket, o *object) error {
		if !k.locks() {
			return s3err.GetAPIError(s3err.ErrMissingObjectLockConfiguration)
		}
		if b.weakens(o, retention) {
			return s3err.GetAPIError(s3err.ErrObjectLocked)
		}
		o.retention = append([]byte(nil), retention...)
		return nil
	})
}

// weakens says whether a retention would let go of what is kept until a time for good.
func (b *objects) weakens(o *object, retention []byte) bool {
	var old, now types.ObjectLockRetention
	if o.retention == nil || json.Unmarshal(o.retention, &old) != nil || old.Mode != types.ObjectLockRetentionModeCompliance || old.RetainUntilDate == nil || old.RetainUntilDate.Before(b.now()) {
		return false
	}
	return json.Unmarshal(retention, &now) != nil || now.Mode != old.Mode || now.RetainUntilDate == nil || now.RetainUntilDate.Before(*old.RetainUntilDate)
}

func (b *objects) GetObjectRetention(_ context.Context, where, name, id string) ([]byte, error) {
	k, o, err := b.beside(where, name, id)
	switch {
	case err != nil:
		return nil, err
	case !k.locks():
		return nil, s3err.GetAPIError(s3err.ErrMissingObjectLockConfiguration)
	case o.retention == nil:
		return nil, s3err.GetAPIError(s3err.ErrNoSuchObjectLockConfiguration)
	}
	return o.retention, nil
}

// NormalizeObjectKey implements backend.Backend: a key means itself.
func (b *objects) NormalizeObjectKey(_, name string) string { return name }
