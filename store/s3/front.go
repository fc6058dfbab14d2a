package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"time"

	"github.com/gofiber/fiber/v3"
	"github.com/valyala/fasthttp"
	"github.com/versity/versitygw/s3api"
	"github.com/versity/versitygw/s3api/utils"
)

// limitTimes gives the server the times that versitygw does not set, before it serves. A request's header, and a body that is
// not an object's, have patience; an object's goes on for as long as it moves (pace).
func limitTimes(of *s3api.S3ApiServer, patience time.Duration) error {
	app := reflect.ValueOf(of).Elem().FieldByName("app") // it shows it to nobody
	if !app.IsValid() || app.Type() != reflect.TypeFor[*fiber.App]() || app.IsNil() {
		return errors.New("versitygw's server is not built as it was: no times can be set")
	}
	s := (*fiber.App)(app.UnsafePointer()).Server()
	s.ReadTimeout, s.WriteTimeout, s.IdleTimeout = patience, patience, 2*patience
	other := s.ErrorHandler
	s.ErrorHandler = func(c *fasthttp.RequestCtx, err error) {
		if late := net.Error(nil); !errors.As(err, &late) || !late.Timeout() {
			other(c, err)
			return
		}
		c.SetStatusCode(errSlow.HTTPStatusCode)
		c.SetContentType(fiber.MIMEApplicationXML)
		c.SetBody(errSlow.XMLBody("", ""))
	}
	return nil
}

// A client that sends or takes fewer bytes than these within patience has gone. It holds memory until then.
const (
	leastSent  = 64 << 10
	leastTaken = 256 << 10
)

// A pace limits how long a client may let the server wait. What the store takes is not counted.
type pace struct {
	conn     net.Conn
	patience time.Duration
	left     time.Duration
	n        int // since left was whole
}

// paceOf is nil where there is no connection.
func (b *objects) paceOf(ctx context.Context) *pace {
	c, ok := ctx.(*fasthttp.RequestCtx)
	if !ok || c.Conn() == nil || b.patience <= 0 {
		return nil
	}
	return &pace{conn: c.Conn(), patience: b.patience, left: b.patience}
}

// read reads from what comes through the connection.
func (p *pace) read(r io.Reader, b []byte) (int, error) {
	begin := time.Now()
	if err := p.conn.SetReadDeadline(begin.Add(p.left)); err != nil {
		return 0, err
	}
	n, err := r.Read(b)
	p.left -= time.Since(begin)
	if p.n += n; p.n >= leastSent {
		p.n, p.left = 0, p.patience
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errSlow
	}
	return n, err
}

// paced writes to a client, who may take long for all of it but not for a piece.
type paced struct {
	w io.Writer
	*pace
}

func (p paced) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		if err = p.conn.SetWriteDeadline(time.Now().Add(p.patience)); err != nil {
			break
		}
		var m int
		m, err = p.w.Write(b[:min(len(b), leastTaken)])
		n, b = n+m, b[m:]
	}
	return n, err
}

// endChunks is a middleware: a body in HTTP's chunks (RFC 9112, 7.1) is read to its end, or the connection ends with its answer.
// fasthttp leaves what nobody read, and versitygw what comes in chunks: an object's end is in the last but one. The rest would
// be taken for the next request, and whoever writes one there could have it answered to whom the connection serves next.
func endChunks(c fiber.Ctx) error {
	r := c.Request().BodyStream()
	if r == nil || c.Request().Header.ContentLength() >= 0 {
		return c.Next()
	}
	body := &chunks{r: r}
	utils.ContextKeyBodyReader.Set(c, body)
	defer func() {
		if c.Request().BodyStream() == nil { // it was short, and read at once
			return
		}
		if conn := c.RequestCtx().Conn(); body.begun && conn != nil && conn.SetReadDeadline(time.Now().Add(time.Second)) == nil {
			_, _ = io.CopyN(io.Discard, body, leastSent)
		}
		if !body.ended {
			c.Response().Header.SetConnectionClose()
		}
	}()
	return c.Next()
}

// chunks ends when its reader does, which may not be read again.
type chunks struct {
	r            io.Reader
	begun, ended bool
}

func (b *chunks) Read(p []byte) (n int, err error) {
	if b.begun = true; b.ended {
		return 0, io.EOF
	}
	n, err = b.r.Read(p)
	b.ended = err == io.EOF
	return n, err
}

const signedTrailer = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"

// mendTrailers is a middleware: minio-go ends the line of a signed trailer with "\n\r\n", as an example of Amazon's shows it, and
// versitygw 1.8.0 takes the "\n" for a part of the checksum. It is left out; it is signed in any case. That of an empty line
// stays: then there is no trailer, which is an error of its own.
func mendTrailers(c fiber.Ctx) error {
	r := c.Request()
	if string(r.Header.Peek("X-Amz-Content-Sha256")) == signedTrailer {
		if body, n := r.BodyStream(), r.Header.ContentLength(); body != nil && n >= trailerEnd {
			utils.ContextKeyBodyReader.Set(c, &trailing{r: body, left: n - trailerEnd})
		}
	}
	return c.Next()
}

// A body with a signed trailer ends with the trailer's signature. Before it is what the line before ended with.
const (
	trailerSignature = "\r\nx-amz-trailer-signature:"
	trailerEnd       = 1 + len(trailerSignature) + 64 + len("\r\n\r\n")
)

// trailing reads such a body.
type trailing struct {
	r    io.Reader
	left int  // bytes before the end
	last byte // the last of them
	end  []byte
	err  error // of r, behind end
}

func (t *trailing) Read(p []byte) (int, error) {
	if t.left > 0 {
		n, err := t.r.Read(p[:min(len(p), t.left)])
		if t.left -= n; n > 0 {
			t.last = p[n-1]
		}
		return n, err
	}
	if t.err == nil {
		b := make([]byte, trailerEnd)
		n, err := io.ReadFull(t.r, b)
		if t.err = err; err == nil {
			t.err = io.EOF
		}
		if t.end = b[:n]; t.last != '\r' && bytes.HasPrefix(t.end, []byte("\n"+trailerSignature)) {
			t.end = t.end[1:]
		}
	}
	n := copy(p, t.end)
	if t.end = t.end[n:]; len(t.end) > 0 {
		return n, nil
	}
	return n, t.err
}
