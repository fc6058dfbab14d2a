package deploy

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"holdfast/contract"
	"holdfast/store"
)

// bindStore gives a document with buckets its store: that of the revision before, or a new one.
func (u *User) bindStore(ctx context.Context, doc *contract.Document, current *Current) error {
	if current != nil {
		if err := doc.BindVolumes(current.Header); err != nil {
			return err
		}
	}
	has := current != nil && current.Header.Store != (contract.Store{})
	switch {
	case doc.Body.FrontEnd() == nil && has:
		return errors.New("the contract has buckets, and the file has none: a revision cannot drop them all; name them under x-holdfast.buckets, or cancel the contract")
	case doc.Body.FrontEnd() == nil:
		return nil
	case has:
		if was := current.Header.Store.Limit; doc.Header.Store.Limit < was {
			return fmt.Errorf("x-holdfast.storage is %d bytes and would be %d: it can only grow", was, doc.Header.Store.Limit)
		}
		doc.Bind(current.Header.Store, *current.Body.FrontEnd())
		return nil
	}
	nodes, err := u.Client.Nodes(ctx)
	if err != nil {
		return err
	}
	farms := map[string]bool{}
	for _, n := range nodes {
		if n.Storage > 0 {
			farms[n.FarmName] = true
		}
	}
	if len(farms) < contract.StoreN {
		return fmt.Errorf("buckets are dispersed over %d farms, and the grid has %d that keep shards: add farms whose nodes offer storage", contract.StoreN, len(farms))
	}
	f := contract.FrontEnd{Access: "HF" + rand.Text()[:18], Secret: rand.Text() + rand.Text()[:14]}
	rand.Read(f.Store[:])
	root := u.storeRoot(&f)
	keys, err := root.Keys(0)
	if err != nil {
		return err
	}
	front, recovery, err := root.Pins()
	if err != nil {
		return err
	}
	f.Keys = keys.Marshal()
	doc.Bind(contract.Store{FrontEnd: front, Recovery: recovery}, f)
	return nil
}

func (u *User) storeRoot(f *contract.FrontEnd) store.Root { return u.Keys.StoreRoot(f.Store) }

// ErrNoBuckets is returned for a contract without a store.
var ErrNoBuckets = errors.New("the contract has no buckets")

// StorePhrase is what restores the store of a contract's buckets anywhere, and undoes deletes in it.
func (u *User) StorePhrase(ctx context.Context, name string) (string, error) {
	c, err := u.Find(ctx, name)
	if err != nil {
		return "", err
	}
	cur, err := u.Open(ctx, c, c.Current)
	if err != nil {
		return "", err
	}
	f := cur.Body.FrontEnd()
	if f == nil {
		return "", fmt.Errorf("%s: %w", name, ErrNoBuckets)
	}
	root := u.storeRoot(f)
	// A body that another holder of the account's policy signed may name a store of his.
	if front, recovery, err := root.Pins(); err != nil || front != cur.Header.Store.FrontEnd || recovery != cur.Header.Store.Recovery {
		return "", errors.Join(fmt.Errorf("%s: its store derives from another account's root", name), err)
	}
	return root.Phrase(), nil
}

// pinVolumes names the keys of the stores of volumes that have none yet. The one that undoes deletes is the account's alone.
func (u *User) pinVolumes(h *contract.Header, keys *contract.Keys) error {
	h.Volumes = slices.Clone(h.Volumes)
	for i := range h.Volumes {
		v := &h.Volumes[i]
		if v.Store == (contract.Store{}) || v.Store.FrontEnd != [32]byte{} {
			continue
		}
		seed := keys.VolumeStore(v.Name)
		front, _, err := store.Root(seed).Pins()
		if err != nil {
			return err
		}
		_, recovery, err := store.Root(u.Keys.StoreRoot(seed)).Pins()
		if err != nil {
			return err
		}
		v.Store.FrontEnd, v.Store.Recovery = front, recovery
	}
	return nil
}
