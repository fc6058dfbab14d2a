package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"holdfast/store/s3"
)

// Client asks the front end of one directory.
type Client struct {
	dir  string
	http *http.Client
}

// Dial finds the front end that runs in a directory, or returns ErrNotRunning.
func Dial(dir string) (*Client, error) {
	c, err := dial(dir)
	if err != nil {
		return nil, err
	}
	c.Close()
	return &Client{dir, &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(dir) }, DisableCompression: true,
	}}}, nil
}

// maxLine bounds a line of an answer: a status has a line for each location.
const maxLine = 8 << 20

// call makes a request. seen, if it is not nil, hears progress.
func call[T any](ctx context.Context, c *Client, method, path string, in any, seen func(Progress)) (out T, err error) {
	var body io.Reader
	switch in := in.(type) {
	case nil:
	case []byte:
		body = bytes.NewReader(in)
	default:
		b, err := json.Marshal(in)
		if err != nil {
			return out, err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://front-end/v1/"+path, body)
	if err != nil {
		return out, err
	}
	a, err := c.http.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		return out, fmt.Errorf("front end of %s: %w", c.dir, errors.Unwrap(err)) // without the address that we made up
	}
	defer a.Body.Close()
	lines := bufio.NewScanner(a.Body)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	for lines.Scan() {
		var l line
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return out, fmt.Errorf("front end of %s: answer to %s: %w", c.dir, path, err)
		}
		switch {
		case l.Error != "":
			return out, errors.New(l.Error)
		case l.Progress != nil:
			if seen != nil {
				seen(*l.Progress)
			}
		default:
			if err := json.Unmarshal(l.Result, &out); err != nil {
				return out, fmt.Errorf("front end of %s: answer to %s: %w", c.dir, path, err)
			}
			return out, nil
		}
	}
	if ctx.Err() != nil {
		return out, ctx.Err()
	}
	return out, fmt.Errorf("front end of %s: it ended before it answered: %w", c.dir, errors.Join(lines.Err(), io.ErrUnexpectedEOF))
}

func (c *Client) Status(ctx context.Context) (*Status, error) {
	return call[*Status](ctx, c, "GET", "status", nil, nil)
}

func (c *Client) Scrub(ctx context.Context, x Scrub, seen func(Progress)) (Scrubbed, error) {
	return call[Scrubbed](ctx, c, "POST", "scrub", x, seen)
}

func (c *Client) Audit(ctx context.Context, x Audit, seen func(Progress)) (Audited, error) {
	return call[Audited](ctx, c, "POST", "audit", x, seen)
}

func (c *Client) Repair(ctx context.Context, x Repair, seen func(Progress)) (Repaired, error) {
	return call[Repaired](ctx, c, "POST", "repair", x, seen)
}

// Rotate has the front end read its file of keys again, which is of a later epoch, and re-wrap what there is.
func (c *Client) Rotate(ctx context.Context, seen func(Progress)) (Rotated, error) {
	return call[Rotated](ctx, c, "POST", "rotate", nil, seen)
}

func (c *Client) AddLocation(ctx context.Context, p Place) (Location, error) {
	return call[Location](ctx, c, "POST", "locations", at{p.String()}, nil)
}

// Drain takes a location out of use, and returns when it is empty, or cannot be made so now.
func (c *Client) Drain(ctx context.Context, id string, x Repair, seen func(Progress)) (Moved, error) {
	return call[Moved](ctx, c, "POST", "locations/"+url.PathEscape(id)+"/drain", x, seen)
}

func (c *Client) Undrain(ctx context.Context, id string) error {
	_, err := call[struct{}](ctx, c, "POST", "locations/"+url.PathEscape(id)+"/undrain", nil, nil)
	return err
}

// RemoveLocation lets go of a location that was drained.
func (c *Client) RemoveLocation(ctx context.Context, id string, seen func(Progress)) (Moved, error) {
	return call[Moved](ctx, c, "DELETE", "locations/"+url.PathEscape(id), nil, seen)
}

func (c *Client) Users(ctx context.Context) ([]s3.User, error) {
	return call[[]s3.User](ctx, c, "GET", "users", nil, nil)
}

func (c *Client) AddUser(ctx context.Context, u User) (Credentials, error) {
	return call[Credentials](ctx, c, "POST", "users", u, nil)
}

func (c *Client) SetSecret(ctx context.Context, access, secret string) (Credentials, error) {
	return call[Credentials](ctx, c, "POST", "users/"+url.PathEscape(access)+"/secret", Secret{secret}, nil)
}

func (c *Client) RemoveUser(ctx context.Context, access string) error {
	_, err := call[struct{}](ctx, c, "DELETE", "users/"+url.PathEscape(access), nil, nil)
	return err
}

func (c *Client) Buckets(ctx context.Context) ([]s3.Bucket, error) {
	return call[[]s3.Bucket](ctx, c, "GET", "policies", nil, nil)
}

func (c *Client) Policy(ctx context.Context, bucket string) (json.RawMessage, error) {
	return call[json.RawMessage](ctx, c, "GET", "policies/"+url.PathEscape(bucket), nil, nil)
}

func (c *Client) SetPolicy(ctx context.Context, bucket string, policy []byte) error {
	_, err := call[struct{}](ctx, c, "PUT", "policies/"+url.PathEscape(bucket), policy, nil)
	return err
}

func (c *Client) RemovePolicy(ctx context.Context, bucket string) error {
	_, err := call[struct{}](ctx, c, "DELETE", "policies/"+url.PathEscape(bucket), nil, nil)
	return err
}
