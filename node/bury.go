package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/ledger"
	"holdfast/volume"
)

// A volume's image outlives its workload, its contract's end and the time in which that can be taken back. When the ledger
// has no record of it any more it is nobody's: the node that has it removes it. Images are named by a part of the volume's
// ID; the whole is in a file beside, written before the image is.

func (a *Agent) volumeIDs() string { return filepath.Join(a.cfg.Data, "volume-ids") }

// openVolume opens a volume, and has its ID noted first if it may be made. One that was restored is there.
func (a *Agent) openVolume(ctx context.Context, v *WorkVolume) (string, error) {
	if !v.Created {
		if err := a.noteVolume(v.ID); err != nil {
			return "", err
		}
	}
	return a.volumes.Open(ctx, volume.Spec{ID: volumeName(v.ID), Size: v.Size, Key: v.Key, Create: !v.Created && !v.Restore})
}

func (a *Agent) noteVolume(id contract.VolumeID) error {
	if err := os.MkdirAll(a.volumeIDs(), 0o700); err != nil {
		return err
	}
	return writeFile(filepath.Join(a.volumeIDs(), id.String()))
}

// bury removes the images of volumes that the ledger has no more, if that was last done so long ago. used are those of the
// node's workloads.
func (a *Agent) bury(ctx context.Context, r api.Reader, used map[string]bool, every time.Duration) error {
	if time.Since(a.buried) < every {
		return nil
	}
	a.buried = time.Now()
	entries, err := os.ReadDir(a.volumeIDs())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var ids []contract.VolumeID
	var keys []string
	for _, e := range entries {
		var id contract.VolumeID
		if err := id.UnmarshalText([]byte(e.Name())); err == nil && !used[volumeName(id)] {
			ids, keys = append(ids, id), append(keys, ledger.VolumeKey(id))
		}
	}
	recs, err := api.GetAll[ledger.Volume](ctx, r, keys)
	if err != nil {
		return fmt.Errorf("volumes that are not used: %w", err)
	}
	var errs []error
	for i, rec := range recs {
		switch {
		case rec == nil:
			a.log.Info("removing a volume whose contract is retired", "volume", ids[i])
		case rec.Node != a.cfg.Keys.ID && rec.Created: // it was restored there
			a.log.Info("removing a volume that another node has", "volume", ids[i])
		default:
			continue
		}
		err := a.volumes.Destroy(ctx, volumeName(ids[i]))
		if err == nil {
			err = os.Remove(filepath.Join(a.volumeIDs(), ids[i].String()))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
