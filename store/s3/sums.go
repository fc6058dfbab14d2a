package s3

import (
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"io"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/minio/crc64nvme"
	"github.com/versity/versitygw/s3api/middlewares"
	"github.com/versity/versitygw/s3api/utils"
	"github.com/versity/versitygw/s3err"
)

const (
	crc64  = string(types.ChecksumAlgorithmCrc64nvme)
	crc64n = 8 // bytes of it
)

// sums are the checksums that a request or an answer of S3 can have. Each has a field for each algorithm.
type sums struct{ crc32, crc32c, crc64nvme, sha1, sha256, sha512, md5, xxhash64, xxhash3, xxhash128 *string }

// of returns the place of an algorithm's.
func (s *sums) of(algorithm string) **string {
	switch types.ChecksumAlgorithm(algorithm) {
	case types.ChecksumAlgorithmCrc32:
		return &s.crc32
	case types.ChecksumAlgorithmCrc32c:
		return &s.crc32c
	case types.ChecksumAlgorithmCrc64nvme:
		return &s.crc64nvme
	case types.ChecksumAlgorithmSha1:
		return &s.sha1
	case types.ChecksumAlgorithmSha256:
		return &s.sha256
	case types.ChecksumAlgorithmSha512:
		return &s.sha512
	case types.ChecksumAlgorithmMd5:
		return &s.md5
	case types.ChecksumAlgorithmXxhash64:
		return &s.xxhash64
	case types.ChecksumAlgorithmXxhash3:
		return &s.xxhash3
	case types.ChecksumAlgorithmXxhash128:
		return &s.xxhash128
	}
	var none *string
	return &none
}

// one is the first checksum that is given, and its algorithm.
func (s *sums) one() (algorithm, value string) {
	for _, a := range types.ChecksumAlgorithm("").Values() {
		if v := *s.of(string(a)); v != nil {
			return string(a), *v
		}
	}
	return "", ""
}

func (c checksum) sums() (s sums) {
	if c.value != "" {
		*s.of(c.algorithm) = &c.value
	}
	return s
}

func (c checksum) kind() types.ChecksumType {
	switch {
	case c.algorithm == "":
		return ""
	case c.composite:
		return types.ChecksumTypeComposite
	}
	return types.ChecksumTypeFullObject
}

// etags make MD5 sums: those of large bodies side by side.
type etags struct{ lanes lanes }

const largeBody = 1 << 20

// open returns a sum for a body of about that size, and what ends it.
func (e *etags) open(size int64) (hash.Hash, func()) {
	if size < largeBody {
		return md5.New(), func() {}
	}
	return e.lanes.hash()
}

// source reads what a client sends, and makes the sums of it.
type source struct {
	r       io.Reader
	pace    *pace // nil is any
	md5     hash.Hash
	close   func()                     // ends md5
	crc     hash.Hash                  // CRC64NVME, made here because versitygw's is slow; nil if it is not wanted
	want    string                     // what crc has to be; "" for anything
	other   *utils.HashReader          // of another algorithm, in r; nil if there is none
	trailer middlewares.ChecksumReader // checks itself what the client says at the end; nil if it does not
	n       int64
	ended   bool  // r said so
	cut     bool  // the client went away
	err     error // of r
}

// source makes the sum of an algorithm ("" for none) beside the ETag, and compares it with want if that is not "". A body
// that brings its own checksum in a trailer does so itself. crc makes that of CRC64NVME too.
func (e *etags) source(r io.Reader, size int64, algorithm, want string, crc bool) (*source, error) {
	s := &source{r: r}
	if t, ok := r.(middlewares.ChecksumReader); ok && t.Algorithm() != "" {
		s.trailer = t
		algorithm = ""
	}
	switch {
	case algorithm == crc64:
		s.crc, s.want = crc64nvme.New(), want
	case algorithm != "":
		var err error
		if s.other, err = utils.NewHashReader(s.r, want, utils.HashType(strings.ToLower(algorithm))); err != nil {
			return nil, err
		}
		s.r = s.other
	}
	if crc && s.crc == nil {
		s.crc = crc64nvme.New()
	}
	s.md5, s.close = e.open(size)
	return s, nil
}

// mostRead bounds a read: versitygw takes the heads of signed chunks out of what it has read by moving all that is behind each.
const mostRead = 64 << 10

func (s *source) Read(p []byte) (int, error) {
	var n int
	var err error
	if p = p[:min(len(p), mostRead)]; s.pace != nil {
		n, err = s.pace.read(s.r, p)
	} else {
		n, err = s.r.Read(p)
	}
	s.n += int64(n)
	s.md5.Write(p[:n])
	if s.crc != nil {
		s.crc.Write(p[:n])
	}
	if err == io.ErrUnexpectedEOF {
		s.cut = true
		err = io.EOF // a wrong checksum is the better answer
	}
	s.ended = s.ended || err == io.EOF
	if err == io.EOF && s.want != "" && s.crc64() != s.want {
		err = s3err.GetChecksumBadDigestErr(types.ChecksumAlgorithmCrc64nvme)
	}
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

func (s *source) etag() string { return hex.EncodeToString(s.md5.Sum(nil)) }

func (s *source) crc64() string { return base64.StdEncoding.EncodeToString(s.crc.Sum(nil)) }

// sum is that of the algorithm, or of the trailer.
func (s *source) sum() (algorithm, value string) {
	switch {
	case s.trailer != nil:
		return strings.ToUpper(s.trailer.Algorithm()), s.trailer.Checksum()
	case s.other != nil:
		return strings.ToUpper(string(s.other.Type())), s.other.Sum()
	case s.crc != nil:
		return crc64, s.crc64()
	}
	return "", ""
}
