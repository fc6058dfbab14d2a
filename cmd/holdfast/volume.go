package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/internal/grid"
	"holdfast/ledger"
	"holdfast/node"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

func (a *app) volumeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "volume", Short: "Look at volumes and their snapshots, and put them back"})
	cmd.AddCommand(
		&cobra.Command{
			Use: "list [CONTRACT]", Short: "List the volumes of your contracts, and how old what is saved of them is", Args: asUsed,
			Example: "  holdfast volume list\n  holdfast volume list reader --json",
			RunE:    a.withUser(a.volumeList),
		},
		&cobra.Command{
			Use: "snapshots CONTRACT/VOLUME", Short: "List the snapshots that are kept of a volume", Args: asUsed,
			Long:    "Asks the node that has the volume, end-to-end encrypted.",
			Example: "  holdfast volume snapshots reader/db",
			RunE:    a.withNode(a.volumeSnapshots),
		},
		a.volumeRestoreCmd(),
	)
	return cmd
}

// withNode is withUser for what asks nodes.
func (a *app) withNode(f func(ctx context.Context, w io.Writer, u *deploy.User, cfg *grid.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		u, cfg, err := a.user(cmd.Context())
		if err != nil {
			return err
		}
		defer u.Client.Close()
		return f(cmd.Context(), cmd.OutOrStdout(), u, cfg, args)
	}
}

// volumeStatus is a volume as its owner sees it.
type volumeStatus struct {
	Contract string            `json:"contract"`
	Name     string            `json:"name"`
	ID       contract.VolumeID `json:"id"`
	Size     uint64            `json:"size"`
	Service  string            `json:"service"`
	Node     string            `json:"node"`
	Snapshot uint64            `json:"snapshot"` // sequence of the newest that the ledger knows of; 0: of none
	Saved    *time.Time        `json:"saved,omitempty"`
	Unsaved  string            `json:"unsaved,omitempty"`

	workload *ledger.Assignment
	on       *ledger.Node
}

// volumes are those of one contract at its current revision.
func (a *app) volumes(ctx context.Context, u *deploy.User, c *ledger.Contract, nodes []*ledger.Node, reports map[contract.WorkloadID][]ledger.Report) ([]volumeStatus, error) {
	h, err := u.Header(ctx, c.Current)
	if err != nil {
		return nil, err
	}
	as, err := api.Get[ledger.Assignments](ctx, u.Client, ledger.AssignmentsKey(c.ID))
	if errors.Is(err, ledger.ErrAbsent) {
		as = &ledger.Assignments{}
	} else if err != nil {
		return nil, err
	}
	var keys []string
	for _, v := range h.Volumes {
		keys = append(keys, ledger.VolumeKey(contract.VolumeOf(c.ID, v.Name)))
	}
	recs, err := api.GetAll[ledger.Volume](ctx, u.Client, keys)
	if err != nil {
		return nil, err
	}
	var out []volumeStatus
	for i, v := range h.Volumes {
		x := volumeStatus{Contract: c.Name, Name: v.Name, ID: contract.VolumeOf(c.ID, v.Name), Size: v.Size}
		if recs[i] != nil {
			x.Snapshot = recs[i].Sequence
			if n := slices.IndexFunc(nodes, func(n *ledger.Node) bool { return n.ID == recs[i].Node }); n >= 0 {
				x.Node, x.on = nodes[n].Name, nodes[n]
			}
		}
		for _, s := range h.Services {
			if slices.Contains(s.Volumes, v.Name) {
				x.Service = s.Name
			}
		}
		for j := range as.Current {
			if w := &as.Current[j]; w.Service == x.Service {
				x.workload = w
				st := workload(c, c.Number(as.Revision), w, x.on, reports[w.Workload])
				x.Saved, x.Unsaved = st.Saved, st.Unsaved
			}
		}
		if v.Store == (contract.Store{}) {
			x.Unsaved = "no snapshots are taken of it"
		}
		out = append(out, x)
	}
	return out, nil
}

func (v *volumeStatus) loss(now time.Time) string {
	return (&workloadStatus{Saved: v.Saved, Unsaved: v.Unsaved}).loss(now)
}

func (a *app) volumeList(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
	all, err := u.Contracts(ctx)
	if err != nil {
		return err
	}
	if len(args) > 0 {
		c, err := u.Find(ctx, args[0])
		if err != nil {
			return err
		}
		all = []*ledger.Contract{c}
	}
	nodes, err := u.Client.Nodes(ctx)
	if err != nil {
		return err
	}
	beats, err := u.Client.Reports(ctx, nodes)
	if err != nil {
		return err
	}
	reports := byWorkload(beats)
	out := []volumeStatus{}
	for _, c := range all {
		if c.State == ledger.Retired {
			continue
		}
		vs, err := a.volumes(ctx, u, c, nodes, reports)
		if err != nil {
			return err
		}
		out = append(out, vs...)
	}
	if a.json {
		return printJSON(w, out)
	}
	if len(out) == 0 {
		fmt.Fprintln(w, "no volumes")
		return nil
	}
	rows := [][]string{{"VOLUME", "SIZE", "SERVICE", "NODE", "SAVED"}}
	for _, v := range out {
		rows = append(rows, []string{v.Contract + "/" + v.Name, units.BytesSize(float64(v.Size)), v.Service, v.Node, v.loss(time.Now())})
	}
	table(w, rows...)
	return nil
}

// theVolume finds CONTRACT/VOLUME.
func (a *app) theVolume(ctx context.Context, u *deploy.User, name string) (*volumeStatus, error) {
	of, name, ok := strings.Cut(name, "/")
	if !ok {
		return nil, fmt.Errorf("%q: write CONTRACT/VOLUME, as holdfast volume list shows them", of)
	}
	c, err := u.Find(ctx, of)
	if err != nil {
		return nil, err
	}
	nodes, err := u.Client.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	all, err := a.volumes(ctx, u, c, nodes, nil)
	if err != nil {
		return nil, err
	}
	var names []string
	for i := range all {
		if all[i].Name == name {
			return &all[i], nil
		}
		names = append(names, all[i].Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s has no volumes", c.Name)
	}
	return nil, fmt.Errorf("%s has no volume %q: it has %s", c.Name, name, strings.Join(names, ", "))
}

// snapshotsOf asks the node that has a volume, newest first.
func snapshotsOf(ctx context.Context, u *deploy.User, cfg *grid.Client, v *volumeStatus) ([]node.Snapshot, error) {
	if v.on == nil || v.workload == nil || v.workload.Node != v.on.ID {
		return nil, fmt.Errorf("volume %s is on no node now: its snapshots are shown while %s is assigned", v.Name, v.Service)
	}
	var b bytes.Buffer
	if err := askNode(ctx, u, cfg.Gateway, v.on, "/v1/volumes/"+v.workload.Workload.String()+"/"+v.Name, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", v.on.Name, err)
	}
	var all []node.Snapshot
	if err := json.Unmarshal(b.Bytes(), &all); err != nil {
		return nil, fmt.Errorf("%s answers with something else: %w", v.on.Name, err)
	}
	slices.Reverse(all)
	return all, nil
}

func (a *app) volumeSnapshots(ctx context.Context, w io.Writer, u *deploy.User, cfg *grid.Client, args []string) error {
	v, err := a.theVolume(ctx, u, args[0])
	if err != nil {
		return err
	}
	all, err := snapshotsOf(ctx, u, cfg, v)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(w, all)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "no snapshots yet")
		return nil
	}
	rows := [][]string{{"SNAPSHOT", "TIME", "AGE", "DIGEST"}}
	for _, s := range all {
		rows = append(rows, []string{fmt.Sprint(s.Sequence), stamp(s.Time), time.Since(s.Time).Round(time.Second).String(), printable([]byte(s.Digest[:min(16, len(s.Digest))]))})
	}
	table(w, rows...)
	return nil
}

func (a *app) volumeRestoreCmd() *cobra.Command {
	var yes, dry bool
	cmd := &cobra.Command{
		Use: "restore CONTRACT/VOLUME SNAPSHOT", Short: "Put a volume back to one of its snapshots", Args: asUsed,
		Long:    "Its service stops, the node takes a last snapshot of what is there now, makes the disk anew from the snapshot that is named, and\nstarts the service on it. The last snapshot is kept like all: it can be gone back to. Others may have a say, as in a revision.",
		Example: "  holdfast volume snapshots reader/db\n  holdfast volume restore reader/db 41               # asks for the volume's name\n  holdfast volume restore reader/db 41 --dry-run",
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		seq, err := strconv.ParseUint(args[1], 10, 64)
		if err != nil {
			return wrong(cmd, fmt.Errorf("snapshot %q: a number, as holdfast volume snapshots shows it", args[1]))
		}
		return a.withNode(func(ctx context.Context, w io.Writer, u *deploy.User, cfg *grid.Client, args []string) error {
			v, err := a.theVolume(ctx, u, args[0])
			if err != nil {
				return err
			}
			all, err := snapshotsOf(ctx, u, cfg, v)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(all, func(s node.Snapshot) bool { return s.Sequence == seq })
			if i < 0 {
				return fmt.Errorf("snapshot %d of %s is not kept: see %s", seq, args[0], a.self("volume snapshots "+args[0]))
			}
			digest, err := hex.DecodeString(all[i].Digest)
			if err != nil || len(digest) != 32 {
				return fmt.Errorf("%s says that snapshot %d has digest %.80q", v.on.Name, seq, all[i].Digest)
			}
			what := fmt.Sprintf("%s is put back to what it was at %s (%v ago), and %s starts anew.", args[0], stamp(all[i].Time), time.Since(all[i].Time).Round(time.Second), v.Service)
			if dry {
				fmt.Fprintln(w, what)
				return nil
			}
			if !yes {
				if err := typed(cmd, what, v.Name); err != nil {
					return err
				}
			}
			p, err := u.RestoreVolume(ctx, v.ID, [32]byte(digest))
			if err != nil {
				return err
			}
			if p != nil {
				return a.proposed(w, p)
			}
			if a.json {
				return printJSON(w, all[i])
			}
			fmt.Fprintln(w, what)
			return nil
		})(cmd, args)
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would happen")
	return cmd
}
