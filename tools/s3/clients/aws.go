package main

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
)

// amz is a bucket seen through aws-sdk-go-v2.
type amz struct {
	*s3.Client
	bucket *string
}

func awsClient(s server, secret string) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &s.endpoint, Region: "us-east-1", UsePathStyle: true, RetryMaxAttempts: 1,
		Credentials: credentials.NewStaticCredentialsProvider(s.access, secret, ""),
	})
}

func (a *amz) put(ctx context.Context, key string, b []byte, set ...func(*s3.PutObjectInput)) (*s3.PutObjectOutput, error) {
	in := &s3.PutObjectInput{Bucket: a.bucket, Key: &key, Body: bytes.NewReader(b)}
	for _, f := range set {
		f(in)
	}
	return a.PutObject(ctx, in)
}

func (a *amz) get(ctx context.Context, key string, set ...func(*s3.GetObjectInput)) ([]byte, *s3.GetObjectOutput, error) {
	in := &s3.GetObjectInput{Bucket: a.bucket, Key: &key, ChecksumMode: types.ChecksumModeEnabled}
	for _, f := range set {
		f(in)
	}
	out, err := a.GetObject(ctx, in)
	if err != nil {
		return nil, nil, err
	}
	defer out.Body.Close()
	b, err := io.ReadAll(out.Body)
	return b, out, err
}

func (a *amz) holds(ctx context.Context, key string, want []byte) error {
	b, _, err := a.get(ctx, key)
	if err != nil {
		return err
	}
	return first(equal(key, b, want))
}

func (a *amz) remove(ctx context.Context, key string, version *string) (*s3.DeleteObjectOutput, error) {
	return a.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: a.bucket, Key: &key, VersionId: version})
}

// multipart puts parts, and completes them.
func (a *amz) multipart(ctx context.Context, key string, algorithm types.ChecksumAlgorithm, kind types.ChecksumType, parts ...[]byte) (*s3.CompleteMultipartUploadOutput, error) {
	u, err := a.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: a.bucket, Key: &key, ChecksumAlgorithm: algorithm, ChecksumType: kind})
	if err != nil {
		return nil, err
	}
	var done []types.CompletedPart
	for i, b := range parts {
		n := int32(i + 1)
		p, err := a.UploadPart(ctx, &s3.UploadPartInput{Bucket: a.bucket, Key: &key, UploadId: u.UploadId, PartNumber: &n, Body: bytes.NewReader(b), ChecksumAlgorithm: algorithm})
		if err != nil {
			return nil, err
		}
		done = append(done, types.CompletedPart{PartNumber: &n, ETag: p.ETag, ChecksumCRC32: p.ChecksumCRC32, ChecksumCRC32C: p.ChecksumCRC32C,
			ChecksumCRC64NVME: p.ChecksumCRC64NVME, ChecksumSHA1: p.ChecksumSHA1, ChecksumSHA256: p.ChecksumSHA256})
	}
	return a.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: a.bucket, Key: &key, UploadId: u.UploadId, ChecksumType: kind,
		MultipartUpload: &types.CompletedMultipartUpload{Parts: done}})
}

// denied wants an error of S3 with one of these codes, separated by spaces.
func denied(what string, err error, codes string) error {
	var e smithy.APIError
	if !errors.As(err, &e) {
		return fmt.Errorf("%s gives %v, want %s", what, err, codes)
	}
	if !slices.Contains(strings.Fields(codes), e.ErrorCode()) {
		return fmt.Errorf("%s gives %s, want %s", what, e.ErrorCode(), codes)
	}
	return nil
}

// sums are the checksums of bytes by algorithm, as S3 writes them.
func sums(b []byte) map[types.ChecksumAlgorithm]string {
	s1, s2 := sha1.Sum(b), sha256.Sum256(b)
	enc := base64.StdEncoding.EncodeToString
	return map[types.ChecksumAlgorithm]string{
		types.ChecksumAlgorithmCrc32:     enc(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(b))),
		types.ChecksumAlgorithmCrc32c:    enc(binary.BigEndian.AppendUint32(nil, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))),
		types.ChecksumAlgorithmCrc64nvme: enc(binary.BigEndian.AppendUint64(nil, crc64.Checksum(b, crc64.MakeTable(0x9a6c9329ac4bc9b5)))),
		types.ChecksumAlgorithmSha1:      enc(s1[:]),
		types.ChecksumAlgorithmSha256:    enc(s2[:]),
	}
}

// one is the checksum that an answer has.
func one(all ...*string) string {
	var out []string
	for _, s := range all {
		if s != nil {
			out = append(out, *s)
		}
	}
	return strings.Join(out, " ")
}

func awsSteps(s server) []step {
	a := &amz{awsClient(s, s.secret), aws.String(bucketName())}
	b := a.bucket
	small, big := pattern(3, 5003), pattern(4, 2*part+777)
	parts := [][]byte{big[:part], big[part : 2*part], big[2*part:]}
	return []step{
		{"create bucket", func(ctx context.Context) error {
			if _, err := a.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: b}); err != nil {
				return err
			}
			if _, err := a.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: b}); err != nil {
				return err
			}
			all, err := a.ListBuckets(ctx, &s3.ListBucketsInput{})
			if err != nil {
				return err
			}
			if err := first(same("bucket is listed", slices.ContainsFunc(all.Buckets, func(x types.Bucket) bool { return *x.Name == *b }), true)); err != nil {
				return err
			}
			_, err = a.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(bucketName()), Key: aws.String("k")})
			return denied("get from a bucket that is not there", err, "NoSuchBucket")
		}},
		{"another secret", func(ctx context.Context) error {
			x := &amz{awsClient(s, s.secret+"x"), b}
			_, err := x.put(ctx, "k", []byte("x"))
			if err := denied("put", err, "SignatureDoesNotMatch"); err != nil {
				return err
			}
			x.Client = awsClient(server{s.endpoint, s.access + "x", s.secret}, s.secret)
			_, err = x.put(ctx, "k", []byte("x"))
			return denied("put by a stranger", err, "InvalidAccessKeyId")
		}},
		{"put and get", func(ctx context.Context) error {
			for _, body := range [][]byte{nil, []byte("x"), small} {
				p, err := a.put(ctx, "small", body, func(in *s3.PutObjectInput) {
					in.Metadata, in.ContentType, in.ContentDisposition = map[string]string{"colour": "blue"}, aws.String("text/odd"), aws.String("inline")
				})
				if err != nil {
					return err
				}
				if err := first(same("etag", *p.ETag, `"`+etag(body)+`"`), a.holds(ctx, "small", body)); err != nil {
					return err
				}
				h, err := a.HeadObject(ctx, &s3.HeadObjectInput{Bucket: b, Key: aws.String("small")})
				if err != nil {
					return err
				}
				if err := first(same("size", *h.ContentLength, len(body)), same("metadata", h.Metadata["colour"], "blue"), same("type", *h.ContentType, "text/odd"),
					same("disposition", *h.ContentDisposition, "inline"), same("just now", time.Since(*h.LastModified) < time.Minute, true)); err != nil {
					return err
				}
			}
			_, _, err := a.get(ctx, "absent")
			return denied("get of what is not there", err, "NoSuchKey")
		}},
		{"odd names", func(ctx context.Context) error {
			for i, k := range odd {
				if _, err := a.put(ctx, k, []byte{byte(i)}); err != nil {
					return fmt.Errorf("%q: %w", k, err)
				}
			}
			l, err := a.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: b})
			if err != nil {
				return err
			}
			for i, k := range odd {
				err := a.holds(ctx, k, []byte{byte(i)})
				if err == nil {
					_, err = a.remove(ctx, k, nil)
				}
				if err := first(err, same("listed", slices.ContainsFunc(l.Contents, func(o types.Object) bool { return *o.Key == k }), true)); err != nil {
					return fmt.Errorf("%q: %w", k, err)
				}
			}
			return nil
		}},
		{"multipart", func(ctx context.Context) error {
			c, err := a.multipart(ctx, "big", "", "", parts...)
			if err != nil {
				return err
			}
			if err := first(same("etag", *c.ETag, `"`+partsETag(parts...)+`"`), a.holds(ctx, "big", big)); err != nil {
				return err
			}
			got, out, err := a.get(ctx, "big", func(in *s3.GetObjectInput) { in.PartNumber = aws.Int32(2) })
			if err != nil {
				return err
			}
			if err := first(equal("second part", got, parts[1]), same("parts", *out.PartsCount, 3)); err != nil {
				return err
			}
			_, err = a.multipart(ctx, "tiny parts", "", "", small, small)
			return denied("parts that are too small", err, "EntityTooSmall")
		}},
		{"parts by copy", func(ctx context.Context) error {
			key := aws.String("joined")
			u, err := a.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: b, Key: key})
			if err != nil {
				return err
			}
			var done []types.CompletedPart
			for i, r := range []string{fmt.Sprintf("bytes=100-%d", part+99), "bytes=0-9"} {
				p, err := a.UploadPartCopy(ctx, &s3.UploadPartCopyInput{Bucket: b, Key: key, UploadId: u.UploadId, PartNumber: aws.Int32(int32(i + 1)), CopySource: aws.String(*b + "/big"), CopySourceRange: &r})
				if err != nil {
					return err
				}
				done = append(done, types.CompletedPart{PartNumber: aws.Int32(int32(i + 1)), ETag: p.CopyPartResult.ETag})
			}
			l, err := a.ListParts(ctx, &s3.ListPartsInput{Bucket: b, Key: key, UploadId: u.UploadId})
			if err != nil {
				return err
			}
			if err := first(same("parts", len(l.Parts), 2), same("size", *l.Parts[0].Size, part)); err != nil {
				return err
			}
			_, err = a.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: b, Key: key, UploadId: u.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: done}})
			return first(err, a.holds(ctx, "joined", slices.Concat(big[100:part+100], big[:10])))
		}},
		{"abort of a multipart", func(ctx context.Context) error {
			u, err := a.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: b, Key: aws.String("aborted")})
			if err != nil {
				return err
			}
			l, err := a.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: b})
			if err != nil {
				return err
			}
			if err := first(same("uploads", slices.ContainsFunc(l.Uploads, func(x types.MultipartUpload) bool { return *x.UploadId == *u.UploadId }), true)); err != nil {
				return err
			}
			if _, err := a.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: b, Key: aws.String("aborted"), UploadId: u.UploadId}); err != nil {
				return err
			}
			_, err = a.ListParts(ctx, &s3.ListPartsInput{Bucket: b, Key: aws.String("aborted"), UploadId: u.UploadId})
			return denied("parts after abort", err, "NoSuchUpload")
		}},
		{"ranges", func(ctx context.Context) error {
			n := len(big)
			for r, want := range map[string][]byte{
				"bytes=0-0": big[:1], "bytes=1-100": big[1:101], fmt.Sprintf("bytes=%d-%d", part-5, part+5): big[part-5 : part+6],
				"bytes=-9": big[n-9:], fmt.Sprintf("bytes=%d-", n-3): big[n-3:], fmt.Sprintf("bytes=%d-%d", n-3, n+100): big[n-3:],
			} {
				got, out, err := a.get(ctx, "big", func(in *s3.GetObjectInput) { in.Range = &r })
				if err != nil {
					return err
				}
				if err := first(equal(r, got, want), same("total", strings.HasSuffix(*out.ContentRange, fmt.Sprintf("/%d", n)), true)); err != nil {
					return err
				}
			}
			_, _, err := a.get(ctx, "big", func(in *s3.GetObjectInput) { in.Range = aws.String(fmt.Sprintf("bytes=%d-", n)) })
			return denied("range past the end", err, "InvalidRange")
		}},
		{"list", func(ctx context.Context) error {
			keys := names(25)
			for _, k := range keys {
				if _, err := a.put(ctx, "l/"+k, []byte(k)); err != nil {
					return err
				}
			}
			for _, prefix := range []string{"", "a", "a/", "b/", "b/x/", "c", "z"} {
				wantObjects, wantPrefixes := fold(keys, prefix)
				var objects, prefixes, pages []string
				for p := s3.NewListObjectsV2Paginator(a, &s3.ListObjectsV2Input{Bucket: b, Prefix: aws.String("l/" + prefix), Delimiter: aws.String("/"), MaxKeys: aws.Int32(2)}); p.HasMorePages(); {
					l, err := p.NextPage(ctx)
					if err != nil {
						return err
					}
					for _, o := range l.Contents {
						objects = append(objects, strings.TrimPrefix(*o.Key, "l/"))
						if err := same("etag of "+*o.Key, *o.ETag, `"`+etag([]byte(objects[len(objects)-1]))+`"`); err != nil {
							return err
						}
					}
					for _, o := range l.CommonPrefixes {
						prefixes = append(prefixes, strings.TrimPrefix(*o.Prefix, "l/"))
					}
					pages = append(pages, fmt.Sprint(*l.KeyCount))
					if n := len(l.Contents) + len(l.CommonPrefixes); n > 2 {
						return fmt.Errorf("a page of %d, at most 2 were asked for", n)
					}
				}
				if err := first(same("objects under "+prefix, objects, wantObjects), same("prefixes under "+prefix, prefixes, wantPrefixes)); err != nil {
					return fmt.Errorf("%w (pages %v)", err, pages)
				}
			}
			marker, n := "l/", 0
			for more := true; more; {
				l, err := a.ListObjects(ctx, &s3.ListObjectsInput{Bucket: b, Prefix: aws.String("l/"), Marker: &marker, MaxKeys: aws.Int32(10)})
				if err != nil {
					return err
				}
				for _, o := range l.Contents {
					if err := same("key", *o.Key, "l/"+keys[n]); err != nil {
						return err
					}
					n++
				}
				marker, more = *l.Contents[len(l.Contents)-1].Key, *l.IsTruncated
			}
			l, err := a.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: b, Prefix: aws.String("l/"), StartAfter: aws.String("l/" + keys[20]), FetchOwner: aws.Bool(true)})
			if err != nil {
				return err
			}
			return first(same("all in pages", n, len(keys)), same("after a key", len(l.Contents), 4))
		}},
		{"copy", func(ctx context.Context) error {
			_, err := a.CopyObject(ctx, &s3.CopyObjectInput{Bucket: b, Key: aws.String("copy"), CopySource: aws.String(*b + "/small")})
			if err := first(err, a.holds(ctx, "copy", small)); err != nil {
				return err
			}
			_, err = a.CopyObject(ctx, &s3.CopyObjectInput{Bucket: b, Key: aws.String("copy"), CopySource: aws.String(*b + "/copy"), MetadataDirective: types.MetadataDirectiveReplace, Metadata: map[string]string{"colour": "red"}})
			if err := first(err, a.holds(ctx, "copy", small)); err != nil {
				return err
			}
			h, err := a.HeadObject(ctx, &s3.HeadObjectInput{Bucket: b, Key: aws.String("copy")})
			if err != nil {
				return err
			}
			if err := first(same("metadata", h.Metadata["colour"], "red")); err != nil {
				return err
			}
			_, err = a.CopyObject(ctx, &s3.CopyObjectInput{Bucket: b, Key: aws.String("copy"), CopySource: aws.String(*b + "/small"), CopySourceIfMatch: aws.String(`"0123456789abcdef0123456789abcdef"`)})
			return denied("copy of another", err, "PreconditionFailed")
		}},
		{"conditions", func(ctx context.Context) error {
			ifNone := func(in *s3.PutObjectInput) { in.IfNoneMatch = aws.String("*") }
			p, err := a.put(ctx, "cond", []byte("1"), ifNone)
			if err != nil {
				return err
			}
			_, err = a.put(ctx, "cond", []byte("2"), ifNone)
			if err := first(denied("put of what is there", err, "PreconditionFailed"), a.holds(ctx, "cond", []byte("1"))); err != nil {
				return err
			}
			ifMatch := func(in *s3.PutObjectInput) { in.IfMatch = p.ETag }
			if _, err := a.put(ctx, "cond", []byte("3"), ifMatch); err != nil {
				return err
			}
			_, err = a.put(ctx, "cond", []byte("4"), ifMatch)
			if err := first(denied("put over another", err, "PreconditionFailed"), a.holds(ctx, "cond", []byte("3"))); err != nil {
				return err
			}
			_, err = a.put(ctx, "never", []byte("5"), ifMatch)
			if err := denied("put over nothing", err, "NoSuchKey"); err != nil {
				return err
			}
			now := etag([]byte("3"))
			_, _, err = a.get(ctx, "cond", func(in *s3.GetObjectInput) { in.IfNoneMatch = &now })
			if err := denied("get of what is known", err, "NotModified 304"); err != nil {
				return err
			}
			_, _, err = a.get(ctx, "cond", func(in *s3.GetObjectInput) { in.IfMatch = p.ETag })
			if err := denied("get of another", err, "PreconditionFailed"); err != nil {
				return err
			}
			_, _, err = a.get(ctx, "cond", func(in *s3.GetObjectInput) { in.IfModifiedSince = aws.Time(time.Now().Add(-time.Hour)) })
			if err != nil {
				return err
			}
			_, _, err = a.get(ctx, "cond", func(in *s3.GetObjectInput) { in.IfUnmodifiedSince = aws.Time(time.Now().Add(-time.Hour)) })
			return denied("get of what has changed since", err, "PreconditionFailed")
		}},
		{"checksums", func(ctx context.Context) error {
			for algorithm, want := range sums(small) {
				p, err := a.put(ctx, "sum", small, func(in *s3.PutObjectInput) { in.ChecksumAlgorithm = algorithm })
				if err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				if err := first(same("checksum", one(p.ChecksumCRC32, p.ChecksumCRC32C, p.ChecksumCRC64NVME, p.ChecksumSHA1, p.ChecksumSHA256), want)); err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				got, g, err := a.get(ctx, "sum")
				if err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				if err := first(equal("get", got, small), same("checksum", one(g.ChecksumCRC32, g.ChecksumCRC32C, g.ChecksumCRC64NVME, g.ChecksumSHA1, g.ChecksumSHA256), want)); err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				// Known before, as a header, and wrong.
				_, err = a.put(ctx, "sum", big, func(in *s3.PutObjectInput) {
					w := &want
					switch algorithm {
					case types.ChecksumAlgorithmCrc32:
						in.ChecksumCRC32 = w
					case types.ChecksumAlgorithmCrc32c:
						in.ChecksumCRC32C = w
					case types.ChecksumAlgorithmCrc64nvme:
						in.ChecksumCRC64NVME = w
					case types.ChecksumAlgorithmSha1:
						in.ChecksumSHA1 = w
					case types.ChecksumAlgorithmSha256:
						in.ChecksumSHA256 = w
					}
				})
				if err := first(denied("put of other bytes", err, "BadDigest"), a.holds(ctx, "sum", small)); err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				kind := types.ChecksumTypeFullObject
				if strings.HasPrefix(string(algorithm), "SHA") {
					kind = types.ChecksumTypeComposite
				}
				c, err := a.multipart(ctx, "sums", algorithm, kind, parts...)
				if err != nil {
					return fmt.Errorf("%s of parts: %w", algorithm, err)
				}
				whole := sums(big)[algorithm]
				if kind == types.ChecksumTypeComposite {
					var all []byte
					for _, p := range parts {
						b, _ := base64.StdEncoding.DecodeString(sums(p)[algorithm])
						all = append(all, b...)
					}
					whole = sums(all)[algorithm] + "-3"
				}
				if err := first(same("checksum of parts", one(c.ChecksumCRC32, c.ChecksumCRC32C, c.ChecksumCRC64NVME, c.ChecksumSHA1, c.ChecksumSHA256), whole), a.holds(ctx, "sums", big)); err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				t, err := a.GetObjectAttributes(ctx, &s3.GetObjectAttributesInput{Bucket: b, Key: aws.String("sums"), ObjectAttributes: types.ObjectAttributesChecksum.Values()})
				if err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
				if err := first(same("size", *t.ObjectSize, len(big)), same("type", t.Checksum.ChecksumType, kind)); err != nil {
					return fmt.Errorf("%s: %w", algorithm, err)
				}
			}
			wrong := base64.StdEncoding.EncodeToString(make([]byte, 16))
			_, err := a.put(ctx, "sum", small, func(in *s3.PutObjectInput) { in.ContentMD5 = &wrong })
			return denied("put with another MD5", err, "BadDigest")
		}},
		{"tags", func(ctx context.Context) error {
			want := []types.Tag{{Key: aws.String("a b"), Value: aws.String("c+d/e=:@")}, {Key: aws.String("owner"), Value: aws.String("me")}}
			if _, err := a.PutObjectTagging(ctx, &s3.PutObjectTaggingInput{Bucket: b, Key: aws.String("small"), Tagging: &types.Tagging{TagSet: want}}); err != nil {
				return err
			}
			g, err := a.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: b, Key: aws.String("small")})
			if err != nil {
				return err
			}
			flat := func(tags []types.Tag) string {
				var out []string
				for _, t := range tags {
					out = append(out, *t.Key+"="+*t.Value)
				}
				slices.Sort(out)
				return strings.Join(out, ",")
			}
			h, err := a.GetObject(ctx, &s3.GetObjectInput{Bucket: b, Key: aws.String("small")})
			if err != nil {
				return err
			}
			if err := first(same("tags", flat(g.TagSet), flat(want)), same("count", *h.TagCount, 2), h.Body.Close()); err != nil {
				return err
			}
			if _, err := a.DeleteObjectTagging(ctx, &s3.DeleteObjectTaggingInput{Bucket: b, Key: aws.String("small")}); err != nil {
				return err
			}
			g, err = a.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: b, Key: aws.String("small")})
			if err != nil {
				return err
			}
			if err := first(same("tags", len(g.TagSet), 0)); err != nil {
				return err
			}
			if _, err := a.PutBucketTagging(ctx, &s3.PutBucketTaggingInput{Bucket: b, Tagging: &types.Tagging{TagSet: want}}); err != nil {
				return err
			}
			t, err := a.GetBucketTagging(ctx, &s3.GetBucketTaggingInput{Bucket: b})
			if err != nil {
				return err
			}
			return first(same("tags of the bucket", flat(t.TagSet), flat(want)))
		}},
		{"presigned addresses", func(ctx context.Context) error {
			p := s3.NewPresignClient(a.Client)
			g, err := p.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: b, Key: aws.String("small")}, s3.WithPresignExpires(time.Minute))
			if err != nil {
				return err
			}
			u, err := p.PresignPutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: aws.String("sent/" + odd[0])}, s3.WithPresignExpires(time.Minute))
			if err != nil {
				return err
			}
			return presigned(ctx, g.URL, u.URL, small, []byte("sent"), func() error { return a.holds(ctx, "sent/"+odd[0], []byte("sent")) })
		}},
		{"versions", func(ctx context.Context) error {
			set := func(s types.BucketVersioningStatus) error {
				if _, err := a.PutBucketVersioning(ctx, &s3.PutBucketVersioningInput{Bucket: b, VersioningConfiguration: &types.VersioningConfiguration{Status: s}}); err != nil {
					return err
				}
				v, err := a.GetBucketVersioning(ctx, &s3.GetBucketVersioningInput{Bucket: b})
				if err != nil {
					return err
				}
				return first(same("versioning", v.Status, s))
			}
			if err := set(types.BucketVersioningStatusEnabled); err != nil {
				return err
			}
			one, err := a.put(ctx, "v", []byte("1"))
			if err != nil {
				return err
			}
			two, err := a.put(ctx, "v", []byte("2"))
			if err != nil {
				return err
			}
			for v, want := range map[string]string{*one.VersionId: "1", *two.VersionId: "2"} {
				got, _, err := a.get(ctx, "v", func(in *s3.GetObjectInput) { in.VersionId = &v })
				if err != nil {
					return err
				}
				if err := first(equal("version "+v, got, []byte(want))); err != nil {
					return err
				}
			}
			d, err := a.remove(ctx, "v", nil)
			if err != nil {
				return err
			}
			if err := first(same("delete marker", *d.DeleteMarker, true)); err != nil {
				return err
			}
			_, _, err = a.get(ctx, "v")
			if err := denied("get of what was deleted", err, "NoSuchKey"); err != nil {
				return err
			}
			l, err := a.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{Bucket: b, Prefix: aws.String("v")})
			if err != nil {
				return err
			}
			if err := first(same("versions", len(l.Versions), 2), same("markers", len(l.DeleteMarkers), 1), same("newest", *l.DeleteMarkers[0].IsLatest, true),
				same("order", *l.Versions[0].VersionId+*l.Versions[1].VersionId, *two.VersionId+*one.VersionId)); err != nil {
				return err
			}
			if _, err := a.remove(ctx, "v", d.VersionId); err != nil {
				return err
			}
			if err := first(a.holds(ctx, "v", []byte("2")), set(types.BucketVersioningStatusSuspended)); err != nil {
				return err
			}
			if _, err := a.put(ctx, "v", []byte("3")); err != nil {
				return err
			}
			l, err = a.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{Bucket: b, Prefix: aws.String("v")})
			if err != nil {
				return err
			}
			return first(same("versions", len(l.Versions), 3), a.holds(ctx, "v", []byte("3")))
		}},
		{"an older null version", func(ctx context.Context) error {
			// "small" was put before there were versions: it is the null version, and older than the one put now.
			if _, err := a.PutBucketVersioning(ctx, &s3.PutBucketVersioningInput{Bucket: b, VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled}}); err != nil {
				return err
			}
			if _, err := a.put(ctx, "small", []byte("1")); err != nil {
				return err
			}
			two, err := a.put(ctx, "small", []byte("2"))
			if err != nil {
				return err
			}
			got, _, err := a.get(ctx, "small", func(in *s3.GetObjectInput) { in.VersionId = aws.String("null") })
			if err := first(err, equal("null version", got, small)); err != nil {
				return err
			}
			d, err := a.remove(ctx, "small", nil)
			if err != nil {
				return err
			}
			if _, err := a.remove(ctx, "small", d.VersionId); err != nil {
				return err
			}
			if err := a.holds(ctx, "small", []byte("2")); err != nil {
				return fmt.Errorf("after the delete marker has gone: %w", err)
			}
			if _, err := a.remove(ctx, "small", two.VersionId); err != nil {
				return err
			}
			return a.holds(ctx, "small", []byte("1"))
		}},
		{"delete", func(ctx context.Context) error {
			_, err := a.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: b})
			if err := denied("removal of a bucket with objects", err, "BucketNotEmpty"); err != nil {
				return err
			}
			for {
				l, err := a.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{Bucket: b, MaxKeys: aws.Int32(20)})
				if err != nil {
					return err
				}
				var all []types.ObjectIdentifier
				for _, x := range l.Versions {
					all = append(all, types.ObjectIdentifier{Key: x.Key, VersionId: x.VersionId})
				}
				for _, x := range l.DeleteMarkers {
					all = append(all, types.ObjectIdentifier{Key: x.Key, VersionId: x.VersionId})
				}
				if len(all) == 0 {
					break
				}
				d, err := a.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: b, Delete: &types.Delete{Objects: all}})
				if err != nil {
					return err
				}
				if err := first(same("errors", len(d.Errors), 0), same("deleted", len(d.Deleted), len(all))); err != nil {
					return err
				}
			}
			if _, err := a.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: b}); err != nil {
				return err
			}
			_, err = a.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: b})
			return denied("bucket that is gone", err, "NotFound")
		}},
	}
}
