package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) nodeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "node", Short: "Look at nodes, and admit machines that ask to become nodes"})
	cmd.AddCommand(a.nodeListCmd(), a.nodeApproveCmd())
	return cmd
}

func (a *app) nodeListCmd() *cobra.Command {
	var pending bool
	cmd := &cobra.Command{
		Use: "list", Short: "List the grid's nodes, or with --pending the machines that ask to become nodes", Args: asUsed,
		Long:    "Lists the grid's nodes. With --pending it lists the machines that ask to become nodes now. Anybody can ask, under any\nname, for any farm: only its ID says which machine it is, and a machine shows it on its console.",
		Example: "  holdfast node list\n  holdfast node list --pending\n  holdfast node list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			if pending {
				return a.listPending(cmd.Context(), cmd.OutOrStdout(), c)
			}
			return a.listNodes(cmd.Context(), cmd.OutOrStdout(), c)
		},
	}
	cmd.Flags().BoolVar(&pending, "pending", false, "list the machines that ask to become nodes")
	return cmd
}

func (a *app) listNodes(ctx context.Context, w io.Writer, c *api.Client) error {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return err
	}
	if a.json {
		if nodes == nil {
			nodes = []*ledger.Node{}
		}
		return printJSON(w, nodes)
	}
	beats, err := c.Reports(ctx, nodes)
	if err != nil {
		return err
	}
	stored := map[identity.NodeID]uint64{}
	for _, h := range beats {
		stored[h.Node] = h.Stored
	}
	rows := [][]string{{"NAME", "FARM", "STATE", "CORES", "MEMORY", "STORAGE", "ENDPOINT", "ID"}}
	for _, n := range nodes {
		rows = append(rows, []string{n.Name, n.FarmName, stateColour(w, upDown(n.Up)), cores(n.CPUMilli), memory(n.Memory), storage(stored[n.ID], n.Storage), addresses(n.Endpoints), n.ID.String()})
	}
	table(w, rows...)
	return nil
}

func upDown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

func cores(milli uint32) string { return fmt.Sprintf("%.1f", float64(milli)/1000) }

// memory is what a machine says it has, which may be anything.
func memory(n uint64) string { return mib(int64(min(n, 1<<62))) }

// storage is what a machine keeps of what it offers to stores.
func storage(kept, offered uint64) string {
	if offered == 0 {
		return "–"
	}
	return memory(kept) + " of " + memory(offered)
}

// addresses are a machine's words too. (The ledger takes no zone, which is any text; grids that began before may have some.)
func addresses(eps []string) string { return printable([]byte(strings.Join(eps, " "))) }

// wish is a machine that asks to become a node.
type wish struct {
	ID        identity.NodeID `json:"id"`
	Name      string          `json:"name"`
	Farm      identity.FarmID `json:"farm"`
	FarmName  string          `json:"farmName"`
	CPUMilli  uint32          `json:"cpuMilli"`
	Memory    uint64          `json:"memory"`
	Storage   uint64          `json:"storage"` // bytes that it offers to stores
	Endpoints []string        `json:"endpoints"`

	admit *ledger.NodeAdmit
	farm  *ledger.Farm
}

// wishes are the machines that ask to become nodes of farms that there are, and are not nodes yet.
func wishes(ctx context.Context, c *api.Client) ([]wish, error) {
	asking, err := c.Pending(ctx)
	if err != nil {
		return nil, err
	}
	var nodeKeys, farmKeys []string
	for _, p := range asking {
		nodeKeys, farmKeys = append(nodeKeys, ledger.NodeKey(p.Key.Node())), append(farmKeys, ledger.FarmKey(p.Farm))
	}
	nodes, err := api.GetAll[ledger.Node](ctx, c, nodeKeys)
	if err != nil {
		return nil, err
	}
	farms, err := api.GetAll[ledger.Farm](ctx, c, farmKeys)
	if err != nil {
		return nil, err
	}
	out := []wish{}
	for i, p := range asking {
		if nodes[i] == nil && farms[i] != nil {
			out = append(out, wish{p.Key.Node(), p.Name, p.Farm, farms[i].Name, p.CPUMilli, p.Memory, p.Storage, p.Endpoints, p, farms[i]})
		}
	}
	return out, nil
}

func (a *app) listPending(ctx context.Context, w io.Writer, c *api.Client) error {
	all, err := wishes(ctx, c)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(w, all)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "no machine asks to become a node")
		return nil
	}
	rows := [][]string{{"NAME", "FARM", "CORES", "MEMORY", "STORAGE", "ENDPOINT", "ID"}}
	for _, x := range all {
		rows = append(rows, []string{x.Name, x.FarmName, cores(x.CPUMilli), memory(x.Memory), memory(x.Storage), addresses(x.Endpoints), x.ID.String()})
	}
	table(w, rows...)
	return nil
}

func (a *app) nodeApproveCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "approve NODE", Short: "Admit a machine that asks to become a node", Args: asUsed,
		Long: `Signs the admission of a machine to the farm that it asks for, with the key of the farm's owner: grid.key in --dir for
farms of the grid's account, user.key for your own.

NODE is the machine's ID as holdfast node list --pending shows it, or its beginning, as the machine's console shows it
in short. It is never a name: anybody can ask under any name. Compare the ID with the one on the console of the machine
that you mean. With --yes nobody compares: give the whole ID then, since a patient stranger can make a key whose ID
begins like another's.`,
		Example: "  holdfast node approve node1qx3c4m2k\n  holdfast node approve node1… --yes",
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, cfg, err := a.connect()
		if err != nil {
			return err
		}
		defer c.Close()
		return a.approve(cmd, c, cfg, args[0], yes)
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) approve(cmd *cobra.Command, c *api.Client, cfg *grid.Client, id string, yes bool) error {
	if p, short := "node1", len((identity.NodeID{}).Short()); !strings.HasPrefix(id, p) || len(id) < short {
		return wrong(cmd, fmt.Errorf("%q is not a machine's ID, nor its first %d characters: it begins with %s", id, short, p))
	}
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return err
	}
	asking, err := wishes(ctx, c)
	if err != nil {
		return err
	}
	n, x, err := find(id, nodes, asking)
	switch {
	case err != nil:
		return err
	case n != nil:
		return a.approved(w, wish{ID: n.ID, Name: n.Name, Farm: n.Farm, FarmName: n.FarmName, CPUMilli: n.CPUMilli, Memory: n.Memory, Storage: n.Storage, Endpoints: n.Endpoints}, true)
	case x == nil:
		return fmt.Errorf("no machine asks whose ID begins with %s: %s shows who does; one that is switched off is forgotten after five minutes", id, a.self("node list --pending"))
	}
	if i := slices.IndexFunc(nodes, func(n *ledger.Node) bool { return n.Name == x.Name }); i >= 0 {
		return fmt.Errorf("a node %s exists, %v: give this machine another name where it starts (holdfast.name= on its kernel's command line, or --name of holdfast run node); it has signed this one", x.Name, nodes[i].ID)
	}
	key, err := a.ownerKey(ctx, c, cfg, x.farm)
	if err != nil {
		return err
	}
	if !yes {
		if !a.json {
			table(cmd.ErrOrStderr(), []string{"node", x.ID.String()}, []string{"name", x.Name}, []string{"farm", x.FarmName},
				[]string{"cores", cores(x.CPUMilli)}, []string{"memory", memory(x.Memory)}, []string{"storage", memory(x.Storage)}, []string{"endpoints", addresses(x.Endpoints)})
		}
		if err := confirm(cmd, fmt.Sprintf("does the machine's own console show %v, and shall it become a node of %s?", x.ID, x.FarmName)); err != nil {
			return err
		}
	}
	if _, err := c.Act(ctx, ledger.KindNodeAdmit, ledger.Actor{ID: x.farm.Owner}, x.admit, key); err != nil {
		return err
	}
	return a.approved(w, *x, false)
}

// find is the one node, or the one machine that asks, whose ID begins so.
func find(id string, nodes []*ledger.Node, asking []wish) (node *ledger.Node, w *wish, err error) {
	var all strings.Builder
	for _, n := range nodes {
		if strings.HasPrefix(n.ID.String(), id) {
			node = n
			fmt.Fprintf(&all, "\n  %v is the node %s", n.ID, n.Name)
		}
	}
	for i := range asking {
		if x := &asking[i]; strings.HasPrefix(x.ID.String(), id) {
			w = x
			fmt.Fprintf(&all, "\n  %v asks as %s", x.ID, x.Name)
		}
	}
	if strings.Count(all.String(), "\n") > 1 {
		return nil, nil, fmt.Errorf("more than one ID begins with %s, give more of it:%s", id, all.String())
	}
	return node, w, nil
}

func (a *app) approved(w io.Writer, x wish, before bool) error {
	if a.json {
		return printJSON(w, struct {
			wish
			Already bool `json:"already"`
		}{x, before})
	}
	if before {
		fmt.Fprintf(w, "%s is a node of %s already\n", x.Name, x.FarmName)
		return nil
	}
	fmt.Fprintf(w, "%s is a node of %s now\n", x.Name, x.FarmName)
	return nil
}

// ownerKey is the key that speaks for a farm, if it is here.
func (a *app) ownerKey(ctx context.Context, c *api.Client, cfg *grid.Client, f *ledger.Farm) (*identity.PrivateKey, error) {
	var file string
	switch f.Owner {
	case c.Genesis().GridAccount():
		file = "grid.key"
	case cfg.Account:
		file = "user.key"
	default:
		return nil, fmt.Errorf("%s belongs to %v, which is neither your account nor the grid's: its owner approves its machines", f.Name, f.Owner)
	}
	k, err := readKey(ctx, filepath.Join(a.dir, file))
	if err != nil {
		return nil, fmt.Errorf("the key of the owner of %s: %w", f.Name, err)
	}
	return k.DeviceKey(), nil
}
