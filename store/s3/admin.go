package s3

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/s3err"
)

// Errors of an Admin.
var (
	ErrNoUser   = errors.New("there is no such user")
	ErrUser     = errors.New("not possible for a user")
	ErrNoBucket = errors.New("there is no such bucket")
	ErrNoPolicy = errors.New("the bucket has no policy")
	ErrPolicy   = errors.New("not a policy for this bucket")
)

// Admin changes who may use a store, and its buckets' policies, while a server runs.
type Admin struct {
	b *objects
	u *users
}

// User is an account without its secret.
type User struct {
	Access  string   `json:"access_key"`
	Role    string   `json:"role"`
	Root    bool     `json:"root,omitempty"`    // the account of the configuration
	Buckets []string `json:"buckets,omitempty"` // that it owns
}

// Roles are what a user may be: one who uses what others give him, one who makes buckets too, one who may do everything.
func Roles() []string {
	return []string{string(auth.RoleUser), string(auth.RoleUserPlus), string(auth.RoleAdmin)}
}

// accessName is what travels in the Authorization header between other words.
var accessName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{2,63}$`)

// minSecret is what clients have always made: shorter ones can be guessed.
const minSecret = 16

// NewSecret draws a secret key.
func NewSecret() string {
	var b [25]byte
	rand.Read(b[:])
	return base32.StdEncoding.EncodeToString(b[:])
}

// Users are all accounts, the configuration's first.
func (a *Admin) Users() ([]User, error) {
	all, err := a.u.ListUserAccounts()
	if err != nil {
		return nil, fmt.Errorf("list users: %w", err)
	}
	buckets, err := a.b.ListBucketsAndOwners(context.Background())
	if err != nil {
		return nil, fmt.Errorf("list users: %w", err)
	}
	out := []User{}
	for i, x := range append([]auth.Account{a.u.root}, all...) {
		u := User{Access: x.Access, Role: string(x.Role), Root: i == 0}
		for _, b := range buckets {
			if b.Owner == x.Access {
				u.Buckets = append(u.Buckets, b.Name)
			}
		}
		out = append(out, u)
	}
	return out, nil
}

// AddUser makes an account.
func (a *Admin) AddUser(access, secret, role string) error {
	err := a.mayBe(access, secret)
	switch {
	case err != nil:
	case !slices.Contains(Roles(), role):
		err = fmt.Errorf("role %q: there are %s: %w", role, strings.Join(Roles(), ", "), ErrUser)
	default:
		if err = a.u.CreateAccount(auth.Account{Access: access, Secret: secret, Role: auth.Role(role)}); errors.Is(err, auth.ErrUserExists) {
			err = fmt.Errorf("it exists: %w", ErrUser)
		}
	}
	if err != nil {
		return fmt.Errorf("add user %q: %w", access, err)
	}
	return nil
}

func (a *Admin) mayBe(access, secret string) error {
	switch {
	case !accessName.MatchString(access):
		return fmt.Errorf("an access key has 3 to 64 letters, digits and . _ @ -: %w", ErrUser)
	case len(secret) < minSecret || len(secret) > maxSecret || strings.ContainsFunc(secret, func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Errorf("a secret key has %d to %d printable characters: %w", minSecret, maxSecret, ErrUser)
	}
	return nil
}

// others says no to what is about the configuration's account: nothing here changes that.
func (a *Admin) others(access string) error {
	if access == a.u.root.Access {
		return fmt.Errorf("it is the server's own account, which its environment or its credentials file names: %w", ErrUser)
	}
	return nil
}

// SetSecret gives a user another secret key. The old one opens nothing from then on.
func (a *Admin) SetSecret(access, secret string) error {
	err := errors.Join(a.others(access), a.mayBe(access, secret))
	if err == nil {
		err = a.u.UpdateUserAccount(access, auth.MutableProps{Secret: &secret})
	}
	return a.about("rotate the key of", access, err)
}

// RemoveUser takes an account away. Its buckets stay, and the server's own account has them.
func (a *Admin) RemoveUser(access string) error {
	err := a.others(access)
	if err == nil {
		err = a.u.change(access, func(known map[string]auth.Account) (*auth.Account, error) {
			if _, ok := known[access]; !ok {
				return nil, auth.ErrNoSuchUser
			}
			return nil, nil
		})
	}
	return a.about("remove", access, err)
}

func (a *Admin) about(what, access string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, auth.ErrNoSuchUser):
		err = ErrNoUser
	}
	return fmt.Errorf("%s user %q: %w", what, access, err)
}

// Bucket is a bucket, its owner and whether it has a policy.
type Bucket struct {
	Name   string `json:"name"`
	Owner  string `json:"owner"`
	Policy bool   `json:"policy"`
}

// Buckets are all of them.
func (a *Admin) Buckets() ([]Bucket, error) {
	out := []Bucket{}
	err := a.b.walkBuckets("", "", func(name string, k *bucket) (bool, error) {
		acl, err := auth.ParseACL(k.acl)
		out = append(out, Bucket{name, acl.Owner, k.policy != nil})
		return true, err
	})
	if err != nil {
		return nil, fmt.Errorf("list buckets: %w", err)
	}
	return out, nil
}

// Policy is a bucket's policy, as it was set.
func (a *Admin) Policy(bucket string) ([]byte, error) {
	p, err := a.b.GetBucketPolicy(context.Background(), bucket)
	return p, a.ofPolicy("policy", bucket, err)
}

// SetPolicy replaces a bucket's policy by one that is valid for it: it speaks of that bucket and of users that there are.
func (a *Admin) SetPolicy(bucket string, policy []byte) error {
	_, err := a.b.bucket(bucket)
	if err == nil {
		if err = auth.ValidatePolicyDocument(policy, bucket, a.u); err != nil {
			err = fmt.Errorf("%w: %w", err, ErrPolicy)
		} else {
			err = a.b.PutBucketPolicy(context.Background(), bucket, policy)
		}
	}
	return a.ofPolicy("set policy", bucket, err)
}

// RemovePolicy leaves a bucket to its owner.
func (a *Admin) RemovePolicy(bucket string) error {
	_, err := a.b.GetBucketPolicy(context.Background(), bucket)
	if err == nil {
		err = a.b.DeleteBucketPolicy(context.Background(), bucket)
	}
	return a.ofPolicy("remove policy", bucket, err)
}

func (a *Admin) ofPolicy(what, bucket string, err error) error {
	if err == nil {
		return nil
	}
	var said s3err.S3Error
	if errors.As(err, &said) {
		switch said.BaseError().Code {
		case "NoSuchBucket":
			err = ErrNoBucket
		case "NoSuchBucketPolicy":
			err = ErrNoPolicy
		}
	}
	return fmt.Errorf("%s of bucket %q: %w", what, bucket, err)
}
