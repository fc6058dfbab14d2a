package control

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Scheme is that of the addresses of locations elsewhere.
const Scheme = "holdfast-location"

// Place is where a location is, as people write it.
type Place struct {
	Addr string       // host:port of one elsewhere
	Pin  location.Pin // of its key
	Path string       // directory of one that is on this machine; it has neither address nor pin
	Farm string
}

var farmName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// ParsePlace reads holdfast-location://HOST:PORT/PIN,farm=NAME or DIRECTORY,farm=NAME.
func ParsePlace(s string) (p Place, err error) {
	i := strings.LastIndex(s, ",")
	text, option := s, ""
	if i >= 0 {
		text, option = s[:i], s[i+1:]
	}
	farm, ok := strings.CutPrefix(option, "farm=")
	if strings.Contains(text, "://") {
		if p, err = ParseURL(text); err != nil {
			return p, err
		}
	} else if p.Path = text; text == "" || strings.ContainsAny(text, "\x00\n") {
		return p, errors.New("it is neither an address nor a directory")
	}
	switch p.Farm = farm; {
	case !ok:
		return p, errors.New("farm=NAME is missing: a segment has one shard a farm")
	case !farmName.MatchString(farm):
		return p, fmt.Errorf("farm %q: a name has letters, digits and . _ -, at most 63", farm)
	}
	return p, nil
}

// ParseURL reads holdfast-location://HOST:PORT/PIN.
func ParseURL(s string) (p Place, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return p, err
	}
	if u.Scheme != Scheme || u.Hostname() == "" || u.Port() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return p, fmt.Errorf("it is not %s://HOST:PORT/PIN,farm=NAME", Scheme)
	}
	p.Addr = u.Host
	p.Pin, err = location.ParsePin(strings.TrimPrefix(u.Path, "/"))
	return p, err
}

// URL is the place without its farm.
func (p Place) URL() string {
	if p.Path != "" {
		return p.Path
	}
	return fmt.Sprintf("%s://%s/%v", Scheme, p.Addr, p.Pin)
}

func (p Place) String() string { return p.URL() + ",farm=" + p.Farm }

// ID is what the store calls the place. It comes from what the place is, since who restores a store knows nothing else: from
// the key of one elsewhere, and from the farm of a directory.
func (p Place) ID() disperse.Place {
	if p.Path != "" {
		id := sha256.Sum256([]byte("holdfast location " + p.Farm))
		return disperse.Place(id[:16])
	}
	return disperse.Place(p.Pin[:16])
}
