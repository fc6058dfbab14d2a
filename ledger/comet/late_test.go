package comet

import (
	"log/slog"
	"testing"

	"github.com/cometbft/cometbft/store"
)

// A goroutine of CometBFT that outlives its stop finds nothing, and does not end the process.
func TestALateReaderFindsNothing(t *testing.T) {
	d, err := openDisk(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	late, bare := store.NewBlockStore(lateTable{d.table(tableBlocks)}), store.NewBlockStore(d.table(tableBlocks))
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if c := late.LoadBlockCommit(1); c != nil {
		t.Errorf("it has read %v from a closed database", c)
	}
	if m := late.LoadBlockMeta(1); m != nil {
		t.Errorf("it has read %v from a closed database", m)
	}
	defer func() {
		if recover() == nil {
			t.Error("control: without lateTable the block store does not panic")
		}
	}()
	bare.LoadBlockCommit(1)
}
