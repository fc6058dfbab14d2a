package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/tags"
)

// mio is a bucket seen through minio-go.
type mio struct {
	*minio.Client
	bucket string
}

func minioClient(s server, secret string, trailers bool) (*minio.Client, error) {
	u, err := url.Parse(s.endpoint)
	if err != nil {
		return nil, err
	}
	return minio.New(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(s.access, secret, ""), Secure: u.Scheme == "https", Region: "us-east-1",
		BucketLookup: minio.BucketLookupPath, TrailingHeaders: trailers, MaxRetries: 1,
	})
}

func (m *mio) put(ctx context.Context, key string, b []byte, o minio.PutObjectOptions) (minio.UploadInfo, error) {
	return m.PutObject(ctx, m.bucket, key, bytes.NewReader(b), int64(len(b)), o)
}

func (m *mio) get(ctx context.Context, key string, o minio.GetObjectOptions) ([]byte, error) {
	r, err := m.GetObject(ctx, m.bucket, key, o)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// holds checks what lies under a key.
func (m *mio) holds(ctx context.Context, key string, want []byte) error {
	b, err := m.get(ctx, key, minio.GetObjectOptions{})
	return first(err, equal(key, b, want))
}

func (m *mio) list(ctx context.Context, o minio.ListObjectsOptions) (keys []string, err error) {
	for x := range m.ListObjects(ctx, m.bucket, o) {
		if x.Err != nil {
			return nil, x.Err
		}
		keys = append(keys, x.Key)
	}
	return keys, nil
}

// clear removes all versions of everything.
func (m *mio) clear(ctx context.Context) error {
	for x := range m.ListObjects(ctx, m.bucket, minio.ListObjectsOptions{Recursive: true, WithVersions: true}) {
		if x.Err != nil {
			return x.Err
		}
		if err := m.RemoveObject(ctx, m.bucket, x.Key, minio.RemoveObjectOptions{VersionID: x.VersionID}); err != nil {
			return fmt.Errorf("remove %s version %s: %w", x.Key, x.VersionID, err)
		}
	}
	return nil
}

// refused wants an error of S3 with that code.
func refused(what string, err error, code string) error {
	if err == nil {
		return fmt.Errorf("%s was not refused, want %s", what, code)
	}
	return same(what, minio.ToErrorResponse(err).Code, code)
}

// minioSteps are the steps of minio-go. With trailers it sends a checksum behind each body, signed where there is no TLS.
func minioSteps(s server, trailers bool) []step {
	c, err := minioClient(s, s.secret, trailers)
	m := &mio{c, bucketName()}
	small, big := pattern(1, 4097), pattern(2, 2*part+12345)
	return []step{
		{"create bucket", func(ctx context.Context) error {
			if err != nil {
				return err
			}
			if err := m.MakeBucket(ctx, m.bucket, minio.MakeBucketOptions{}); err != nil {
				return err
			}
			there, err := m.BucketExists(ctx, m.bucket)
			if err := first(err, same("bucket is there", there, true)); err != nil {
				return err
			}
			all, err := m.ListBuckets(ctx)
			return first(err, same("bucket is listed", slices.ContainsFunc(all, func(b minio.BucketInfo) bool { return b.Name == m.bucket }), true))
		}},
		{"another secret", func(ctx context.Context) error {
			c, err := minioClient(s, s.secret+"x", trailers)
			if err != nil {
				return err
			}
			_, err = c.PutObject(ctx, m.bucket, "k", strings.NewReader("x"), 1, minio.PutObjectOptions{})
			return refused("put", err, "SignatureDoesNotMatch")
		}},
		{"put and get", func(ctx context.Context) error {
			for _, b := range [][]byte{nil, []byte("x"), small} {
				u, err := m.put(ctx, "small", b, minio.PutObjectOptions{ContentType: "text/odd", UserMetadata: map[string]string{"Colour": "blue"}, CacheControl: "no-cache", SendContentMd5: !trailers})
				if err := first(err, same("etag", u.ETag, etag(b)), m.holds(ctx, "small", b)); err != nil {
					return err
				}
				i, err := m.StatObject(ctx, m.bucket, "small", minio.StatObjectOptions{})
				if err := first(err, same("size", i.Size, len(b)), same("etag", i.ETag, etag(b)), same("type", i.ContentType, "text/odd"),
					same("metadata", i.UserMetadata["Colour"], "blue"), same("cache control", i.Metadata.Get("Cache-Control"), "no-cache")); err != nil {
					return err
				}
			}
			_, err := m.get(ctx, "absent", minio.GetObjectOptions{})
			return refused("get of what is not there", err, "NoSuchKey")
		}},
		{"odd names", func(ctx context.Context) error {
			for i, k := range odd {
				if _, err := m.put(ctx, k, []byte{byte(i)}, minio.PutObjectOptions{}); err != nil {
					return fmt.Errorf("%q: %w", k, err)
				}
			}
			keys, err := m.list(ctx, minio.ListObjectsOptions{Recursive: true})
			if err != nil {
				return err
			}
			for i, k := range odd {
				if err := first(m.holds(ctx, k, []byte{byte(i)}), same("listed", slices.Contains(keys, k), true), m.RemoveObject(ctx, m.bucket, k, minio.RemoveObjectOptions{})); err != nil {
					return fmt.Errorf("%q: %w", k, err)
				}
			}
			return nil
		}},
		{"multipart", func(ctx context.Context) error {
			u, err := m.put(ctx, "big", big, minio.PutObjectOptions{PartSize: part, NumThreads: 3})
			return first(err, same("etag", u.ETag, partsETag(big[:part], big[part:2*part], big[2*part:])), m.holds(ctx, "big", big))
		}},
		{"multipart of unknown length", func(ctx context.Context) error {
			_, err := m.PutObject(ctx, m.bucket, "stream", io.MultiReader(bytes.NewReader(big)), -1, minio.PutObjectOptions{PartSize: part})
			return first(err, m.holds(ctx, "stream", big))
		}},
		{"abort of a multipart", func(ctx context.Context) error {
			core := minio.Core{Client: m.Client}
			id, err := core.NewMultipartUpload(ctx, m.bucket, "aborted", minio.PutObjectOptions{})
			if err != nil {
				return err
			}
			p, err := core.PutObjectPart(ctx, m.bucket, "aborted", id, 1, bytes.NewReader(small), int64(len(small)), minio.PutObjectPartOptions{})
			if err != nil {
				return err
			}
			l, err := core.ListObjectParts(ctx, m.bucket, "aborted", id, 0, 10)
			if err := first(err, same("parts", len(l.ObjectParts), 1), core.AbortMultipartUpload(ctx, m.bucket, "aborted", id)); err != nil {
				return err
			}
			_, err = core.CompleteMultipartUpload(ctx, m.bucket, "aborted", id, []minio.CompletePart{{PartNumber: 1, ETag: p.ETag}}, minio.PutObjectOptions{})
			if err := refused("complete after abort", err, "NoSuchUpload"); err != nil {
				return err
			}
			for x := range m.ListIncompleteUploads(ctx, m.bucket, "", true) {
				return fmt.Errorf("upload %s of %s is still there: %v", x.UploadID, x.Key, x.Err)
			}
			return nil
		}},
		{"ranges", func(ctx context.Context) error {
			for _, r := range [][2]int64{{0, 0}, {0, 99}, {part - 5, part + 5}, {2*part - 1, 2 * part}, {int64(len(big)) - 7, int64(len(big)) - 1}, {part + 3, 0}, {0, -100}} {
				var o minio.GetObjectOptions
				from, to := r[0], r[1]+1
				if err := o.SetRange(r[0], r[1]); err != nil {
					return err
				}
				switch {
				case r[1] < 0:
					from, to = int64(len(big))+r[1], int64(len(big))
				case r[1] == 0 && r[0] > 0:
					to = int64(len(big))
				}
				b, err := m.get(ctx, "stream", o)
				if err := first(err, equal(fmt.Sprint("range ", r), b, big[from:to])); err != nil {
					return err
				}
			}
			r, err := m.GetObject(ctx, m.bucket, "stream", minio.GetObjectOptions{})
			if err != nil {
				return err
			}
			defer r.Close()
			for _, at := range []int64{part * 2, 17, part - 100} {
				b := make([]byte, 1000)
				_, err := r.ReadAt(b, at)
				if err := first(err, equal("read at", b, big[at:at+1000])); err != nil {
					return err
				}
			}
			var o minio.GetObjectOptions
			o.SetRange(int64(len(big)), int64(len(big))+1)
			_, err = m.get(ctx, "stream", o)
			return refused("range past the end", err, "InvalidRange")
		}},
		{"list", func(ctx context.Context) error {
			keys := names(25)
			for _, k := range keys {
				if _, err := m.put(ctx, "l/"+k, []byte(k), minio.PutObjectOptions{}); err != nil {
					return err
				}
			}
			for _, v1 := range []bool{false, true} {
				got, err := m.list(ctx, minio.ListObjectsOptions{Prefix: "l/", Recursive: true, MaxKeys: 7, UseV1: v1})
				if err := first(err, same("all in pages", len(got), len(keys))); err != nil {
					return err
				}
				for i := range got {
					if err := same("key", got[i], "l/"+keys[i]); err != nil {
						return err
					}
				}
				for _, prefix := range []string{"", "a", "a/", "b/", "b/x/", "c", "z"} {
					got, err := m.list(ctx, minio.ListObjectsOptions{Prefix: "l/" + prefix, MaxKeys: 3, UseV1: v1})
					objects, prefixes := fold(keys, prefix)
					want := slices.Sorted(slices.Values(append(objects, prefixes...)))
					for i := range want {
						want[i] = "l/" + want[i]
					}
					slices.Sort(got) // minio-go gives the objects of a page before its prefixes
					if err := first(err, same("folded under "+prefix, got, want)); err != nil {
						return err
					}
				}
			}
			got, err := m.list(ctx, minio.ListObjectsOptions{Prefix: "l/", Recursive: true, StartAfter: "l/" + keys[20]})
			return first(err, same("after a key", len(got), 4))
		}},
		{"copy", func(ctx context.Context) error {
			src := minio.CopySrcOptions{Bucket: m.bucket, Object: "stream"}
			_, err := m.CopyObject(ctx, minio.CopyDestOptions{Bucket: m.bucket, Object: "copy of/" + odd[0], UserMetadata: map[string]string{"Colour": "red"}, ReplaceMetadata: true}, src)
			if err := first(err, m.holds(ctx, "copy of/"+odd[0], big)); err != nil {
				return err
			}
			i, err := m.StatObject(ctx, m.bucket, "copy of/"+odd[0], minio.StatObjectOptions{})
			if err := first(err, same("metadata", i.UserMetadata["Colour"], "red")); err != nil {
				return err
			}
			_, err = m.ComposeObject(ctx, minio.CopyDestOptions{Bucket: m.bucket, Object: "composed"}, src, minio.CopySrcOptions{Bucket: m.bucket, Object: "small", MatchRange: true, Start: 10, End: 99})
			return first(err, m.holds(ctx, "composed", slices.Concat(big, small[10:100])))
		}},
		{"conditions", func(ctx context.Context) error {
			var fresh, right, wrong minio.PutObjectOptions
			fresh.SetMatchETagExcept("*")
			u, err := m.put(ctx, "cond", []byte("1"), fresh)
			if err != nil {
				return err
			}
			_, err = m.put(ctx, "cond", []byte("2"), fresh)
			if err := first(refused("put of what is there", err, "PreconditionFailed"), m.holds(ctx, "cond", []byte("1"))); err != nil {
				return err
			}
			right.SetMatchETag(u.ETag)
			if _, err := m.put(ctx, "cond", []byte("3"), right); err != nil {
				return err
			}
			wrong.SetMatchETag(u.ETag)
			_, err = m.put(ctx, "cond", []byte("4"), wrong)
			if err := first(refused("put over another", err, "PreconditionFailed"), m.holds(ctx, "cond", []byte("3"))); err != nil {
				return err
			}
			var g minio.GetObjectOptions
			g.SetMatchETag(etag([]byte("1")))
			_, err = m.get(ctx, "cond", g)
			return refused("get of another", err, "PreconditionFailed")
		}},
		{"checksums", func(ctx context.Context) error {
			if !trailers {
				return nil // minio-go sends them in trailers alone
			}
			for _, t := range []minio.ChecksumType{minio.ChecksumCRC32, minio.ChecksumCRC32C, minio.ChecksumCRC64NVME, minio.ChecksumSHA1, minio.ChecksumSHA256} {
				u, err := m.put(ctx, "sum", small, minio.PutObjectOptions{Checksum: t})
				if err != nil {
					return fmt.Errorf("%v: %w", t, err)
				}
				want := t.ChecksumBytes(small).Encoded()
				i, err := m.StatObject(ctx, m.bucket, "sum", minio.StatObjectOptions{Checksum: true})
				all := []string{u.ChecksumCRC32 + u.ChecksumCRC32C + u.ChecksumCRC64NVME + u.ChecksumSHA1 + u.ChecksumSHA256, i.ChecksumCRC32 + i.ChecksumCRC32C + i.ChecksumCRC64NVME + i.ChecksumSHA1 + i.ChecksumSHA256}
				if err := first(err, same("checksum "+t.String(), all, []string{want, want})); err != nil {
					return err
				}
				b, err := m.get(ctx, "sum", minio.GetObjectOptions{Checksum: true})
				if err := first(err, equal(t.String(), b, small)); err != nil {
					return err
				}
				if _, err := m.put(ctx, "sums", big, minio.PutObjectOptions{Checksum: t, PartSize: part}); err != nil {
					return fmt.Errorf("%v in parts: %w", t, err)
				}
				if err := m.holds(ctx, "sums", big); err != nil {
					return err
				}
			}
			return nil
		}},
		{"tags", func(ctx context.Context) error {
			want := map[string]string{"owner": "me", "a b": "c+d/e=:@"}
			x, _ := tags.NewTags(want, true)
			if err := m.PutObjectTagging(ctx, m.bucket, "small", x, minio.PutObjectTaggingOptions{}); err != nil {
				return err
			}
			got, err := m.GetObjectTagging(ctx, m.bucket, "small", minio.GetObjectTaggingOptions{})
			if err != nil {
				return err
			}
			if err := first(same("tags", got.ToMap(), want), m.RemoveObjectTagging(ctx, m.bucket, "small", minio.RemoveObjectTaggingOptions{})); err != nil {
				return err
			}
			if got, err = m.GetObjectTagging(ctx, m.bucket, "small", minio.GetObjectTaggingOptions{}); err != nil {
				return err
			}
			_, err = m.put(ctx, "tagged", nil, minio.PutObjectOptions{UserTags: want})
			if err := first(err, same("tags", len(got.ToMap()), 0)); err != nil {
				return err
			}
			if got, err = m.GetObjectTagging(ctx, m.bucket, "tagged", minio.GetObjectTaggingOptions{}); err != nil {
				return err
			}
			return same("tags of a put", got.ToMap(), want)
		}},
		{"presigned addresses", func(ctx context.Context) error {
			g, err := m.PresignedGetObject(ctx, m.bucket, "small", time.Minute, nil)
			if err != nil {
				return err
			}
			p, err := m.PresignedPutObject(ctx, m.bucket, "sent/"+odd[0], time.Minute)
			if err != nil {
				return err
			}
			return presigned(ctx, g.String(), p.String(), small, []byte("sent"), func() error { return m.holds(ctx, "sent/"+odd[0], []byte("sent")) })
		}},
		{"posted forms", func(ctx context.Context) error {
			p := minio.NewPostPolicy()
			if err := first(p.SetBucket(m.bucket), p.SetKey("posted"), p.SetExpires(time.Now().Add(time.Minute)), p.SetContentLengthRange(1, 100)); err != nil {
				return err
			}
			u, fields, err := m.PresignedPostPolicy(ctx, p)
			if err != nil {
				return err
			}
			code, b, err := form(ctx, u.String(), fields, []byte("by a form"))
			if err := first(err, same("status", code/100, 2), m.holds(ctx, "posted", []byte("by a form"))); err != nil {
				return fmt.Errorf("%w: %s", err, b)
			}
			code, _, err = form(ctx, u.String(), fields, small)
			if err := first(err, same("status of a form that is too long", code, 400)); err != nil {
				return err
			}
			fields["key"] = "elsewhere"
			code, _, err = form(ctx, u.String(), fields, []byte("x"))
			return first(err, same("status of a form with another key", code, 403))
		}},
		{"versions", func(ctx context.Context) error {
			if err := m.EnableVersioning(ctx, m.bucket); err != nil {
				return err
			}
			one, err := m.put(ctx, "v", []byte("1"), minio.PutObjectOptions{})
			if err != nil {
				return err
			}
			two, err := m.put(ctx, "v", []byte("two"), minio.PutObjectOptions{})
			if err := first(err, same("versions differ", one.VersionID != two.VersionID && one.VersionID != "", true)); err != nil {
				return err
			}
			b, err := m.get(ctx, "v", minio.GetObjectOptions{VersionID: one.VersionID})
			if err := first(err, equal("first version", b, []byte("1")), m.RemoveObject(ctx, m.bucket, "v", minio.RemoveObjectOptions{})); err != nil {
				return err
			}
			_, err = m.get(ctx, "v", minio.GetObjectOptions{})
			if err := refused("get of what was deleted", err, "NoSuchKey"); err != nil {
				return err
			}
			marker := ""
			var seen []string
			for x := range m.ListObjects(ctx, m.bucket, minio.ListObjectsOptions{Prefix: "v", WithVersions: true}) {
				if x.Err != nil {
					return x.Err
				}
				if x.IsDeleteMarker {
					marker = x.VersionID
				}
				seen = append(seen, fmt.Sprint(x.Size, x.IsDeleteMarker, x.IsLatest))
			}
			if err := first(same("versions, newest first", seen, []string{"0 true true", "3 false false", "1 false false"}),
				m.RemoveObject(ctx, m.bucket, "v", minio.RemoveObjectOptions{VersionID: marker}), m.holds(ctx, "v", []byte("two")),
				m.RemoveObject(ctx, m.bucket, "v", minio.RemoveObjectOptions{VersionID: two.VersionID}), m.holds(ctx, "v", []byte("1")),
				m.SuspendVersioning(ctx, m.bucket)); err != nil {
				return err
			}
			if _, err := m.put(ctx, "v", []byte("null"), minio.PutObjectOptions{}); err != nil {
				return err
			}
			b, err = m.get(ctx, "v", minio.GetObjectOptions{VersionID: "null"})
			return first(err, equal("null version", b, []byte("null")))
		}},
		{"delete", func(ctx context.Context) error {
			if err := refused("removal of a bucket with objects", m.RemoveBucket(ctx, m.bucket), "BucketNotEmpty"); err != nil {
				return err
			}
			all := make(chan minio.ObjectInfo)
			go func() {
				defer close(all)
				for x := range m.ListObjects(ctx, m.bucket, minio.ListObjectsOptions{Prefix: "l/", Recursive: true}) {
					all <- x
				}
			}()
			for x := range m.RemoveObjects(ctx, m.bucket, all, minio.RemoveObjectsOptions{}) {
				return x.Err
			}
			left, err := m.list(ctx, minio.ListObjectsOptions{Prefix: "l/", Recursive: true})
			if err := first(err, same("left", len(left), 0), m.clear(ctx), m.RemoveBucket(ctx, m.bucket)); err != nil {
				return err
			}
			there, err := m.BucketExists(ctx, m.bucket)
			return first(err, same("bucket is there", there, false))
		}},
	}
}
