package s3

import (
	"bytes"
	"cmp"
	"context"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"

	"holdfast/store"
	"holdfast/store/location"
)

// bench is a backend over the model, with a bucket.
type bench struct {
	testing.TB
	*objects
	m   *model
	log *bytes.Buffer
}

const inBucket = "bucket"

func newBench(t testing.TB, lock bool) *bench {
	t.Helper()
	b := &bench{TB: t, m: newModel(), log: &bytes.Buffer{}}
	b.objects = newBackend(b.m, slog.New(slog.NewTextHandler(b.log, nil)))
	b.ok(b.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: ptr(inBucket), ObjectLockEnabledForBucket: &lock}, []byte("{}")))
	return b
}

func ptr[T any](v T) *T { return &v }

func (b *bench) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) versions(s types.BucketVersioningStatus) {
	b.Helper()
	b.ok(b.PutBucketVersioning(b.Context(), inBucket, s))
}

func (b *bench) try(name, body string, change func(*s3response.PutObjectInput)) (s3response.PutObjectOutput, error) {
	in := s3response.PutObjectInput{Bucket: ptr(inBucket), Key: &name, Body: strings.NewReader(body), ContentLength: ptr(int64(len(body)))}
	if change != nil {
		change(&in)
	}
	return b.PutObject(b.Context(), in)
}

func (b *bench) put(name, body string) string {
	b.Helper()
	out, err := b.try(name, body, nil)
	b.ok(err)
	return out.VersionID
}

func (b *bench) get(name, id string) (string, error) {
	out, err := b.GetObject(b.Context(), &s3.GetObjectInput{Bucket: ptr(inBucket), Key: &name, VersionId: &id})
	if err != nil {
		return "", err
	}
	defer out.Body.Close()
	body, err := io.ReadAll(out.Body)
	return string(body), err
}

func (b *bench) has(name, id, want string) {
	b.Helper()
	if got, err := b.get(name, id); got != want || err != nil {
		b.Fatalf("%s %s: %q %v, want %q", name, id, got, err, want)
	}
}

func (b *bench) del(name, id string) (*s3.DeleteObjectOutput, error) {
	return b.DeleteObject(b.Context(), &s3.DeleteObjectInput{Bucket: ptr(inBucket), Key: &name, VersionId: &id})
}

// code is what a client sees of an error.
func code(err error) string {
	if err == nil {
		return ""
	}
	var e interface{ BaseError() s3err.APIError }
	if errors.As(err, &e) {
		return e.BaseError().Code
	}
	return "not of S3: " + err.Error()
}

func (b *bench) refused(err error, want string) {
	b.Helper()
	if got := code(err); got != want {
		b.Fatalf("%q (%v), want %s", got, err, want)
	}
}

// whole checks that the model has the bodies of n rows and no other: nothing is left behind.
func (b *bench) whole() {
	b.Helper()
	named := 0
	for key, row := range b.m.values {
		var body store.Body
		switch key[0] {
		case rowObject:
			o, err := parseObject(row, version{})
			b.ok(err)
			body = o.body
		case rowPart:
			p, err := parsePart(row)
			b.ok(err)
			body = p.body
		}
		for _, p := range body.Segments {
			if named++; !b.m.kept[p.ID] {
				b.Errorf("%q names a segment that is not there", key)
			}
		}
	}
	if named != len(b.m.small) || named != len(b.m.kept) {
		b.Errorf("rows name %d segments, %d are kept and %d stored", named, len(b.m.kept), len(b.m.small))
	}
}

func TestVersions(t *testing.T) {
	b := newBench(t, false)
	if id := b.put("k", "before"); id != "" {
		t.Errorf("a bucket without versions gave %q", id)
	}
	b.versions(types.BucketVersioningStatusEnabled)
	one := b.put("k", "one")
	two := b.put("k", "two")
	b.has("k", "", "two")
	b.has("k", one, "one")
	b.has("k", nullVersion, "before")
	if two <= one {
		t.Errorf("%s is not newer than %s", two, one)
	}
	b.now = func() time.Time { return time.Unix(1, 0) } // the clock is set back
	three := b.put("k", "three")
	b.has("k", "", "three")
	b.has("k", three, "three")
	b.now = time.Now

	out, err := b.del("k", "")
	b.ok(err)
	if _, err := b.get("k", ""); code(err) != "NoSuchKey" {
		t.Errorf("behind a delete marker: %v", err)
	}
	_, err = b.get("k", *out.VersionId)
	b.refused(err, "MethodNotAllowed")
	b.has("k", two, "two")
	_, err = b.del("k", *out.VersionId)
	b.ok(err)
	b.has("k", "", "three")

	b.versions(types.BucketVersioningStatusSuspended)
	b.put("k", "suspended")
	b.has("k", "", "suspended")
	b.has("k", nullVersion, "suspended")
	b.put("k", "again") // in place of the null version
	b.has("k", nullVersion, "again")
	b.has("k", three, "three")
	b.versions(types.BucketVersioningStatusEnabled)
	b.put("k", "four")
	b.has("k", nullVersion, "again")
	_, err = b.del("k", nullVersion)
	b.ok(err)
	_, err = b.get("k", nullVersion)
	b.refused(err, "NoSuchVersion")
	b.has("k", "", "four")
	_, err = b.get("k", "nonsense")
	b.refused(err, "InvalidArgument")
	b.whole()

	l, err := b.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: ptr(inBucket), MaxKeys: ptr(int32(10))})
	b.ok(err)
	if len(l.Versions) != 4 || !*l.Versions[0].IsLatest || *l.Versions[1].IsLatest || *l.Versions[1].VersionId != three {
		t.Errorf("%d versions: %+v", len(l.Versions), l.Versions)
	}
}

func TestConditionsAreDecidedWithTheWrite(t *testing.T) {
	b := newBench(t, false)
	none := func(in *s3response.PutObjectInput) { in.IfNoneMatch = ptr("*") }
	_, err := b.try("k", "first", none)
	b.ok(err)
	_, err = b.try("k", "second", none)
	b.refused(err, "PreconditionFailed")
	b.has("k", "", "first")

	// Another writer comes between the look before the body and the write after it.
	late := func(in *s3response.PutObjectInput) {
		in.IfNoneMatch = ptr("*")
		in.Body = io.MultiReader(meanwhile(func() { b.put("late", "other") }), strings.NewReader("x"))
		in.ContentLength = ptr(int64(1))
	}
	_, err = b.try("late", "", late)
	b.refused(err, "PreconditionFailed")
	b.has("late", "", "other")

	h, err := b.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: ptr(inBucket), Key: ptr("k")})
	b.ok(err)
	etag := strings.Trim(*h.ETag, `"`)
	_, err = b.try("k", "third", func(in *s3response.PutObjectInput) { in.IfMatch = ptr("0000") })
	b.refused(err, "PreconditionFailed")
	_, err = b.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: ptr(inBucket), Key: ptr("k"), IfMatch: ptr("0000")})
	b.refused(err, "PreconditionFailed")
	_, err = b.try("k", "third", func(in *s3response.PutObjectInput) { in.IfMatch = &etag })
	b.ok(err)
	b.has("k", "", "third")
	b.whole()
}

type readerFunc func([]byte) (int, error)

// meanwhile does something while a body is read.
func meanwhile(f func()) io.Reader {
	return readerFunc(func([]byte) (int, error) { f(); return 0, io.EOF })
}

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestWhatGoesWrongLeavesNothing(t *testing.T) {
	broken := errors.New("cable")
	for _, c := range []struct {
		name   string
		change func(*bench, *s3response.PutObjectInput)
		want   string
	}{
		{"the client goes away", func(_ *bench, in *s3response.PutObjectInput) {
			in.Body = io.MultiReader(strings.NewReader("half"), readerFunc(func([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }))
		}, "IncompleteBody"},
		{"the connection breaks", func(_ *bench, in *s3response.PutObjectInput) {
			in.Body = io.MultiReader(strings.NewReader("half"), readerFunc(func([]byte) (int, error) { return 0, broken }))
		}, "IncompleteBody"},
		{"the body is shorter than announced", func(_ *bench, in *s3response.PutObjectInput) { in.ContentLength = ptr(int64(100)) }, "IncompleteBody"},
		{"the body is longer than announced", func(_ *bench, in *s3response.PutObjectInput) { in.ContentLength = ptr(int64(2)) }, "IncompleteBody"},
		{"the end is not what was signed", func(_ *bench, in *s3response.PutObjectInput) {
			in.Body = io.MultiReader(strings.NewReader("body"), readerFunc(func([]byte) (int, error) { return 0, s3err.GetAPIError(s3err.ErrSignatureDoesNotMatch) }))
		}, "SignatureDoesNotMatch"},
		{"a wrong checksum", func(_ *bench, in *s3response.PutObjectInput) { in.ChecksumCRC64NVME = ptr("AAAAAAAAAAA=") }, "BadDigest"},
		{"another wrong checksum", func(_ *bench, in *s3response.PutObjectInput) { in.ChecksumSHA256 = ptr("AAAA") }, "BadDigest"},
		{"the bucket goes meanwhile", func(b *bench, in *s3response.PutObjectInput) {
			in.Body = io.MultiReader(meanwhile(func() { b.ok(b.DeleteBucket(context.Background(), inBucket)) }), strings.NewReader("body"))
		}, "NoSuchBucket"},
		{"a name that is too long", func(_ *bench, in *s3response.PutObjectInput) { in.Key = ptr(strings.Repeat("x", maxKey+1)) }, "KeyTooLongError"},
		{"locations are full", func(b *bench, _ *s3response.PutObjectInput) { b.m.fail = func() error { return location.ErrFull } }, "InsufficientStorage"},
		{"quotas are used up", func(b *bench, _ *s3response.PutObjectInput) { b.m.fail = func() error { return location.ErrQuota } }, "QuotaExceeded"},
		{"another front end has the store", func(b *bench, _ *s3response.PutObjectInput) { b.m.fail = func() error { return store.ErrOld } }, "SlowDown"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, false)
			_, err := b.try("k", "body", func(in *s3response.PutObjectInput) { c.change(b, in) })
			b.refused(err, c.want)
			b.m.fail = nil
			b.whole()
			if len(b.m.small) > 0 {
				t.Errorf("%d segments are left", len(b.m.small))
			}
		})
	}
	t.Run("a busy store may do it yet", func(t *testing.T) {
		b := newBench(t, false)
		b.m.fail = func() error { return fmt.Errorf("update: %w", store.ErrBusy) }
		_, err := b.try("k", "body", nil)
		b.refused(err, "SlowDown")
		if len(b.m.small) != 1 {
			t.Error("the body was discarded, though a row may name it yet")
		}
	})
	t.Run("lost shards", func(t *testing.T) {
		b := newBench(t, false)
		b.put("k", "body")
		clear(b.m.small)
		_, err := b.get("k", "")
		b.refused(err, "InternalError")
		if !strings.Contains(b.log.String(), store.ErrLost.Error()) {
			t.Errorf("the log says nothing: %s", b.log)
		}
	})
}

func TestLocksHoldWhateverTheFrontEndSays(t *testing.T) {
	b := newBench(t, true)
	until := time.Now().Add(time.Hour)
	lock := func(mode types.ObjectLockRetentionMode, until time.Time) []byte {
		j, _ := json.Marshal(types.ObjectLockRetention{Mode: mode, RetainUntilDate: &until})
		return j
	}
	id := b.put("k", "kept")
	b.ok(b.PutObjectRetention(t.Context(), inBucket, "k", id, lock(types.ObjectLockRetentionModeCompliance, until)))
	_, err := b.del("k", id)
	b.refused(err, "AccessDenied")
	b.refused(b.PutObjectRetention(t.Context(), inBucket, "k", id, lock(types.ObjectLockRetentionModeCompliance, until.Add(-time.Minute))), "AccessDenied")
	b.refused(b.PutObjectRetention(t.Context(), inBucket, "k", id, lock(types.ObjectLockRetentionModeGovernance, until)), "AccessDenied")
	b.ok(b.PutObjectRetention(t.Context(), inBucket, "k", id, lock(types.ObjectLockRetentionModeCompliance, until.Add(time.Minute))))
	b.refused(b.PutBucketVersioning(t.Context(), inBucket, types.BucketVersioningStatusSuspended), "InvalidBucketState")

	held := b.put("held", "kept")
	b.ok(b.PutObjectLegalHold(t.Context(), inBucket, "held", held, true))
	_, err = b.del("held", held)
	b.refused(err, "AccessDenied")
	b.ok(b.PutObjectLegalHold(t.Context(), inBucket, "held", held, false))
	_, err = b.del("held", held)
	b.ok(err)

	b.now = func() time.Time { return until.Add(2 * time.Minute) }
	_, err = b.del("k", id)
	b.ok(err)
	b.whole()
}

// names are what listings are played on: few characters, so that prefixes are common.
func names(r *rand.Rand, n int) []string {
	set := map[string]bool{}
	for len(set) < n {
		var s strings.Builder
		for range 1 + r.IntN(5) {
			s.WriteString([]string{"a", "b", "/", "\x00", "ü", "//", "a/"}[r.IntN(7)])
		}
		set[s.String()] = true
	}
	var out []string
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// TestListingsAreWhatAWalkGives compares pages of every size with what a naive walk over all names gives.
func TestListingsAreWhatAWalkGives(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 30 {
		b := newBench(t, false)
		if round%2 == 1 {
			b.versions(types.BucketVersioningStatusEnabled)
		}
		all := names(r, 40)
		var live []string
		for _, n := range all {
			b.put(n, "1")
			if round%2 == 1 && r.IntN(3) == 0 {
				b.put(n, "2")
			}
			if r.IntN(4) == 0 {
				_, err := b.del(n, "")
				b.ok(err)
			} else {
				live = append(live, n)
			}
		}
		for _, prefix := range []string{"", "a", "a/", "b", "/", "ü", "nothing"} {
			for _, delimiter := range []string{"", "/", "b", "//"} {
				var want []string
				for _, n := range live {
					if !strings.HasPrefix(n, prefix) {
						continue
					}
					if before, _, ok := strings.Cut(n[len(prefix):], delimiter); ok && delimiter != "" {
						n = prefix + before + delimiter + "…"
					}
					if len(want) == 0 || want[len(want)-1] != n {
						want = append(want, n)
					}
				}
				for _, size := range []int32{1, 3, 1000} {
					var got []string
					token := ""
					for range 100 {
						l, err := b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: ptr(inBucket), Prefix: &prefix, Delimiter: &delimiter, MaxKeys: &size, ContinuationToken: &token})
						b.ok(err)
						var page []string
						for _, o := range l.Contents {
							page = append(page, *o.Key)
						}
						for _, p := range l.CommonPrefixes {
							page = append(page, *p.Prefix+"…")
						}
						if len(page) > int(size) || int(*l.KeyCount) != len(page) {
							t.Fatalf("a page of %d has %d", size, len(page))
						}
						slices.SortFunc(page, func(a, b string) int { return cmp.Compare(strings.TrimSuffix(a, "…"), strings.TrimSuffix(b, "…")) })
						got = append(got, page...)
						if !*l.IsTruncated {
							break
						}
						token = *l.NextContinuationToken
					}
					if !slices.Equal(got, want) {
						t.Fatalf("round %d, prefix %q, delimiter %q, pages of %d:\n%q, want\n%q", round, prefix, delimiter, size, got, want)
					}
				}
			}
		}
		b.allVersions(t, len(all))
		b.whole()
	}
}

// allVersions compares pages of versions with one page of all.
func (b *bench) allVersions(t *testing.T, _ int) {
	list := func(size int32) (out []string) {
		var key, id string
		for range 1000 {
			l, err := b.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: ptr(inBucket), MaxKeys: &size, KeyMarker: &key, VersionIdMarker: &id})
			b.ok(err)
			var page []string
			for _, v := range l.Versions {
				page = append(page, *v.Key+" "+*v.VersionId+fmt.Sprint(*v.IsLatest))
			}
			for _, v := range l.DeleteMarkers {
				page = append(page, *v.Key+" "+*v.VersionId+fmt.Sprint(*v.IsLatest))
			}
			out = append(out, page...)
			if !*l.IsTruncated {
				break
			}
			key, id = *l.NextKeyMarker, str(l.NextVersionIdMarker)
		}
		slices.Sort(out)
		return out
	}
	one, all := list(1), list(1000)
	if !slices.Equal(one, all) {
		t.Fatalf("versions one by one:\n%q, at once\n%q", one, all)
	}
}

func (b *bench) upload(name string, change func(*s3response.CreateMultipartUploadInput)) string {
	b.Helper()
	in := s3response.CreateMultipartUploadInput{Bucket: ptr(inBucket), Key: &name}
	if change != nil {
		change(&in)
	}
	u, err := b.CreateMultipartUpload(b.Context(), in)
	b.ok(err)
	return u.UploadId
}

func (b *bench) part(name, id string, number int32, body string) types.CompletedPart {
	b.Helper()
	p, err := b.UploadPart(b.Context(), &s3.UploadPartInput{Bucket: ptr(inBucket), Key: &name, UploadId: &id, PartNumber: &number, Body: strings.NewReader(body), ContentLength: ptr(int64(len(body)))})
	b.ok(err)
	return types.CompletedPart{PartNumber: &number, ETag: p.ETag}
}

func (b *bench) complete(name, id string, parts ...types.CompletedPart) (s3response.CompleteMultipartUploadResult, error) {
	r, _, err := b.CompleteMultipartUpload(b.Context(), &s3.CompleteMultipartUploadInput{Bucket: ptr(inBucket), Key: &name, UploadId: &id, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
	return r, err
}

// TestAListingGoesOnWhereItsMarkerWas although the client has deleted all that it was shown, the marker too: the loop by which
// clients empty a bucket.
func TestAListingGoesOnWhereItsMarkerWas(t *testing.T) {
	for _, size := range []int32{1, 2, 3, 7, 1000} {
		b := newBench(t, false)
		names := []string{"a", "a/b", "b"}
		for _, s := range []types.BucketVersioningStatus{"", types.BucketVersioningStatusEnabled, types.BucketVersioningStatusSuspended, types.BucketVersioningStatusEnabled} {
			if s != "" {
				b.versions(s)
			}
			for _, n := range names {
				b.put(n, "1")
				b.put(n, "2")
			}
		}
		_, err := b.del("b", "")
		b.ok(err)
		seen := map[string]bool{}
		in := &s3.ListObjectVersionsInput{Bucket: ptr(inBucket), MaxKeys: &size}
		for {
			l, err := b.ListObjectVersions(t.Context(), in)
			b.ok(err)
			key := ""
			if in.VersionIdMarker == nil {
				key = "any"
			}
			for _, v := range l.Versions {
				if seen[*v.Key+*v.VersionId] {
					t.Errorf("pages of %d: %s %s comes twice", size, *v.Key, *v.VersionId)
				}
				seen[*v.Key+*v.VersionId] = true
				if *v.IsLatest != (*v.Key != key) && (key != "any") && len(l.DeleteMarkers) == 0 {
					t.Errorf("pages of %d: %s %s is latest: %v", size, *v.Key, *v.VersionId, *v.IsLatest)
				}
				key = *v.Key
				_, err := b.del(*v.Key, *v.VersionId)
				b.ok(err)
			}
			for _, v := range l.DeleteMarkers {
				_, err := b.del(*v.Key, *v.VersionId)
				b.ok(err)
			}
			if !*l.IsTruncated {
				break
			}
			in.KeyMarker, in.VersionIdMarker = l.NextKeyMarker, l.NextVersionIdMarker
		}
		if want := len(names) * 5; len(seen) != want { // before 1, on 2, suspended in its place 1 (the one before goes), on 2
			t.Errorf("pages of %d: %d versions, want %d", size, len(seen), want)
		}
		b.ok(b.DeleteBucket(t.Context(), inBucket))
	}
	b := newBench(t, false)
	_, err := b.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: ptr(inBucket), KeyMarker: ptr("k"), VersionIdMarker: ptr("nonsense"), MaxKeys: ptr(int32(1))})
	b.refused(err, "InvalidArgument")
}

func TestUploads(t *testing.T) {
	b := newBench(t, false)
	big := strings.Repeat("0123456789abcdef", 5<<16) // 5 MiB
	b.put("k", "old")
	id := b.upload("k", nil)
	b.part("k", id, 2, "overwritten")
	one, two := b.part("k", id, 1, big), b.part("k", id, 2, big+"x")
	b.part("k", id, 7, "not named")
	last := b.part("k", id, 9, "end")
	_, err := b.complete("k", id, two, one)
	b.refused(err, "InvalidPartOrder")
	b.has("k", "", "old")
	done, err := b.complete("k", id, one, two, last)
	b.ok(err)
	b.has("k", "", big+big+"x"+"end")
	b.whole()
	again, err := b.complete("k", id, one, two, last)
	if err != nil || *again.ETag != *done.ETag || !strings.HasSuffix(*done.ETag, `-3"`) {
		t.Errorf("asked again: %v %v", again.ETag, err)
	}
	p, err := b.GetObject(t.Context(), &s3.GetObjectInput{Bucket: ptr(inBucket), Key: ptr("k"), PartNumber: ptr(int32(3))})
	b.ok(err)
	if body, _ := io.ReadAll(p.Body); string(body) != "end" || *p.PartsCount != 3 {
		t.Errorf("part 3 is %q of %d", body, *p.PartsCount)
	}
	// The whole object's checksum, made of the parts', is that of its bytes.
	b.put("same", big+big+"x"+"end")
	sum := func(name string) string {
		h, err := b.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: ptr(inBucket), Key: &name, ChecksumMode: types.ChecksumModeEnabled})
		b.ok(err)
		return str(h.ChecksumCRC64NVME)
	}
	if sum("k") != sum("same") || sum("k") == "" {
		t.Errorf("checksums %s and %s", sum("k"), sum("same"))
	}

	small := b.upload("k", nil)
	_, err = b.complete("k", small, b.part("k", small, 1, "tiny"), b.part("k", small, 2, "tiny"))
	b.refused(err, "EntityTooSmall")
	b.ok(b.AbortMultipartUpload(t.Context(), &s3.AbortMultipartUploadInput{Bucket: ptr(inBucket), Key: ptr("k"), UploadId: &small}))
	_, err = b.complete("k", small, types.CompletedPart{PartNumber: ptr(int32(1)), ETag: ptr("x")})
	b.refused(err, "NoSuchUpload")
	b.whole()

	b.upload("k", nil)
	orphan := b.upload("gone", nil)
	b.part("gone", orphan, 1, "x")
	b.now = func() time.Time { return time.Now().Add(time.Hour) }
	fresh := b.upload("fresh", nil)
	b.part("fresh", fresh, 1, "x")
	b.ok(b.expire(time.Now().Add(time.Minute)))
	l, err := b.ListMultipartUploads(t.Context(), &s3.ListMultipartUploadsInput{Bucket: ptr(inBucket), MaxUploads: ptr(int32(10))})
	b.ok(err)
	if len(l.Uploads) != 1 || l.Uploads[0].UploadID != fresh {
		t.Errorf("uploads are left: %+v", l.Uploads)
	}
	b.whole()
	for _, n := range []string{"k", "same"} {
		_, err := b.del(n, "")
		b.ok(err)
	}
	b.ok(b.DeleteBucket(t.Context(), inBucket))
	b.ok(b.expire(time.Time{})) // of a bucket that is gone
	if len(b.m.keys)+len(b.m.small) > 0 {
		t.Errorf("%d rows and %d segments are left", len(b.m.keys), len(b.m.small))
	}
}

func TestCopies(t *testing.T) {
	b := newBench(t, false)
	b.put("from", "body")
	cp := func(from, to string, change func(*s3response.CopyObjectInput)) error {
		in := s3response.CopyObjectInput{Bucket: ptr(inBucket), Key: &to, CopySource: ptr(inBucket + "/" + from), ExpectedBucketOwner: ptr("")}
		if change != nil {
			change(&in)
		}
		_, err := b.CopyObject(t.Context(), in)
		return err
	}
	b.ok(cp("from", "to", nil))
	b.has("to", "", "body")
	b.refused(cp("from", "from", nil), "InvalidRequest")
	b.ok(cp("from", "from", func(in *s3response.CopyObjectInput) {
		in.MetadataDirective, in.Metadata = types.MetadataDirectiveReplace, map[string]string{"a": "b"}
	}))
	h, err := b.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: ptr(inBucket), Key: ptr("from")})
	b.ok(err)
	if h.Metadata["a"] != "b" {
		t.Errorf("metadata %v", h.Metadata)
	}
	b.refused(cp("absent", "to", nil), "NoSuchKey")
	b.refused(cp("from", "to", func(in *s3response.CopyObjectInput) { in.CopySourceIfMatch = ptr("0000") }), "PreconditionFailed")
	b.has("from", "", "body")
	b.whole()
}

func TestUsersSecretsAreSealed(t *testing.T) {
	b := newBench(t, false)
	root := auth.Account{Access: "root", Secret: "rootsecret", Role: auth.RoleAdmin}
	u, err := newUsers(b.objects, root, [32]byte{1})
	b.ok(err)
	b.ok(u.CreateAccount(auth.Account{Access: "anna", Secret: "hunter2hunter2", Role: auth.RoleUser}))
	for key, row := range b.m.values {
		if bytes.Contains(row, []byte("hunter2")) {
			t.Errorf("row %q has the secret in the clear", key)
		}
	}
	fresh, err := newUsers(b.objects, root, [32]byte{1})
	b.ok(err)
	if a, err := fresh.GetUserAccount("anna"); err != nil || a.Secret != "hunter2hunter2" || a.Role != auth.RoleUser {
		t.Errorf("%v %v", a, err)
	}
	// A row that somebody moved under another name, and one under another key, are no users.
	b.m.set(string(userKey("eve")), b.m.values[string(userKey("anna"))], true)
	moved, err := newUsers(b.objects, root, [32]byte{1})
	b.ok(err)
	if _, err := moved.GetUserAccount("eve"); err == nil {
		t.Error("a moved row is a user")
	}
	b.m.set(string(userKey("eve")), nil, false)
	other, err := newUsers(b.objects, root, [32]byte{2})
	b.ok(err)
	if _, err := other.GetUserAccount("anna"); err == nil {
		t.Error("another key opens the secret")
	}
	if err := u.CreateAccount(auth.Account{Access: "root", Secret: "x"}); !errors.Is(err, auth.ErrUserExists) {
		t.Errorf("root made again: %v", err)
	}
	b.ok(u.UpdateUserAccount("anna", auth.MutableProps{Secret: ptr("second")}))
	if a, _ := u.GetUserAccount("anna"); a.Secret != "second" {
		t.Errorf("after a change: %q", a.Secret)
	}
	b.ok(u.DeleteUserAccount("anna"))
	if _, err := u.GetUserAccount("anna"); !errors.Is(err, auth.ErrNoSuchUser) {
		t.Errorf("after its end: %v", err)
	}
}

// TestETagsAreMD5 with few bodies and many at once: the sums that are made side by side are the same.
func TestETagsAreMD5(t *testing.T) {
	b := newBench(t, false)
	const bodies = 9
	var wg, begun sync.WaitGroup
	begun.Add(bodies)
	for i := range bodies {
		wg.Go(func() {
			body := bytes.Repeat([]byte{byte(i), 1, 2}, largeBody/3+i+1)
			out, err := b.try(fmt.Sprint(i), string(body), func(in *s3response.PutObjectInput) {
				in.Body = io.MultiReader(meanwhile(func() { begun.Done(); begun.Wait() }), in.Body)
			})
			if want := fmt.Sprintf(`"%x"`, md5.Sum(body)); err != nil || out.ETag != want {
				t.Errorf("%s %v, want %s", out.ETag, err, want)
			}
		})
	}
	wg.Wait()
	if l := &b.etags.lanes; len(l.open) > 0 || hasMD5x8 && len(l.free) < 2 {
		t.Errorf("%d sums are open, %d were made side by side", len(l.open), len(l.free))
	}
	b.whole()
}
