package s3

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func trailerOf(line string) string {
	return "0;chunk-signature=" + strings.Repeat("a", 64) + "\r\nx-amz-checksum-crc32c:wdBDMA==" + line + "x-amz-trailer-signature:" + strings.Repeat("b", 64) + "\r\n\r\n"
}

// FuzzTrailing reads bodies, of which nothing but the line feed before the trailer's signature goes, however they come.
func FuzzTrailing(f *testing.F) {
	data := "3;chunk-signature=…\r\n\n\r\nx-amz-trailer-signature:\r\n"
	f.Add([]byte(data + trailerOf("\n\r\n")))
	f.Add([]byte(data + trailerOf("\r\n")))
	f.Add([]byte(data + "0;chunk-signature=" + strings.Repeat("a", 64) + "\r\n\r\nx-amz-trailer-signature:" + strings.Repeat("b", 64) + "\r\n\r\n")) // no trailer
	f.Add([]byte(data))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < trailerEnd {
			return
		}
		want := b
		at := len(b) - trailerEnd
		if bytes.HasPrefix(b[at:], []byte("\n"+trailerSignature)) && !bytes.HasSuffix(b[:at], []byte("\r")) {
			want = append(bytes.Clone(b[:at]), b[at+1:]...)
		}
		for _, r := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b)), iotest.HalfReader(bytes.NewReader(b))} {
			got, err := io.ReadAll(iotest.OneByteReader(&trailing{r: r, left: at}))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%q, %v, want %q", got, err, want)
			}
		}
		short := b[:len(b)-1]
		if _, err := io.ReadAll(&trailing{r: bytes.NewReader(short), left: at}); err != io.ErrUnexpectedEOF {
			t.Fatalf("one byte less: %v", err)
		}
	})
}
