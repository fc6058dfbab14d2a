package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/internal/grid"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

// source is what plan and deploy read.
type source struct {
	outside bool
	set     []string
}

func (s *source) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&s.outside, "outside-files", false, "allow secrets, configs and env files outside the Compose file's directory")
	f.StringArrayVar(&s.set, "set", nil, "`NAME=VALUE` of a parameter; may be repeated")
}

// load reads a Compose file, or a template if u is not nil. dir is where its images are looked for.
func (s *source) load(cmd *cobra.Command, u *deploy.User, arg string) (*contract.Document, error) {
	ctx := cmd.Context()
	set, err := parseSet(cmd, s.set)
	if err != nil {
		return nil, err
	}
	if isTemplate(arg) {
		if u == nil {
			return nil, wrong(cmd, fmt.Errorf("%s is a template, which only the grid has", arg))
		}
		return u.Expand(ctx, arg, set)
	}

	env := map[string]string{}
	for _, e := range os.Environ() {
		k, v, _ := strings.Cut(e, "=")
		env[k] = v
	}
	return contract.Load(ctx, contract.Input{Path: arg, Env: env, OutsideFiles: s.outside, Set: set})
}

// userWith reads a file before anybody is asked for a passphrase, and a template with the user's client.
func (a *app) userWith(cmd *cobra.Command, src *source, arg string) (*deploy.User, *contract.Document, *grid.Client, error) {
	var doc *contract.Document
	var err error
	if !isTemplate(arg) {
		if doc, err = src.load(cmd, nil, arg); err != nil {
			return nil, nil, nil, err
		}
	}
	u, cfg, err := a.user(cmd.Context())
	if err != nil {
		return nil, nil, nil, err
	}
	if doc == nil {
		if doc, err = src.load(cmd, u, arg); err != nil {
			u.Client.Close()
			return nil, nil, nil, err
		}
	}
	return u, doc, cfg, nil
}

func (a *app) planCmd() *cobra.Command {
	var offline bool
	var src source
	cmd := &cobra.Command{
		Use: "plan FILE|TEMPLATE", Short: "Show what deploying a Compose file would change", Args: asUsed,
		Long:    "Reads a Compose file, finds its images, and compares it with what runs. It changes nothing. What the file asks for and\ncannot have is refused, with the line and what to write instead.",
		Example: "  holdfast plan compose.yaml\n  holdfast plan compose.yaml --json\n  holdfast plan compose.yaml --offline             # check the file alone, without a grid and its images",
		RunE: func(cmd *cobra.Command, args []string) error {
			if offline {
				doc, err := src.load(cmd, nil, args[0])
				if err != nil {
					return err
				}
				for i := range doc.Body.Services {
					doc.Body.Services[i].Image.Manifest = "unknown"
				}
				return a.showPlan(cmd.OutOrStdout(), &deploy.Proposal{Document: doc, Plan: contract.Diff(nil, nil, &doc.Header, &doc.Body)})
			}
			u, doc, _, err := a.userWith(cmd, &src, args[0])
			if err != nil {
				return err
			}
			defer u.Client.Close()
			p, err := u.Propose(cmd.Context(), doc, args[0])
			if err != nil {
				return err
			}
			return a.showPlan(cmd.OutOrStdout(), p)
		},
	}
	src.flags(cmd)
	cmd.Flags().BoolVar(&offline, "offline", false, "ask no grid and look for no image: everything is new")
	return cmd
}

// showPlan shows what a proposal changes. It fails when the account's policy does not allow that.
func (a *app) showPlan(w io.Writer, p *deploy.Proposal) error {
	var out error
	if len(p.Breaches) > 0 {
		out = deploy.OutsideError(p.Breaches)
	}
	if a.json {
		notes := p.Document.Notes
		if notes == nil {
			notes = []string{}
		}
		return errors.Join(printJSON(w, struct {
			Name     string            `json:"name"`
			Plan     contract.Plan     `json:"plan"`
			Notes    []string          `json:"notes"`
			Breaches []contract.Breach `json:"breaches,omitempty"`
		}{p.Document.Name, p.Plan, notes, p.Breaches}), out)
	}
	fmt.Fprint(w, p.Plan.Text())
	for _, n := range p.Document.Notes {
		fmt.Fprintln(w, "note:", n)
	}
	return out
}

func (a *app) deployCmd() *cobra.Command {
	var yes, wait, dry bool
	var src source
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "deploy FILE|TEMPLATE", Short: "Deploy a Compose file or a template as a signed contract", Args: asUsed,
		Long:    "Shows what would change, asks on a terminal, then seals the body and the images, signs the revision and submits it.\nA file that changes nothing is left alone. With --wait it follows until every workload runs and every route answers.",
		Example: "  holdfast deploy compose.yaml --wait\n  holdfast deploy compose.yaml --yes --wait --json\n  holdfast deploy acct1…/blog@1.0 --set host=blog.localhost",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, out := cmd.Context(), cmd.OutOrStdout()
			u, doc, cfg, err := a.userWith(cmd, &src, args[0])
			if err != nil {
				return err
			}
			defer u.Client.Close()
			p, err := u.Propose(ctx, doc, args[0])
			if err != nil {
				return err
			}
			if dry {
				return a.showPlan(out, p)
			}
			pr := newProgress(cmd.ErrOrStderr())
			defer pr.done()
			var id contract.ID
			if p.Plan.Empty() {
				id = p.Current.Record.ID
				if !a.json {
					fmt.Fprintf(out, "%s: nothing changes\n", doc.Name)
				}
			} else if id, err = a.submit(cmd, u, p, yes, pr); err != nil {
				return a.unlessProposed(out, err)
			}
			if wait {
				wctx, cancel := context.WithTimeout(ctx, timeout)
				defer cancel()
				if err := a.wait(wctx, u, cfg, id, !p.Plan.Empty(), pr); err != nil {
					return err
				}
			}
			return a.showDeployed(ctx, out, u, cfg, id)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVar(&dry, "dry-run", false, "show what it would change, and change nothing: as plan")
	f.BoolVar(&wait, "wait", false, "follow until it runs and its routes answer")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long --wait waits")
	src.flags(cmd)
	return cmd
}

// submit shows a proposal, asks, and puts it on the ledger.
func (a *app) submit(cmd *cobra.Command, u *deploy.User, p *deploy.Proposal, yes bool, pr *progress) (contract.ID, error) {
	out := cmd.OutOrStdout()
	if !a.json {
		if err := a.showPlan(out, p); err != nil {
			return contract.ID{}, err
		}
	}
	if len(p.Breaches) > 0 {
		return contract.ID{}, deploy.OutsideError(p.Breaches)
	}
	if !yes {
		if a.json { // standard output is for the end
			fmt.Fprint(cmd.ErrOrStderr(), p.Plan.Text())
		}
		if err := confirm(cmd, "sign and submit this?"); err != nil {
			return contract.ID{}, err
		}
	}
	done, err := u.Submit(cmd.Context(), p, time.Now(), func(step string, n, total int64) {
		if total > 0 {
			pr.say("%s: %s of %s", step, mib(n), mib(total))
		} else {
			pr.say("%s", step)
		}
	})
	if err != nil {
		return contract.ID{}, err
	}
	pr.done()
	if done.Proposed != nil {
		return contract.ID{}, proposedError{done.Proposed}
	}
	if !a.json {
		fmt.Fprintf(out, "%s: revision %d of contract %s is on the ledger\n", p.Document.Name, done.Header.Revision, done.Contract.Short())
	}
	return done.Contract, nil
}

// proposedError ends a deployment that waits for others' consent.
type proposedError struct{ p *ledger.Proposal }

// unlessProposed shows what was proposed; that is no failure.
func (a *app) unlessProposed(w io.Writer, err error) error {
	if only := new(proposedError); errors.As(err, only) {
		return a.proposed(w, only.p)
	}
	return err
}

func (e proposedError) Error() string { return "it is proposed as " + e.p.ID.String() }

// rolledBackError ends a deployment that the grid took back.
type rolledBackError struct {
	name string
	s    *contractStatus
}

func (e rolledBackError) Error() string {
	return fmt.Sprintf("%s: %s; `holdfast logs %s` may say more", e.name, e.s.text(), e.name)
}

// wait follows a contract until all of it runs and answers, or was rolled back.
func (a *app) wait(ctx context.Context, u *deploy.User, cfg *grid.Client, id contract.ID, changed bool, pr *progress) error {
	prober := newProber(u.CA, cfg.Gateway)
	var waiting []string
	for {
		s, err := a.collect(ctx, u.Client, prober, id)
		if err == nil {
			for i := range s.Contracts {
				if x := &s.Contracts[i]; changed && x.Undone != nil {
					pr.done()
					return rolledBackError{x.Name, x}
				}
			}
			if waiting = unsettled(s); len(waiting) == 0 {
				pr.done()
				return nil
			}
			pr.say("waiting: %s", strings.Join(waiting, "; "))
		}
		select {
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return ctx.Err()
			}
			if len(waiting) == 0 && err != nil {
				waiting = []string{err.Error()}
			}
			return fmt.Errorf("it does not run yet (the grid goes on trying): %s", strings.Join(waiting, "; "))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// unsettled lists what is not yet as it should be.
func unsettled(s *status) []string {
	var out []string
	for i := range s.Contracts {
		if x := &s.Contracts[i]; x.Trial != nil {
			out = append(out, x.text())
		}
	}
	for _, w := range s.Workloads {
		if w.Settled {
			continue
		}
		text := w.Name + " " + w.State
		if w.Reason != "" {
			text += ": " + w.Reason
		}
		out = append(out, text)
	}
	for _, r := range s.Routes {
		if r.State != serving {
			out = append(out, r.Host+" "+r.State)
		}
	}
	return out
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
	if len(s.Routes) > 0 {
		fmt.Fprintf(w, "try: curl --cacert <(%s) %s\n", a.self("ca"), s.Routes[0].URL)
	}
	return nil
}
