package s3

import (
	"context"
	"crypto/md5"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/s3api/utils"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"

	"holdfast/store"
)

func (b *objects) newUpload() (u uploadID) {
	rand.Read(u[:])
	binary.BigEndian.PutUint64(u[:], uint64(b.now().UnixMilli())<<16|uint64(u[6])<<8|uint64(u[7]))
	u[6], u[8] = u[6]&0x0f|0x70, u[8]&0x3f|0x80
	return u
}

func (u uploadID) String() string {
	x := hex.EncodeToString(u[:])
	return x[:8] + "-" + x[8:12] + "-" + x[12:16] + "-" + x[16:20] + "-" + x[20:]
}

func parseUpload(s string) (u uploadID, err error) {
	if len(s) == 36 {
		if x, err := hex.DecodeString(strings.ReplaceAll(s, "-", "")); err == nil && len(x) == idSize {
			u = uploadID(x)
		}
	}
	if u.String() != s {
		return u, s3err.GetNoSuchUploadErr(strings.Clone(s))
	}
	return u, nil
}

// upload reads what an upload will be, an object without a body.
func upload(r store.Reader, where, name, id string) (*bucket, uploadID, *object, error) {
	k, err := find(r, where)
	if err != nil {
		return nil, uploadID{}, nil, err
	}
	u, err := parseUpload(id)
	if err != nil {
		return nil, u, nil, err
	}
	row, ok, err := r.Get(uploadKey(k.id, name, u))
	if err != nil {
		return nil, u, nil, err
	}
	if !ok {
		return k, u, nil, s3err.GetNoSuchUploadErr(strings.Clone(id))
	}
	o, err := parseObject(row, version{})
	return k, u, o, err
}

func (b *objects) CreateMultipartUpload(_ context.Context, in s3response.CreateMultipartUploadInput) (out s3response.InitiateMultipartUploadResult, err error) {
	name := str(in.Key)
	if err := checkName(name); err != nil {
		return out, err
	}
	o := &object{modified: b.now(), sum: checksum{algorithm: string(in.ChecksumAlgorithm), composite: in.ChecksumType == types.ChecksumTypeComposite}, headers: headers{
		contentType: str(in.ContentType), encoding: str(in.ContentEncoding), disposition: str(in.ContentDisposition), language: str(in.ContentLanguage),
		cacheControl: str(in.CacheControl), expires: str(in.Expires), redirect: str(in.WebsiteRedirectLocation), user: in.Metadata,
	}}
	if o.tags, err = backend.ParseObjectTags(str(in.Tagging)); err != nil {
		return out, err
	}
	u := b.newUpload()
	err = b.update(func(tx store.Tx) error {
		k, err := find(tx, *in.Bucket)
		if err != nil {
			return err
		}
		if o.retention, o.hold, err = locks(k, in.ObjectLockMode, in.ObjectLockRetainUntilDate, in.ObjectLockLegalHoldStatus); err != nil {
			return err
		}
		o.class = k.classOf(string(in.StorageClass))
		tx.Set(uploadKey(k.id, name, u), o.encode())
		return nil
	})
	return s3response.InitiateMultipartUploadResult{Bucket: *in.Bucket, Key: name, UploadId: u.String()}, err
}

// putPart keeps a part, in the place of the one that had its number.
func (b *objects) putPart(bucket, name, id string, number int32, p *part) error {
	return b.keep(p.body, func(tx store.Tx) error {
		_, u, _, err := upload(tx, bucket, name, id)
		if err != nil {
			return err
		}
		if err := dropPart(tx, u, uint16(number)); err != nil {
			return err
		}
		keepBody(tx, p.body)
		tx.Set(partKey(u, uint16(number)), p.encode())
		return nil
	})
}

func dropPart(tx store.Tx, u uploadID, number uint16) error {
	row, ok, err := tx.Get(partKey(u, number))
	if err != nil || !ok {
		return err
	}
	p, err := parsePart(row)
	if err == nil && len(p.body.Segments) > 0 {
		tx.Drop(p.body)
	}
	return err
}

// early reads an upload before its part's body is taken.
func (b *objects) early(bucket, name, id string) (o *object, err error) {
	err = b.view(func(r store.Reader) error {
		_, _, o, err = upload(r, bucket, name, id)
		return err
	})
	return o, err
}

func (b *objects) UploadPart(ctx context.Context, in *s3.UploadPartInput) (*s3.UploadPartOutput, error) {
	given := sums{in.ChecksumCRC32, in.ChecksumCRC32C, in.ChecksumCRC64NVME, in.ChecksumSHA1, in.ChecksumSHA256, in.ChecksumSHA512, in.ChecksumMD5, in.ChecksumXXHASH64, in.ChecksumXXHASH3, in.ChecksumXXHASH128}
	bucket, name, id := *in.Bucket, str(in.Key), str(in.UploadId)
	o, err := b.early(bucket, name, id)
	if err != nil {
		return nil, err
	}
	if *in.PartNumber < 1 || *in.PartNumber > maxParts {
		return nil, s3err.GetInvalidArgumentErr(s3err.InvalidArgPartNumber, fmt.Sprint(*in.PartNumber))
	}
	algorithm, want := given.one()
	if t, ok := in.Body.(interface{ Algorithm() string }); ok && t.Algorithm() != "" {
		algorithm = strings.ToUpper(t.Algorithm())
	}
	said := algorithm
	switch {
	case algorithm == "" && o.sum.composite:
		return nil, s3err.GetChecksumTypeMismatchErr(types.ChecksumAlgorithm(o.sum.algorithm), "null")
	case algorithm != "" && o.sum.algorithm != "" && algorithm != o.sum.algorithm:
		return nil, s3err.GetChecksumTypeMismatchErr(types.ChecksumAlgorithm(o.sum.algorithm), types.ChecksumAlgorithm(algorithm))
	case algorithm == "":
		algorithm = o.sum.algorithm
	}
	size := int64(0)
	if in.ContentLength != nil {
		size = *in.ContentLength
	}
	src, err := b.etags.source(in.Body, size, algorithm, want, o.sum.algorithm == "")
	if err != nil {
		return nil, b.answer(err)
	}
	defer src.close()
	src.pace = b.paceOf(ctx)
	p := &part{}
	if p.body, err = b.write(o.class, src, size, true); err != nil {
		return nil, err
	}
	p.size, p.modified, p.etag = p.body.Size, b.now(), src.etag()
	answer := checksum{}
	if said != "" || o.sum.algorithm != "" {
		answer.algorithm, answer.value = src.sum()
	}
	if o.sum.algorithm == "" {
		p.crc64 = src.crc64()
	} else {
		p.sum = answer
	}
	if err := b.putPart(bucket, name, id, *in.PartNumber, p); err != nil {
		return nil, err
	}
	c := answer.sums()
	return &s3.UploadPartOutput{
		ETag: quoted(p.etag), ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme, ChecksumSHA1: c.sha1, ChecksumSHA256: c.sha256,
		ChecksumSHA512: c.sha512, ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128,
	}, nil
}

func (b *objects) UploadPartCopy(_ context.Context, in *s3.UploadPartCopyInput) (out s3response.CopyPartResult, err error) {
	bucket, name, id := *in.Bucket, str(in.Key), str(in.UploadId)
	o, err := b.early(bucket, name, id)
	if err != nil {
		return out, err
	}
	s, err := b.origin(in.CopySource, in.ExpectedSourceBucketOwner, backend.PreConditions{IfMatch: in.CopySourceIfMatch, IfNoneMatch: in.CopySourceIfNoneMatch, IfModSince: in.CopySourceIfModifiedSince, IfUnmodeSince: in.CopySourceIfUnmodifiedSince})
	if err != nil {
		return out, err
	}
	off, n, err := backend.ParseCopySourceRange(s.object.size, str(in.CopySourceRange))
	if err != nil {
		return out, err
	}
	n = min(n, s.object.size-off)
	if n > maxCopy {
		return out, s3err.GetCopySourceObjectTooLargeErr(maxCopy)
	}
	r, err := b.body(context.Background(), s.object.body, off, n)
	if err != nil {
		return out, err
	}
	p := &part{}
	src, err := b.etags.source(r, n, o.sum.algorithm, "", o.sum.algorithm == "")
	if err == nil {
		defer src.close()
		p.body, err = b.write(o.class, src, n, true)
	}
	r.Close()
	if err != nil {
		return out, b.answer(err)
	}
	p.size, p.modified, p.etag = p.body.Size, b.now(), src.etag()
	if o.sum.algorithm == "" {
		p.crc64 = src.crc64()
	} else {
		p.sum.algorithm, p.sum.value = src.sum()
	}
	if err := b.putPart(bucket, name, id, *in.PartNumber, p); err != nil {
		return out, err
	}
	c := p.sum.sums()
	out = s3response.CopyPartResult{
		ETag: quoted(p.etag), LastModified: p.modified, ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme, ChecksumSHA1: c.sha1, ChecksumSHA256: c.sha256,
		ChecksumSHA512: c.sha512, ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128,
	}
	if s.bucket.versioning != unversioned {
		out.CopySourceVersionId = s.object.id()
	}
	return out, nil
}

// parts calls f for the parts of an upload behind a number.
func parts(r store.Reader, u uploadID, after int, f func(int, *part) bool) (err error) {
	c := r.Scan(partKey(u, uint16(min(after+1, 1<<16-1))), behind(append([]byte{rowPart}, u[:]...)))
	defer func() { err = errors.Join(err, c.Close()) }()
	for c.Next() {
		key := c.Key()
		if len(key) != 1+idSize+2 {
			return errRow
		}
		p, err := parsePart(c.Value())
		if err != nil {
			return err
		}
		if !f(int(binary.BigEndian.Uint16(key[1+idSize:])), p) {
			return nil
		}
	}
	return nil
}

func (b *objects) ListParts(_ context.Context, in *s3.ListPartsInput) (out s3response.ListPartsResult, err error) {
	after, most := 0, limit(in.MaxParts)
	if m := str(in.PartNumberMarker); m != "" {
		if after, err = strconv.Atoi(m); err != nil || after < 0 {
			return out, s3err.GetInvalidArgMaxLimiter("part-number-marker", m)
		}
	}
	err = b.view(func(r store.Reader) error {
		_, u, o, err := upload(r, *in.Bucket, str(in.Key), str(in.UploadId))
		if err != nil {
			return err
		}
		out = s3response.ListPartsResult{
			Bucket: *in.Bucket, Key: str(in.Key), UploadID: str(in.UploadId), MaxParts: most, PartNumberMarker: after, StorageClass: types.StorageClass(o.storageClass()),
			ChecksumAlgorithm: "null", ChecksumType: "null", Parts: []s3response.Part{},
		}
		if o.sum.algorithm != "" {
			out.ChecksumAlgorithm, out.ChecksumType = types.ChecksumAlgorithm(o.sum.algorithm), o.sum.kind()
		}
		return parts(r, u, after, func(number int, p *part) bool {
			if most > 0 && len(out.Parts) == most {
				out.IsTruncated = true
				return false
			}
			c := p.sum.sums()
			out.NextPartNumberMarker = number
			out.Parts = append(out.Parts, s3response.Part{
				PartNumber: number, ETag: *quoted(p.etag), LastModified: p.modified, Size: p.size, ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme,
				ChecksumSHA1: c.sha1, ChecksumSHA256: c.sha256, ChecksumSHA512: c.sha512, ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128,
			})
			return true
		})
	})
	return out, err
}

// maxListed bounds what a listing of uploads holds while it looks for common prefixes.
const maxListed = 100000

func (b *objects) ListMultipartUploads(_ context.Context, in *s3.ListMultipartUploadsInput) (out s3response.ListMultipartUploadsResult, err error) {
	k, err := b.bucket(*in.Bucket)
	if err != nil {
		return out, err
	}
	prefix, delimiter, after, most := str(in.Prefix), str(in.Delimiter), str(in.KeyMarker), limit(in.MaxUploads)
	var found []s3response.Upload
	err = b.view(func(r store.Reader) (err error) {
		all := appendName(append([]byte{rowUpload}, k.id[:]...), prefix)
		from := all
		if after != "" {
			from = later(all, behind(nameKey(rowUpload, k.id, after)))
		}
		c := r.Scan(from, behind(all))
		defer func() { err = errors.Join(err, c.Close()) }()
		for c.Next() && len(found) < maxListed {
			name, u, err := splitKey(c.Key())
			if err != nil {
				return err
			}
			o, err := parseObject(c.Value(), version{})
			if err != nil {
				return err
			}
			found = append(found, s3response.Upload{
				Key: name, UploadID: uploadID(u).String(), StorageClass: types.StorageClass(o.storageClass()), Initiated: o.modified,
				ChecksumAlgorithm: types.ChecksumAlgorithm(o.sum.algorithm), ChecksumType: o.sum.kind(),
			})
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	l, err := backend.ListMultipartUploads(found, prefix, delimiter, after, str(in.UploadIdMarker), most)
	if err != nil {
		return out, err
	}
	return s3response.ListMultipartUploadsResult{
		Bucket: *in.Bucket, Delimiter: delimiter, KeyMarker: after, MaxUploads: most, Prefix: prefix, UploadIDMarker: str(in.UploadIdMarker),
		NextKeyMarker: l.NextKeyMarker, NextUploadIDMarker: l.NextUploadIDMarker, IsTruncated: l.IsTruncated, Uploads: l.Uploads, CommonPrefixes: l.CommonPrefixes,
	}, nil
}

// end takes an upload and its parts away, but for the bodies of those that it became.
func end(tx store.Tx, key []byte, u uploadID, became map[int]bool) error {
	tx.Delete(key)
	var numbers []int
	if err := parts(tx, u, 0, func(number int, p *part) bool {
		numbers = append(numbers, number)
		if !became[number] && len(p.body.Segments) > 0 {
			tx.Drop(p.body)
		}
		return true
	}); err != nil {
		return err
	}
	for _, n := range numbers {
		tx.Delete(partKey(u, uint16(n)))
	}
	return nil
}

func (b *objects) AbortMultipartUpload(_ context.Context, in *s3.AbortMultipartUploadInput) error {
	return b.update(func(tx store.Tx) error {
		k, u, o, err := upload(tx, *in.Bucket, str(in.Key), str(in.UploadId))
		if err != nil {
			return err
		}
		if t := in.IfMatchInitiatedTime; t != nil && t.Unix() != o.modified.Unix() {
			return s3err.GetPreconditionFailedErr(s3err.ConditionIfMatchInitiatedTime)
		}
		return end(tx, uploadKey(k.id, str(in.Key), u), u, nil)
	})
}

// CompleteMultipartUpload joins the parts' bodies as they are.
func (b *objects) CompleteMultipartUpload(_ context.Context, in *s3.CompleteMultipartUploadInput) (out s3response.CompleteMultipartUploadResult, id string, err error) {
	given := sums{in.ChecksumCRC32, in.ChecksumCRC32C, in.ChecksumCRC64NVME, in.ChecksumSHA1, in.ChecksumSHA256, in.ChecksumSHA512, in.ChecksumMD5, in.ChecksumXXHASH64, in.ChecksumXXHASH3, in.ChecksumXXHASH128}
	name := str(in.Key)
	if in.MultipartUpload == nil || len(in.MultipartUpload.Parts) == 0 {
		return out, "", s3err.GetAPIError(s3err.ErrMalformedXML)
	}
	var o *object
	err = b.update(func(tx store.Tx) error {
		id = ""
		k, u, started, err := upload(tx, *in.Bucket, name, str(in.UploadId))
		if err != nil {
			if k == nil {
				return err
			}
			// A client that heard no answer asks again.
			if done, derr := newest(tx, k, name); derr == nil && done != nil && done.upload == str(in.UploadId) {
				o = done
				return nil
			}
			return err
		}
		if err := condition(tx, k, name, in.IfMatch, in.IfNoneMatch); err != nil {
			return err
		}
		var became map[int]bool
		if o, became, err = join(tx, u, started, in, &given); err != nil {
			return err
		}
		o.modified, o.upload = b.now(), u.String()
		if err := end(tx, uploadKey(k.id, name, u), u, became); err != nil {
			return err
		}
		if err := b.put(tx, k, name, o); err != nil {
			return err
		}
		if k.versioning == versioned {
			id = o.id()
		}
		return nil
	})
	if err != nil {
		return out, "", err
	}
	b.hold(o)
	c, kind := o.sum.sums(), o.sum.kind()
	return s3response.CompleteMultipartUploadResult{
		Bucket: in.Bucket, Key: in.Key, ETag: quoted(o.etag), ChecksumType: &kind, ChecksumCRC32: c.crc32, ChecksumCRC32C: c.crc32c, ChecksumCRC64NVME: c.crc64nvme, ChecksumSHA1: c.sha1,
		ChecksumSHA256: c.sha256, ChecksumSHA512: c.sha512, ChecksumMD5: c.md5, ChecksumXXHASH64: c.xxhash64, ChecksumXXHASH3: c.xxhash3, ChecksumXXHASH128: c.xxhash128,
	}, id, nil
}

// join makes an object of an upload and the parts that a client names.
func join(r store.Reader, u uploadID, started *object, in *s3.CompleteMultipartUploadInput, given *sums) (*object, map[int]bool, error) {
	if in.ChecksumType != "" && in.ChecksumType != started.sum.kind() {
		kind := started.sum.kind()
		if kind == "" {
			kind = "null"
		}
		return nil, nil, s3err.GetChecksumTypeMismatchOnMpErr(kind)
	}
	o := *started
	o.parts, o.body = nil, store.Body{}
	implied := o.sum.algorithm == ""
	if implied {
		o.sum.algorithm = crc64
	}
	algorithm := types.ChecksumAlgorithm(o.sum.algorithm)
	var composite *utils.CompositeChecksumReader
	if o.sum.composite {
		var err error
		if composite, err = utils.NewCompositeChecksumReader(utils.HashType(strings.ToLower(o.sum.algorithm))); err != nil {
			return nil, nil, err
		}
	}
	all, became, last := md5.New(), map[int]bool{}, int32(0)
	for i, asked := range in.MultipartUpload.Parts {
		if asked.PartNumber == nil || asked.ETag == nil {
			return nil, nil, s3err.GetAPIError(s3err.ErrMalformedXML)
		}
		number := *asked.PartNumber
		if number < 1 {
			return nil, nil, s3err.GetInvalidArgumentErr(s3err.InvalidArgCompleteMpPartNumber, fmt.Sprint(number))
		}
		if number <= last {
			return nil, nil, s3err.GetAPIError(s3err.ErrInvalidPartOrder)
		}
		last = number
		if number > maxParts {
			return nil, nil, s3err.GetInvalidPartErr(u.String(), number, *asked.ETag)
		}
		row, ok, err := r.Get(partKey(u, uint16(number)))
		if err != nil {
			return nil, nil, err
		}
		if !ok {
			return nil, nil, s3err.GetInvalidPartErr(u.String(), number, *asked.ETag)
		}
		p, err := parsePart(row)
		if err != nil {
			return nil, nil, err
		}
		if i < len(in.MultipartUpload.Parts)-1 && p.size < backend.MinPartSize {
			return nil, nil, s3err.GetEntityTooSmallErr(p.size, backend.MinPartSize)
		}
		if !backend.AreEtagsSame(p.etag, *asked.ETag) {
			return nil, nil, s3err.GetInvalidPartErr(u.String(), number, p.etag)
		}
		if err := comparePart(u, p, asked, implied); err != nil {
			return nil, nil, err
		}
		sum := p.sum.value
		if implied {
			sum = p.crc64
		}
		switch {
		case composite != nil:
			err = composite.Process(sum)
		case i == 0:
			o.sum.value = sum
		default:
			o.sum.value, err = utils.AddCRCChecksum(algorithm, o.sum.value, sum, p.size)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("checksum of part %d: %w", number, err)
		}
		raw, err := hex.DecodeString(p.etag)
		if err != nil {
			return nil, nil, errRow
		}
		all.Write(raw)
		became[int(number)] = true
		o.body.Size += p.size
		o.body.Segments = append(o.body.Segments, p.body.Segments...)
		o.parts = append(o.parts, o.body.Size)
	}
	n := len(o.parts)
	if o.size = o.body.Size; in.MpuObjectSize != nil && *in.MpuObjectSize != o.size {
		return nil, nil, s3err.GetIncorrectMpObjectSizeErr(o.size, *in.MpuObjectSize)
	}
	if len(o.body.Segments) > maxPieces {
		return nil, nil, s3err.GetEntityTooLargeErr(o.size, maxPieces*16<<20)
	}
	if composite != nil {
		o.sum.value = fmt.Sprintf("%s-%d", composite.Sum(), n)
	}
	if want := *given.of(o.sum.algorithm); want != nil && !implied {
		if w := *want; w != o.sum.value && !(composite != nil && !strings.Contains(w, "-") && fmt.Sprintf("%s-%d", w, n) == o.sum.value) {
			return nil, nil, s3err.GetChecksumBadDigestErr(algorithm)
		}
	}
	o.etag = fmt.Sprintf("%x-%d", all.Sum(nil), n)
	return &o, became, nil
}

// comparePart compares what a client says of a part's checksum.
func comparePart(u uploadID, p *part, asked types.CompletedPart, implied bool) error {
	given := sums{asked.ChecksumCRC32, asked.ChecksumCRC32C, asked.ChecksumCRC64NVME, asked.ChecksumSHA1, asked.ChecksumSHA256, asked.ChecksumSHA512, asked.ChecksumMD5, asked.ChecksumXXHASH64, asked.ChecksumXXHASH3, asked.ChecksumXXHASH128}
	var said []string
	var text strings.Builder
	for _, a := range []types.ChecksumAlgorithm{types.ChecksumAlgorithmCrc32, types.ChecksumAlgorithmCrc32c, types.ChecksumAlgorithmCrc64nvme, types.ChecksumAlgorithmSha1, types.ChecksumAlgorithmSha256,
		types.ChecksumAlgorithmSha512, types.ChecksumAlgorithmMd5, types.ChecksumAlgorithmXxhash64, types.ChecksumAlgorithmXxhash3, types.ChecksumAlgorithmXxhash128} {
		if v := *given.of(string(a)); v != nil && *v != "" {
			said = append(said, string(a))
			fmt.Fprintf(&text, "%s:%s;", a, *v)
		}
	}
	bad := s3err.GetInvalidPartErr(u.String(), *asked.PartNumber, *asked.ETag)
	switch {
	case len(said) > 1:
		return s3err.GetInvalidArgumentErr(s3err.InvalidArgChecksumPart, text.String())
	case implied && len(said) > 0:
		return bad
	case implied:
		return nil
	case len(said) == 0:
		return s3err.APIError{Code: "InvalidRequest", HTTPStatusCode: http.StatusBadRequest, Description: fmt.Sprintf("The upload was created using a %s checksum. The complete request must include the checksum for each part. It was missing for part %d in the request.", strings.ToLower(p.sum.algorithm), *asked.PartNumber)}
	}
	value := **given.of(said[0])
	switch {
	case !utils.IsValidChecksum(value, types.ChecksumAlgorithm(said[0])):
		return s3err.GetInvalidArgumentErr(s3err.InvalidArgChecksumPart, value)
	case said[0] != p.sum.algorithm:
		return s3err.APIError{Code: "BadDigest", HTTPStatusCode: http.StatusBadRequest, Description: fmt.Sprintf("The %s you specified for part %d did not match what we received.", strings.ToLower(said[0]), *asked.PartNumber)}
	case value != p.sum.value:
		return bad
	}
	return nil
}

// expire ends uploads that were begun too long ago, or whose bucket is gone or ends them.
func (b *objects) expire(before time.Time) error {
	live := map[bucketID]*lifecycle{}
	if err := b.walkBuckets("", "", func(_ string, k *bucket) (ok bool, err error) {
		if live[k.id] = nil; k.lifecycle != nil {
			live[k.id], err = parseLifecycle(k.lifecycle)
		}
		return true, err
	}); err != nil {
		return err
	}
	var old [][]byte
	err := b.view(func(r store.Reader) (err error) {
		c := r.Scan([]byte{rowUpload}, []byte{rowUpload + 1})
		defer func() { err = errors.Join(err, c.Close()) }()
		for c.Next() && len(old) < maxListed {
			name, _, err := splitKey(c.Key())
			if err != nil {
				return err
			}
			o, err := parseObject(c.Value(), version{})
			if err != nil {
				return err
			}
			rules, there := live[bucketID(c.Key()[1:1+bucketSize])]
			if !there || o.modified.Before(before) || rules.aborts(name, o, b.now()) {
				old = append(old, slices.Clone(c.Key()))
			}
		}
		return nil
	})
	for _, key := range old {
		_, u, kerr := splitKey(key)
		if err = errors.Join(err, kerr); err != nil {
			return err
		}
		err = b.update(func(tx store.Tx) error {
			if _, ok, err := tx.Get(key); err != nil || !ok {
				return err
			}
			return end(tx, key, u, nil)
		})
		if err != nil {
			return err
		}
	}
	return err
}
