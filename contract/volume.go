package contract

import (
	"fmt"

	"holdfast/identity"
)

// VolumeStore is how much of a location the snapshots of a volume of that size may take: twice its content, and the store's
// own log.
func VolumeStore(size uint64) uint64 { return max(MinStore, 2*size/StoreK) }

// VolumeStore is what the store of a volume's snapshots derives from: whoever can open the volume can open its snapshots.
// It is of NewKeys or later.
func (k *Keys) VolumeStore(name string) [32]byte {
	key := k.Volumes[name]
	return [32]byte(identity.Derive(key[:], "holdfast/volume/store/v1"))
}

// BindVolumes gives the volumes the stores of the revision before, so that what was kept there stays readable. A volume that
// has snapshots keeps them.
func (d *Document) BindVolumes(previous *Header) error {
	for i := range d.Header.Volumes {
		v := &d.Header.Volumes[i]
		for _, was := range previous.Volumes {
			if was.Name != v.Name || was.Store == (Store{}) {
				continue
			}
			if v.Store == (Store{}) {
				return fmt.Errorf("volume %s has snapshots, and cannot be without: leave out snapshots: false", v.Name)
			}
			v.Store = was.Store
		}
	}
	return nil
}
