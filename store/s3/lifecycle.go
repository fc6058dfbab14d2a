package s3

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/gofiber/fiber/v3"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/metrics"
	"github.com/versity/versitygw/s3api"
	"github.com/versity/versitygw/s3api/controllers"
	"github.com/versity/versitygw/s3api/middlewares"
	"github.com/versity/versitygw/s3api/utils"
	"github.com/versity/versitygw/s3err"

	"holdfast/store"
)

// lifecycle is what a bucket does with what is in it by itself.
type lifecycle struct {
	XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ LifecycleConfiguration"`
	Rules   []rule   `xml:"Rule"`
}

type rule struct {
	ID         string `xml:",omitempty"`
	Prefix     *string
	Filter     *filter
	Status     string
	Expiration *expiration
	Noncurrent *noncurrent `xml:"NoncurrentVersionExpiration"`
	Abort      *abort      `xml:"AbortIncompleteMultipartUpload"`
	// There is one kind of storage that locations have.
	Transition           []struct{} `xml:",omitempty"`
	NoncurrentTransition []struct{} `xml:"NoncurrentVersionTransition,omitempty"`
}

type expiration struct {
	Date    *time.Time
	Days    *int
	Markers *bool `xml:"ExpiredObjectDeleteMarker"`
}

type noncurrent struct {
	Days  *int `xml:"NoncurrentDays"`
	Newer int  `xml:"NewerNoncurrentVersions,omitempty"`
}

type abort struct {
	Days *int `xml:"DaysAfterInitiation"`
}

type conditions struct {
	Prefix  *string
	Tags    []tag  `xml:"Tag"`
	Larger  *int64 `xml:"ObjectSizeGreaterThan"`
	Smaller *int64 `xml:"ObjectSizeLessThan"`
}

type filter struct {
	conditions
	And *conditions
}

type tag struct{ Key, Value string }

const (
	maxRules     = 1000
	maxLifecycle = 1 << 20 // bytes of a configuration
)

func wrongRule(format string, a ...any) error {
	return s3err.APIError{Code: "InvalidRequest", HTTPStatusCode: http.StatusBadRequest, Description: fmt.Sprintf(format, a...)}
}

// parseLifecycle reads and checks a configuration.
func parseLifecycle(b []byte) (*lifecycle, error) {
	malformed := s3err.GetAPIError(s3err.ErrMalformedXML)
	l := &lifecycle{}
	// Clients leave the namespace out.
	any := struct {
		XMLName xml.Name
		Rules   *[]rule `xml:"Rule"`
	}{Rules: &l.Rules}
	if len(b) > maxLifecycle || xml.Unmarshal(b, &any) != nil || any.XMLName.Local != "LifecycleConfiguration" || len(l.Rules) == 0 || len(l.Rules) > maxRules {
		return nil, malformed
	}
	seen := map[string]bool{}
	for i := range l.Rules {
		r := &l.Rules[i]
		if r.ID == "" {
			r.ID = fmt.Sprintf("rule-%d", i+1)
		}
		if len(r.ID) > 255 || seen[r.ID] {
			return nil, s3err.APIError{Code: "InvalidArgument", HTTPStatusCode: http.StatusBadRequest, Description: "Rule ID must be unique and not longer than 255."}
		}
		seen[r.ID] = true
		if r.Status != "Enabled" && r.Status != "Disabled" || r.Prefix != nil && r.Filter != nil {
			return nil, malformed
		}
		if len(r.Transition)+len(r.NoncurrentTransition) > 0 {
			return nil, s3err.APIError{Code: "NotImplemented", HTTPStatusCode: http.StatusNotImplemented, Description: "Rule " + r.ID + ": objects stay in their storage class."}
		}
		if f := r.Filter; f != nil {
			n := len(f.Tags)
			for _, there := range []bool{f.Prefix != nil, f.Larger != nil, f.Smaller != nil, f.And != nil} {
				if there {
					n++
				}
			}
			if n > 1 {
				return nil, malformed
			}
		}
		if err := r.check(); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func (r *rule) check() error {
	c := r.when()
	positive := func(n *int) bool { return n != nil && *n > 0 }
	e, n, a := r.Expiration, r.Noncurrent, r.Abort
	switch {
	case e == nil && n == nil && a == nil:
		return wrongRule("Rule %s: at least one action needs to be specified in a rule.", r.ID)
	case e != nil && (e.Days != nil || e.Date != nil) == (e.Markers != nil) || e != nil && e.Days != nil && e.Date != nil:
		return s3err.GetAPIError(s3err.ErrMalformedXML)
	case e != nil && e.Days != nil && *e.Days <= 0, n != nil && !positive(n.Days), a != nil && !positive(a.Days), n != nil && (n.Newer < 0 || n.Newer > 100):
		return s3err.APIError{Code: "InvalidArgument", HTTPStatusCode: http.StatusBadRequest, Description: "Rule " + r.ID + ": days must be positive, and newer versions to keep at most 100."}
	case e != nil && e.Date != nil && !e.Date.Equal(e.Date.Truncate(day)):
		return s3err.APIError{Code: "InvalidArgument", HTTPStatusCode: http.StatusBadRequest, Description: "'Date' must be at midnight GMT"}
	case e != nil && e.Markers != nil && len(c.Tags) > 0:
		return wrongRule("Rule %s: ExpiredObjectDeleteMarker cannot be specified with tags.", r.ID)
	case a != nil && (len(c.Tags) > 0 || c.Larger != nil || c.Smaller != nil):
		return wrongRule("Rule %s: AbortIncompleteMultipartUpload cannot be specified with tags or sizes.", r.ID)
	case c.Larger != nil && c.Smaller != nil && *c.Larger >= *c.Smaller:
		return wrongRule("Rule %s: ObjectSizeLessThan has to be more than ObjectSizeGreaterThan.", r.ID)
	}
	return nil
}

// when is what a rule asks of an object.
func (r *rule) when() conditions {
	switch {
	case r.Filter != nil && r.Filter.And != nil:
		return *r.Filter.And
	case r.Filter != nil:
		return r.Filter.conditions
	}
	return conditions{Prefix: r.Prefix}
}

func (c *conditions) hold(name string, o *object) bool {
	for _, t := range c.Tags {
		if v, ok := o.tags[t.Key]; !ok || v != t.Value {
			return false
		}
	}
	return strings.HasPrefix(name, str(c.Prefix)) && (c.Larger == nil || o.size > *c.Larger) && (c.Smaller == nil || o.size < *c.Smaller)
}

const day = 24 * time.Hour

// due is the first midnight, of UTC, when something is as many days old.
func due(begun time.Time, days int) time.Time {
	t := begun.Add(time.Duration(days) * day)
	if m := t.Truncate(day); !m.Equal(t) {
		return m.Add(day)
	}
	return t
}

func has(n *int, begun, now time.Time) bool { return n != nil && !now.Before(due(begun, *n)) }

// aborts says whether an upload has taken too long.
func (l *lifecycle) aborts(name string, o *object, now time.Time) bool {
	return l != nil && slices.ContainsFunc(l.Rules, func(r rule) bool {
		c := r.when()
		return r.Status == "Enabled" && r.Abort != nil && c.hold(name, o) && has(r.Abort.Days, o.modified, now)
	})
}

// ends says whether a version goes. newer is nil of the current one, else when the version was replaced and by how many it was;
// alone says of a delete marker that there is nothing behind it.
func (l *lifecycle) ends(name string, o *object, newer *replaced, alone bool, now time.Time) bool {
	return slices.ContainsFunc(l.Rules, func(r rule) bool {
		c := r.when()
		e, n := r.Expiration, r.Noncurrent
		switch {
		case r.Status != "Enabled" || !c.hold(name, o):
			return false
		case newer != nil:
			return n != nil && newer.by > n.Newer && has(n.Days, newer.at, now)
		case e == nil:
			return false
		case o.marker:
			return alone && (e.Markers != nil && *e.Markers || has(e.Days, o.modified, now))
		}
		return has(e.Days, o.modified, now) || e.Date != nil && !now.Before(*e.Date)
	})
}

type replaced struct {
	at time.Time
	by int // noncurrent versions, with itself
}

// A sweep goes through the versions of a bucket a page at a time, and notes those that end.
type sweep struct {
	k      *bucket
	rules  *lifecycle
	from   []byte // nil when it is through
	name   string
	newer  replaced
	marker *ending // that ends if nothing is behind it
}

// ending is a version that ends, as it was when that was decided.
type ending struct {
	name     string
	at       version
	modified time.Time
}

const sweepPage = 1000 // rows

func (s *sweep) page(r store.Reader, now time.Time) (out []ending, err error) {
	all := append([]byte{rowObject}, s.k.id[:]...)
	c := r.Scan(s.from, behind(all))
	s.from = nil
	defer func() { err = errors.Join(err, c.Close()) }()
	alone := func() {
		if s.marker != nil {
			out = append(out, *s.marker)
			s.marker = nil
		}
	}
	for n := 0; c.Next(); n++ {
		if n == sweepPage {
			s.from = bytes.Clone(c.Key())
			return out, nil
		}
		name, at, err := splitVersion(c.Key())
		if err != nil {
			return out, err
		}
		o, err := parseObject(c.Value(), at)
		if err != nil {
			return out, err
		}
		it := ending{name, at, o.modified}
		if name != s.name {
			alone()
			s.name, s.newer = name, replaced{o.modified, 0}
			if s.rules.ends(name, o, nil, true, now) {
				if o.marker {
					s.marker = &it
				} else {
					out = append(out, it)
				}
			}
			continue
		}
		s.marker = nil
		s.newer.by++
		if s.rules.ends(name, o, &s.newer, false, now) && !protected(o, now) {
			out = append(out, it)
		}
		s.newer.at = o.modified
	}
	alone()
	return out, nil
}

// protected says that a version is locked in any way: what goes by itself passes over no lock.
func protected(o *object, now time.Time) bool {
	_, until, hold := o.lock()
	return hold == types.ObjectLockLegalHoldStatusOn || until != nil && until.After(now)
}

// end ends a version if it is as it was.
func (b *objects) endVersion(tx store.Tx, k *bucket, e ending) error {
	last, err := newest(tx, k, e.name)
	if err != nil || last == nil {
		return err
	}
	o := last
	if last.at != e.at {
		if o, err = getObject(tx, k, e.name, e.at); err != nil || o == nil || protected(o, b.now()) {
			return err
		}
	}
	if !o.modified.Equal(e.modified) {
		return nil
	}
	if o == last && !o.marker {
		if k.versioning == unversioned && protected(o, b.now()) {
			return nil
		}
		_, err := b.retire(tx, k, e.name, o)
		return err
	}
	if o == last { // a marker, with which the key goes
		if older, err := following(tx, k, e.name, &o.at); err != nil || older != nil {
			return err
		}
	}
	return b.remove(tx, k, e.name, o)
}

// runRules ends what the rules of buckets end: a page is read, what ends in it is changed, and there is a pause.
func (b *objects) runRules(ctx context.Context, pause time.Duration) error {
	var sweeps []*sweep
	err := b.walkBuckets("", "", func(_ string, k *bucket) (bool, error) {
		if k.lifecycle == nil {
			return true, nil
		}
		rules, err := parseLifecycle(k.lifecycle)
		sweeps = append(sweeps, &sweep{k: k, rules: rules, from: append([]byte{rowObject}, k.id[:]...)})
		return true, err
	})
	if err != nil {
		return err
	}
	for _, s := range sweeps {
		for s.from != nil {
			var page []ending
			if err := b.view(func(r store.Reader) (err error) { page, err = s.page(r, b.now()); return err }); err != nil {
				return err
			}
			for some := range slices.Chunk(page, 100) {
				if err := b.update(func(tx store.Tx) error {
					for _, e := range some {
						if err := b.endVersion(tx, s.k, e); err != nil {
							return fmt.Errorf("end %q: %w", e.name, err)
						}
					}
					return nil
				}); err != nil {
					return err
				}
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
		}
	}
	return nil
}

var errNoLifecycle = s3err.APIError{Code: "NoSuchLifecycleConfiguration", HTTPStatusCode: http.StatusNotFound, Description: "The lifecycle configuration does not exist"}

// lifecycleRoutes serve what versitygw has no backend's method for. They stand before its own, check as those do, and leave
// everything else to them.
func (b *objects) lifecycleRoutes(u auth.IAMService, root middlewares.RootUserConfig, region string) (out []s3api.Option) {
	for _, r := range []struct {
		method, name string
		action       auth.Action
		permission   auth.Permission
		serve        func(fiber.Ctx, string) (any, int, error)
	}{
		{fiber.MethodPut, metrics.ActionPutBucketLifecycleConfiguration, auth.PutLifecycleConfigurationAction, auth.PermissionWrite, func(c fiber.Ctx, name string) (any, int, error) {
			l, err := parseLifecycle(c.BodyRaw())
			if err != nil {
				return nil, 0, err
			}
			d, err := xml.Marshal(l)
			if err != nil {
				return nil, 0, err
			}
			return nil, http.StatusOK, b.change(name, func(k *bucket) error { k.lifecycle = d; return nil })
		}},
		{fiber.MethodGet, metrics.ActionGetBucketLifecycleConfiguration, auth.GetLifecycleConfigurationAction, auth.PermissionRead, func(_ fiber.Ctx, name string) (any, int, error) {
			k, err := b.bucket(name)
			if err == nil && k.lifecycle == nil {
				err = errNoLifecycle
			}
			if err != nil {
				return nil, 0, err
			}
			l, err := parseLifecycle(k.lifecycle)
			return l, http.StatusOK, err
		}},
		{fiber.MethodDelete, metrics.ActionDeleteBucketLifecycle, auth.PutLifecycleConfigurationAction, auth.PermissionWrite, func(_ fiber.Ctx, name string) (any, int, error) {
			return nil, http.StatusNoContent, b.change(name, func(k *bucket) error { k.lifecycle = nil; return nil })
		}},
	} {
		serve := func(c fiber.Ctx) (*controllers.Response, error) {
			name, acl := c.Params("bucket"), utils.ContextKeyParsedAcl.Get(c).(auth.ACL)
			meta := &controllers.MetaOptions{BucketOwner: acl.Owner}
			err := auth.VerifyAccess(c, b, auth.AccessOptions{
				Acl: acl, AclPermission: r.permission, IsRoot: utils.ContextKeyIsRoot.Get(c).(bool), Acc: utils.ContextKeyAccount.Get(c).(auth.Account),
				Bucket: name, Actions: []auth.Action{r.action}, IsPublicRequest: utils.ContextKeyPublicBucket.IsSet(c), Iam: u,
			})
			var data any
			if err == nil {
				data, meta.Status, err = r.serve(c, name)
			}
			return &controllers.Response{Data: data, MetaOpts: meta}, err
		}
		checks := []fiber.Handler{
			middlewares.BucketObjectNameValidator(),
			middlewares.AuthorizePublicBucketAccess(b, r.name, r.action, r.permission, region, false),
			middlewares.VerifyPresignedV4Signature(root, u, region, false),
			middlewares.VerifyV4Signature(root, u, region, false, true, false),
		}
		if r.method == fiber.MethodPut {
			checks = append(checks, middlewares.VerifyChecksums(false, true, true))
		}
		h := controllers.ProcessHandlers(serve, r.name, &controllers.Services{}, append(checks, middlewares.ParseAcl(b))...)
		out = append(out, s3api.WithRoute(r.method, "/:bucket", func(c fiber.Ctx) error {
			if !c.Request().URI().QueryArgs().Has("lifecycle") {
				return c.Next()
			}
			utils.ContextKeyRegion.Set(c, region)
			utils.ContextKeyStartTime.Set(c, time.Now())
			utils.ContextKeyRootAccessKey.Set(c, root.Access)
			utils.ContextKeyAccount.Set(c, auth.Account{})
			utils.ContextKeyIsRoot.Set(c, false)
			return h(c)
		}))
	}
	return out
}
