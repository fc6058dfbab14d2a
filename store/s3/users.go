package s3

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/versity/versitygw/auth"

	"holdfast/store"
)

// users are the accounts behind auth.IAMService. The root account is the configuration's; others are rows, whose secrets are
// sealed: the front end's database is not enough to sign as somebody.
type users struct {
	b    *objects
	root auth.Account
	seal cipher.AEAD

	mu    sync.RWMutex
	known map[string]auth.Account // all there are; nil until they were read
}

var _ auth.IAMService = (*users)(nil)

func newUsers(b *objects, root auth.Account, key [32]byte) (*users, error) {
	if root.Access == "" || root.Secret == "" {
		return nil, errors.New("an access key and a secret key are needed")
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	seal, err := cipher.NewGCMWithRandomNonce(block)
	return &users{b: b, root: root, seal: seal}, err
}

// user is a row.
type user struct {
	Version              int
	Role                 auth.Role
	User, Group, Project int
	Secret               []byte // sealed for the access key
}

func userKey(access string) []byte { return append([]byte{rowUser}, access...) }

const (
	maxAccess = 256
	maxSecret = 1024
	maxUsers  = 10000
)

func (u *users) encode(a auth.Account) ([]byte, error) {
	return json.Marshal(user{Version: rowVersion, Role: a.Role, User: a.UserID, Group: a.GroupID, Project: a.ProjectID, Secret: u.seal.Seal(nil, nil, []byte(a.Secret), userKey(a.Access))})
}

func (u *users) parse(access string, row []byte) (a auth.Account, err error) {
	var r user
	if err := json.Unmarshal(row, &r); err != nil || r.Version != rowVersion {
		return a, fmt.Errorf("user %s: %w", access, errors.Join(errRow, err))
	}
	secret, err := u.seal.Open(nil, nil, r.Secret, userKey(access))
	if err != nil {
		return a, fmt.Errorf("user %s: secret: %w", access, err)
	}
	return auth.Account{Access: access, Secret: string(secret), Role: r.Role, UserID: r.User, GroupID: r.Group, ProjectID: r.Project}, nil
}

// all reads the accounts once: every request asks for one. Nobody else changes them.
func (u *users) all() (map[string]auth.Account, error) {
	u.mu.RLock()
	known := u.known
	u.mu.RUnlock()
	if known != nil {
		return known, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.load()
}

func (u *users) load() (map[string]auth.Account, error) {
	if u.known != nil {
		return u.known, nil
	}
	known := map[string]auth.Account{}
	err := u.b.view(func(r store.Reader) (err error) {
		c := r.Scan([]byte{rowUser}, []byte{rowUser + 1})
		defer func() { err = errors.Join(err, c.Close()) }()
		for c.Next() {
			a, err := u.parse(string(c.Key()[1:]), c.Value())
			if err != nil {
				return err
			}
			known[a.Access] = a
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	u.known = known
	return known, nil
}

// change writes an account, or takes it away for nil. f gets what there is.
func (u *users) change(access string, f func(known map[string]auth.Account) (*auth.Account, error)) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	known, err := u.load()
	if err != nil {
		return err
	}
	a, err := f(known)
	if err != nil {
		return err
	}
	var row []byte
	if a != nil {
		if len(a.Access) == 0 || len(a.Access) > maxAccess || len(a.Secret) == 0 || len(a.Secret) > maxSecret {
			return fmt.Errorf("user %q: an access key of 1 to %d bytes and a secret key of 1 to %d are needed", a.Access, maxAccess, maxSecret)
		}
		if row, err = u.encode(*a); err != nil {
			return err
		}
	}
	u.known = nil // until it is known how it ended
	err = u.b.update(func(tx store.Tx) error {
		if row == nil {
			tx.Delete(userKey(access))
		} else {
			tx.Set(userKey(access), row)
		}
		return nil
	})
	return err
}

func (u *users) CreateAccount(a auth.Account) error {
	return u.change(a.Access, func(known map[string]auth.Account) (*auth.Account, error) {
		if _, ok := known[a.Access]; ok || a.Access == u.root.Access {
			return nil, auth.ErrUserExists
		}
		if len(known) >= maxUsers {
			return nil, fmt.Errorf("there are %d users already", len(known))
		}
		return &a, nil
	})
}

func (u *users) GetUserAccount(access string) (auth.Account, error) {
	if access == u.root.Access {
		return u.root, nil
	}
	known, err := u.all()
	if err != nil {
		return auth.Account{}, err
	}
	a, ok := known[access]
	if !ok {
		return auth.Account{}, auth.ErrNoSuchUser
	}
	return a, nil
}

func (u *users) ResolveAccounts(access []string) ([]string, error) {
	known, err := u.all()
	if err != nil {
		return nil, err
	}
	missing := []string{}
	for _, a := range access {
		if _, ok := known[a]; !ok && a != u.root.Access {
			missing = append(missing, a)
		}
	}
	return missing, nil
}

func (u *users) UpdateUserAccount(access string, p auth.MutableProps) error {
	return u.change(access, func(known map[string]auth.Account) (*auth.Account, error) {
		a, ok := known[access]
		if !ok {
			return nil, auth.ErrNoSuchUser
		}
		if p.Secret != nil {
			a.Secret = *p.Secret
		}
		if p.Role != "" {
			a.Role = p.Role
		}
		for to, from := range map[*int]*int{&a.UserID: p.UserID, &a.GroupID: p.GroupID, &a.ProjectID: p.ProjectID} {
			if from != nil {
				*to = *from
			}
		}
		return &a, nil
	})
}

func (u *users) DeleteUserAccount(access string) error {
	return u.change(access, func(known map[string]auth.Account) (*auth.Account, error) { return nil, nil })
}

func (u *users) ListUserAccounts() ([]auth.Account, error) {
	known, err := u.all()
	if err != nil {
		return nil, err
	}
	out := []auth.Account{}
	for _, access := range slices.Sorted(maps.Keys(known)) {
		out = append(out, known[access])
	}
	return out, nil
}

func (u *users) Shutdown() error { return nil }
