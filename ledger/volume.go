package ledger

import (
	"errors"
	"fmt"
	"slices"

	"holdfast/contract"
	"holdfast/identity"
)

// A volume is on one node. It stays there, and its workload with it, until a snapshot of it is in its store: from then on it
// follows the workload when the node is lost, and the next node makes its disk from the newest snapshot. Its store can be
// used from the node that has it and from no other, which is what fences a node that was lost and is back.

// volumes makes the records of a revision's volumes. One that is there stays as it is.
func (b *batch) volumes(id contract.ID, h *contract.Header) error {
	for _, v := range h.Volumes {
		vid := contract.VolumeOf(id, v.Name)
		old, err := get[Volume](&b.State, VolumeKey(vid))
		switch {
		case errors.Is(err, ErrAbsent):
			old = &Volume{ID: vid, Contract: id, Name: v.Name, Size: v.Size}
			set(b, VolumeKey(vid), old)
		case err != nil:
			return fmt.Errorf("volume %q: %w", v.Name, err)
		case old.Size != v.Size:
			return fmt.Errorf("volume %q has %d bytes; a volume's size cannot change", v.Name, old.Size)
		}
		if err := b.volumeStore(old, &v); err != nil {
			return fmt.Errorf("volume %q: %w", v.Name, err)
		}
	}
	return nil
}

// volumeStore makes the store of a volume's snapshots when it is not there yet. It stays as it was made: a device that was
// let in later cannot have the locations listen to somebody else.
func (b *batch) volumeStore(v *Volume, want *contract.Volume) error {
	s, err := get[Store](&b.State, StoreKey(contract.ID(v.ID)))
	switch {
	case errors.Is(err, ErrAbsent) && want.Store == contract.Store{}:
		return nil
	case errors.Is(err, ErrAbsent):
		return b.addStore(&Store{Contract: v.Contract, Volume: v.ID, FrontEnd: want.Store.FrontEnd, Recovery: want.Store.Recovery, Limit: want.Store.Limit, Node: v.Node})
	case err != nil:
		return fmt.Errorf("store: %w", err)
	case want.Store == contract.Store{}:
		return errors.New("a revision cannot drop the store of its snapshots")
	case want.Store != contract.Store{FrontEnd: s.FrontEnd, Recovery: s.Recovery, Limit: s.Limit}:
		return errors.New("the store of its snapshots cannot change")
	}
	return nil
}

// dropVolume removes what the ledger has of a volume.
func (b *batch) dropVolume(id contract.VolumeID) error {
	b.del(VolumeKey(id))
	s, err := get[Store](&b.State, StoreKey(contract.ID(id)))
	if errors.Is(err, ErrAbsent) {
		return nil
	} else if err != nil {
		return fmt.Errorf("store of %v: %w", id, err)
	}
	return b.dropStore(s)
}

// settleVolume puts a volume onto a node, when its workload came there.
func (b *batch) settleVolume(v *Volume, node identity.NodeID) error {
	if v.Node == node {
		return nil
	}
	v.Node, v.Created = node, false
	set(b, VolumeKey(v.ID), v)
	s, err := get[Store](&b.State, StoreKey(contract.ID(v.ID)))
	if errors.Is(err, ErrAbsent) {
		return nil
	} else if err != nil {
		return fmt.Errorf("store of %v: %w", v.ID, err)
	}
	s.Node = node
	set(b, StoreKey(s.ID()), s)
	return nil
}

// theVolume is one of which the signer may speak: the node that has it.
func (b *batch) theVolume(who *signers, id contract.VolumeID) (*Volume, error) {
	v, err := get[Volume](&b.State, VolumeKey(id))
	if err != nil {
		return nil, fmt.Errorf("%v: %w", id, err)
	}
	if who.node == nil || v.Node != who.node.ID {
		return nil, fmt.Errorf("%v is on another node", id)
	}
	return v, nil
}

func (b *batch) volumeCreated(who *signers, p *VolumeCreated) error {
	v, err := b.theVolume(who, p.Volume)
	if err != nil {
		return err
	}
	v.Created, v.From = true, [32]byte{}
	set(b, VolumeKey(v.ID), v)
	return nil
}

func (b *batch) volumeSaved(who *signers, p *VolumeSaved) error {
	v, err := b.theVolume(who, p.Volume)
	if err != nil {
		return err
	}
	if _, has := b.tree.get(StoreKey(contract.ID(v.ID))); !has {
		return fmt.Errorf("%v has no store for snapshots", v.ID)
	}
	switch {
	case !v.Created:
		return fmt.Errorf("%v has no disk yet of which a snapshot could be", v.ID)
	case p.Sequence <= v.Sequence || p.Snapshot == [32]byte{}:
		return fmt.Errorf("snapshot %d of %v: the ledger knows of %d", p.Sequence, v.ID, v.Sequence)
	}
	v.Sequence, v.Snapshot = p.Sequence, p.Snapshot
	set(b, VolumeKey(v.ID), v)
	return nil
}

// volumeRestore has the node that has a volume make its disk anew from a snapshot, in a new epoch of its workload.
func (b *batch) volumeRestore(who *signers, p *VolumeRestore) error {
	v, err := get[Volume](&b.State, VolumeKey(p.Volume))
	if err != nil {
		return fmt.Errorf("%v: %w", p.Volume, err)
	}
	c, h, err := b.mine(who, v.Contract, identity.ActRevise)
	if err != nil {
		return err
	}
	switch {
	case p.Snapshot == [32]byte{}:
		return errors.New("no snapshot is named")
	case v.Sequence == 0:
		return fmt.Errorf("the ledger knows of no snapshot of volume %q", v.Name)
	case c.Over():
		return fmt.Errorf("%v is %s", c.ID, c.State)
	}
	v.Created, v.From = false, p.Snapshot
	set(b, VolumeKey(v.ID), v)
	as, err := orZero(get[Assignments](&b.State, AssignmentsKey(c.ID)))
	if err != nil {
		return fmt.Errorf("assignments of %v: %w", c.ID, err)
	}
	for i := range as.Current {
		a := &as.Current[i]
		if s, ok := h.Service(a.Service); ok && slices.Contains(s.Volumes, v.Name) {
			a.Epoch++
			a.Height = b.height
			set(b, AssignmentsKey(c.ID), as)
		}
	}
	if err := who.agreed(identity.ActRevise, h.Consents(identity.ActRevise)); err != nil {
		return of(c.ID, err)
	}
	return nil
}
