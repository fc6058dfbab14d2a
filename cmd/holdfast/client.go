package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/ca"
	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/ledger"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// connect reads the ledger as anybody can.
func (a *app) connect() (*api.Client, *grid.Client, error) { return grid.Connect(a.dir) }

// domains are what a local CA may speak for.
func domains() []string { return []string{"localhost"} }

// user acts as the user: with the key file in --dir, whose passphrase is asked for or in HOLDFAST_PASSPHRASE.
func (a *app) user() (*deploy.User, *grid.Client, error) {
	c, cfg, err := a.connect()
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(a.dir, "user.key")
	keys, err := identity.ReadKeyFile(path, os.Getenv("HOLDFAST_PASSPHRASE"))
	if errors.Is(err, identity.ErrPassphrase) && term.IsTerminal(int(os.Stdin.Fd())) {
		fmt.Fprintf(os.Stderr, "passphrase of %s: ", path)
		pass, rerr := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(os.Stderr)
		if rerr != nil {
			return nil, nil, rerr
		}
		keys, err = identity.ReadKeyFile(path, string(pass))
	}
	if err != nil {
		return nil, nil, err
	}
	authority, err := ca.Open(filepath.Join(a.dir, "ca"), domains(), time.Now())
	if err != nil {
		return nil, nil, err
	}
	return &deploy.User{Client: c, Account: cfg.Account, Keys: keys, CA: authority}, cfg, nil
}

func (a *app) caCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ca", Short: "Print the root certificate of your local CA", Args: cobra.NoArgs,
		Long:    "Prints the certificate that browsers and curl must trust to reach your routes. Its key stays in --dir, and it can speak\nfor names under localhost only.",
		Example: "  holdfast ca > ca.pem\n  curl --cacert ca.pem https://pocketbase.localhost:8443/",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := ca.Open(filepath.Join(a.dir, "ca"), domains(), time.Now())
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(c.Root())
			return err
		},
	}
}

// load reads the Compose file of plan and deploy.
func load(ctx context.Context, path string, outside bool) (*contract.Document, error) {
	env := map[string]string{}
	for _, e := range os.Environ() {
		k, v, _ := strings.Cut(e, "=")
		env[k] = v
	}
	return contract.Load(ctx, contract.Input{Path: path, Env: env, OutsideFiles: outside})
}

func (a *app) planCmd() *cobra.Command {
	var outside bool
	cmd := &cobra.Command{
		Use: "plan FILE", Short: "Show what deploying a Compose file would change", Args: cobra.ExactArgs(1),
		Example: "  holdfast plan compose.yaml\n  holdfast plan compose.yaml --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, _, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			p, err := a.propose(cmd.Context(), u, args[0], outside)
			if err != nil {
				return err
			}
			return a.showPlan(cmd.OutOrStdout(), p)
		},
	}
	cmd.Flags().BoolVar(&outside, "outside-files", false, "allow secrets, configs and env files outside the Compose file's directory")
	return cmd
}

func (a *app) propose(ctx context.Context, u *deploy.User, path string, outside bool) (*deploy.Proposal, error) {
	doc, err := load(ctx, path, outside)
	if err != nil {
		return nil, err
	}
	return u.Propose(ctx, doc, path)
}

func (a *app) showPlan(w io.Writer, p *deploy.Proposal) error {
	if a.json {
		return printJSON(w, struct {
			Name  string        `json:"name"`
			Plan  contract.Plan `json:"plan"`
			Notes []string      `json:"notes"`
		}{p.Document.Name, p.Plan, p.Document.Notes})
	}
	fmt.Fprint(w, p.Plan.Text())
	for _, n := range p.Document.Notes {
		fmt.Fprintln(w, "note:", n)
	}
	return nil
}

func (a *app) deployCmd() *cobra.Command {
	var yes, wait, outside bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "deploy FILE", Short: "Deploy a Compose file as a signed contract", Args: cobra.ExactArgs(1),
		Long:    "Shows what would change, asks on a terminal, then seals the body and the images, signs the revision and submits it.\nA file that changes nothing is left alone. With --wait it follows until every workload runs and every route answers.",
		Example: "  holdfast deploy compose.yaml --wait\n  holdfast deploy compose.yaml --yes --wait --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, cfg, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			ctx, out := cmd.Context(), cmd.OutOrStdout()
			p, err := a.propose(ctx, u, args[0], outside)
			if err != nil {
				return err
			}
			pr := newProgress(cmd.ErrOrStderr())
			defer pr.done()
			var id contract.ID
			if p.Plan.Empty() {
				id = p.Current.Record.ID
				if !a.json {
					fmt.Fprintf(out, "%s: nothing changes\n", p.Document.Name)
				}
			} else {
				if !a.json {
					if err := a.showPlan(out, p); err != nil {
						return err
					}
				}
				if !yes {
					if err := confirm(cmd, "sign and submit this?"); err != nil {
						return err
					}
				}
				done, err := u.Submit(ctx, p, time.Now(), func(step string, n, total int64) {
					if total > 0 {
						pr.say("%s: %s of %s", step, mib(n), mib(total))
					} else {
						pr.say("%s", step)
					}
				})
				if err != nil {
					return err
				}
				pr.done()
				id = done.Contract
				if !a.json {
					fmt.Fprintf(out, "%s: revision %d of contract %s is on the ledger\n", p.Document.Name, done.Header.Revision, id.Short())
				}
			}
			if wait {
				wctx, cancel := context.WithTimeout(ctx, timeout)
				defer cancel()
				if err := a.wait(wctx, u, cfg, id, pr); err != nil {
					return err
				}
			}
			return a.showDeployed(ctx, out, u, cfg, id)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVar(&wait, "wait", false, "follow until it runs and its routes answer")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long --wait waits")
	f.BoolVar(&outside, "outside-files", false, "allow secrets, configs and env files outside the Compose file's directory")
	return cmd
}

func confirm(cmd *cobra.Command, question string) error {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return errors.New("there is no terminal to ask on: add --yes to go ahead")
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s [y/N] ", question)
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil || !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(line))) {
		return errors.New("nothing was done")
	}
	return nil
}

// wait follows a contract until all of it runs and answers.
func (a *app) wait(ctx context.Context, u *deploy.User, cfg *grid.Client, id contract.ID, pr *progress) error {
	prober := newProber(u.CA, cfg.Gateway)
	for {
		s, err := a.collect(ctx, u.Client, prober, id)
		var waiting []string
		if err == nil {
			for _, w := range s.Workloads {
				if !w.Settled {
					text := w.Name + " " + w.State
					if w.Reason != "" {
						text += ": " + w.Reason
					}
					waiting = append(waiting, text)
				}
			}
			for _, r := range s.Routes {
				if r.State != "serving" {
					waiting = append(waiting, r.Host+" "+r.State)
				}
			}
			if len(waiting) == 0 {
				pr.done()
				return nil
			}
			pr.say("waiting: %s", strings.Join(waiting, "; "))
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("it does not run yet (the grid goes on trying): %s", strings.Join(append(waiting, errText(err)...), "; "))
			}
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func errText(err error) []string {
	if err == nil {
		return nil
	}
	return []string{err.Error()}
}

func (a *app) showDeployed(ctx context.Context, w io.Writer, u *deploy.User, cfg *grid.Client, id contract.ID) error {
	s, err := a.collect(ctx, u.Client, newProber(u.CA, cfg.Gateway), id)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(w, s)
	}
	showWorkloads(w, s)
	showRoutes(w, s)
	for _, r := range s.Routes {
		fmt.Fprintf(w, "try: curl --cacert <(holdfast ca) %s\n", r.URL)
		break
	}
	return nil
}

func (a *app) logsCmd() *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use: "logs CONTRACT [SERVICE]", Short: "Show what workloads wrote", Args: cobra.RangeArgs(1, 2),
		Long:    "Fetches output from the nodes, end-to-end encrypted: a gateway passes it on and cannot read it. Nothing of it is on the\nledger.",
		Example: "  holdfast logs pocketbase\n  holdfast logs reader db --tail 20\n  holdfast logs reader web -f",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, cfg, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			return a.logs(cmd.Context(), cmd.OutOrStdout(), u, cfg, args, follow, lines)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as lines come")
	cmd.Flags().IntVar(&lines, "tail", 200, "how many lines of what was written before")
	return cmd
}

func (a *app) contractCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "contract", Short: "Look at contracts and end them"}
	list := &cobra.Command{
		Use: "list", Short: "List the account's contracts", Args: cobra.NoArgs, Example: "  holdfast contract list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			u, _, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			all, err := u.Contracts(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), all)
			}
			rows := [][]string{{"NAME", "REVISION", "STATE", "ID"}}
			for _, c := range all {
				rows = append(rows, []string{c.Name, fmt.Sprint(len(c.Revisions)), c.State, c.ID.String()})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
	var body bool
	show := &cobra.Command{
		Use: "show NAME", Short: "Show a contract's header, and with --body what is sealed", Args: cobra.ExactArgs(1),
		Example: "  holdfast contract show reader\n  holdfast contract show reader --body             # opened with your key; values of secrets are not shown",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, _, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			c, err := u.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			h, err := u.Header(cmd.Context(), c.Current)
			if err != nil {
				return err
			}
			if !body {
				return printJSON(cmd.OutOrStdout(), struct {
					Contract *ledger.Contract `json:"contract"`
					Header   *contract.Header `json:"header"`
				}{c, h})
			}
			cur, err := u.Open(cmd.Context(), c, c.Current)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(cur.Body.Source)
			return err
		},
	}
	show.Flags().BoolVar(&body, "body", false, "print the Compose file that was deployed")
	history := &cobra.Command{
		Use: "history NAME", Short: "List a contract's revisions", Args: cobra.ExactArgs(1), Example: "  holdfast contract history reader",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, _, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			c, err := u.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			type row struct {
				Revision int                 `json:"revision"`
				ID       contract.RevisionID `json:"id"`
				Time     time.Time           `json:"time"`
				Current  bool                `json:"current"`
			}
			var all []row
			for i, r := range c.Revisions {
				all = append(all, row{i + 1, r, time.Unix(c.Times[i], 0).UTC(), r == c.Current})
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), all)
			}
			rows := [][]string{{"REVISION", "TIME", "ID"}}
			for _, r := range all {
				rows = append(rows, []string{fmt.Sprint(r.Revision), r.Time.Format(time.RFC3339), r.ID.String()})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
	var yes bool
	cancel := &cobra.Command{
		Use: "cancel NAME", Short: "End a contract: its workloads stop, its data stays on its nodes", Args: cobra.ExactArgs(1), Example: "  holdfast contract cancel reader",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, _, err := a.user()
			if err != nil {
				return err
			}
			defer u.Client.Close()
			c, err := u.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if c.State != ledger.Active {
				fmt.Fprintf(cmd.OutOrStdout(), "%s is %s already\n", c.Name, c.State)
				return nil
			}
			if !yes {
				if err := confirm(cmd, "end contract "+c.Name+"?"); err != nil {
					return err
				}
			}
			if err := u.Cancel(cmd.Context(), c.ID); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is cancelled\n", c.Name)
			return nil
		},
	}
	cancel.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.AddCommand(list, show, history, cancel)
	return cmd
}

func (a *app) nodeCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Look at nodes"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the grid's nodes", Args: cobra.NoArgs, Example: "  holdfast node list",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			nodes, err := c.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), nodes)
			}
			rows := [][]string{{"NAME", "FARM", "STATE", "CORES", "MEMORY", "ENDPOINT", "ID"}}
			for _, n := range nodes {
				rows = append(rows, []string{n.Name, n.FarmName, upDown(n.Up), fmt.Sprintf("%.1f", float64(n.CPUMilli)/1000), mib(int64(n.Memory)), strings.Join(n.Endpoints, " "), n.ID.String()})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	})
	return cmd
}

func upDown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

func (a *app) ledgerCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "ledger", Short: "Look at the ledger"}
	cmd.AddCommand(&cobra.Command{
		Use: "show", Short: "Show the grid's ledger as this machine has verified it", Args: cobra.NoArgs, Example: "  holdfast ledger show --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			v, err := c.Read(cmd.Context(), ledger.GridKey, ledger.NodesKey, ledger.ContractsKey)
			if err != nil {
				return err
			}
			g := c.Genesis()
			out := struct {
				Grid       identity.GridID    `json:"grid"`
				Name       string             `json:"name"`
				Height     int64              `json:"height"`
				Time       time.Time          `json:"time"`
				Validators []ledger.Validator `json:"validators"`
				Contracts  int                `json:"contracts"`
				Nodes      int                `json:"nodes"`
				Warning    string             `json:"warning,omitempty"`
			}{c.Grid(), g.Name, v.Height, v.Time, g.Validators, count[contract.ID](v.Value(ledger.ContractsKey)), count[identity.NodeID](v.Value(ledger.NodesKey)), ""}
			if len(g.Validators) == 1 {
				out.Warning = "one validator: its operator could rewrite history"
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			rows := [][]string{{"grid", out.Grid.String()}, {"name", out.Name}, {"height", fmt.Sprint(out.Height)}, {"time", out.Time.UTC().Format(time.RFC3339)}, {"nodes", fmt.Sprint(out.Nodes)}, {"contracts", fmt.Sprint(out.Contracts)}}
			for _, x := range out.Validators {
				rows = append(rows, []string{"validator", fmt.Sprintf("%s, power %d, %s", x.Name, x.Power, x.Address)})
			}
			if out.Warning != "" {
				rows = append(rows, []string{"warning", out.Warning})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	})
	return cmd
}

func count[T any](raw []byte, ok bool) int {
	if !ok {
		return 0
	}
	l, err := ledger.Decode[[]T](raw)
	if err != nil {
		return 0
	}
	return len(*l)
}
