package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"holdfast/internal/canonical"
)

// BlobPlace is where a validator keeps blobs, in its own words.
type BlobPlace struct {
	Scheme    string `cbor:"1,keyasint,omitempty" json:"scheme,omitempty"` // of the dispersed store, "k/n"; "": a directory of the validator
	Locations int    `cbor:"2,keyasint,omitempty" json:"locations,omitempty"`
	Farms     int    `cbor:"3,keyasint,omitempty" json:"farms,omitempty"`  // that these are on
	Waiting   int    `cbor:"4,keyasint,omitempty" json:"waiting"`          // blobs that lie in the directory
	Reason    string `cbor:"5,keyasint,omitempty" json:"reason,omitempty"` // why it is not as it should be
}

// maxBlobPlace bounds an encoded BlobPlace.
const maxBlobPlace = 8 << 10

// String says it to people.
func (p BlobPlace) String() string {
	var s string
	switch {
	case p.Scheme == "":
		s = fmt.Sprintf("directory of the validator, %d blobs", p.Waiting)
	case p.Waiting > 0:
		s = fmt.Sprintf("store %s on %d farms, %d blobs wait in the validator's directory", p.Scheme, p.Farms, p.Waiting)
	default:
		s = fmt.Sprintf("store %s on %d farms", p.Scheme, p.Farms)
	}
	if p.Reason != "" {
		s += " (" + p.Reason + ")"
	}
	return s
}

func (v *Validator) blobPlace(w http.ResponseWriter, r *http.Request) {
	release, ok := v.hold(w, r, maxBlobPlace)
	if !ok {
		return
	}
	defer release()
	var p BlobPlace
	if v.cfg.Where != nil {
		p = v.cfg.Where()
	}
	p.Reason = strings.ToValidUTF8(p.Reason[:min(len(p.Reason), 1<<10)], "?")
	w.Header().Set("Content-Type", "application/cbor")
	w.Write(canonical.Encode(&p))
}

// BlobPlace asks the validator that keeps the blobs where they are.
func (c *Client) BlobPlace(ctx context.Context) (*BlobPlace, error) {
	resp, err := c.doAt(ctx, c.keeper(), http.MethodGet, "/v1/store", nil, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBlobPlace+1))
	if err != nil {
		return nil, fmt.Errorf("where blobs are: %w", err)
	}
	var p BlobPlace
	if err := canonical.Decode(b, maxBlobPlace, &p); err != nil {
		return nil, fmt.Errorf("where blobs are: %w", err)
	}
	return &p, nil
}
