package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"holdfast/api"
	"holdfast/deploy"
	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) accountCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "account", Short: "Make accounts, and say who has a say in what they do"})
	cmd.AddCommand(a.accountShowCmd(), a.accountCreateCmd(), a.accountPolicyCmd())
	return cmd
}

func (a *app) accountShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Show your account: its devices and its policy", Args: asUsed, Example: "  holdfast account show\n  holdfast account show --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, cfg, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			acct, err := api.Get[identity.Account](cmd.Context(), c, ledger.AccountKey(cfg.Account))
			if err != nil {
				return fmt.Errorf("%v: %w", cfg.Account, err)
			}
			w := cmd.OutOrStdout()
			if a.json {
				return printJSON(w, acct)
			}
			table(w, []string{"account", acct.ID.String()})
			rows := [][]string{{"DEVICE", "ID"}}
			for i := range acct.Devices {
				rows = append(rows, []string{acct.Devices[i].Name, acct.Devices[i].Key.Device().String()})
			}
			fmt.Fprintln(w)
			table(w, rows...)
			rows = [][]string{{"ACT", "DEVICES THAT SIGN"}}
			for _, r := range acct.Policy.Rules {
				of := len(r.Devices)
				if of == 0 {
					of = len(acct.Devices)
				}
				rows = append(rows, []string{string(r.Act), fmt.Sprintf("%d of %d", r.Threshold, of)})
			}
			fmt.Fprintln(w)
			table(w, rows...)
			if len(acct.Policy.Approvals) > 0 {
				rows = [][]string{{"APPROVAL", "NEEDS"}}
				for i := range acct.Policy.Approvals {
					rows = append(rows, []string{acct.Policy.Approvals[i].Name, acct.Policy.Approvals[i].String()})
				}
				fmt.Fprintln(w)
				table(w, rows...)
			}
			if words := acct.Policy.Bounds.Words(); len(words) > 0 {
				fmt.Fprintln(w, "\nwhat contracts may look like:")
				for _, s := range words {
					fmt.Fprintln(w, " ", s)
				}
			}
			return nil
		},
	}
}

// showBounds says how bounds would change.
func showBounds(w io.Writer, was, is *identity.Bounds) {
	old, now := was.Words(), is.Words()
	for _, s := range old {
		if !slices.Contains(now, s) {
			fmt.Fprintln(w, "- bound:", s)
		}
	}
	for _, s := range now {
		if !slices.Contains(old, s) {
			fmt.Fprintln(w, "+ bound:", s)
		}
	}
}

func (a *app) accountCreateCmd() *cobra.Command {
	var from, gateway string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a key and an account of your own on a grid that there is", Args: asUsed,
		Long:    "Makes a key in --dir and an account of it. It needs the grid's genesis, which whoever runs the grid gives away (it is no\nsecret, but you trust whom it is from), and the address of a gateway.",
		Example: "  holdfast account create --dir ~/work --genesis grid/genesis --gateway 127.0.0.1:8443",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.noGrid() == nil {
				if _, _, err := grid.Connect(a.dir); err == nil {
					return fmt.Errorf("%s has an account already: name another directory with --dir", a.dir)
				}
			}
			raw, err := os.ReadFile(from)
			if err != nil {
				return fmt.Errorf("genesis: %w", err)
			}
			id, err := grid.Join(cmd.Context(), a.dir, raw, gateway)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), struct {
					Account identity.AccountID `json:"account"`
				}{id})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "account %s\nits key is %s: keep a copy, nobody can make it again\n", id, filepath.Join(a.dir, "user.key"))
			return nil
		},
	}
	cmd.Flags().StringVar(&from, "genesis", "", "`file` of the grid's genesis")
	cmd.Flags().StringVar(&gateway, "gateway", "127.0.0.1:8443", "`address` of a gateway")
	cmd.MarkFlagRequired("genesis")
	return cmd
}

func (a *app) accountPolicyCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "policy FILE", Short: "Propose another policy for your account", Args: asUsed,
		Long:    "FILE is JSON, as holdfast account show --json prints it under policy. What the old policy asks for decides, in all its rules\nand approvals; and it takes effect after a while (a day, or what the grid says), in which it can be taken back.\n\nUnder bounds it says what contracts may look like: farms, spread (over farms), noEgress, routes (domains), which the ledger\nholds every revision to; registries, signers (accounts that must have signed each image), which clients and nodes do.\n  {\"rules\": [{\"act\": \"default\", \"threshold\": 1}], \"bounds\": {\"farms\": [\"north\"], \"noEgress\": true,\n   \"registries\": [\"docker.io/library\"], \"signers\": [\"acct1…\"]}}",
		Example: "  holdfast account show --json | jq .policy > policy.json\n  holdfast account policy policy.json\n  holdfast contract withdraw prop1…                # takes it back",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		b, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		if len(b) > 1<<20 {
			return fmt.Errorf("%s has %d bytes: that is no policy", args[0], len(b))
		}
		var p identity.Policy
		if err := strictJSON(b, &p); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		acct, err := api.Get[identity.Account](ctx, u.Client, ledger.AccountKey(u.Account))
		if err != nil {
			return err
		}
		p.Bounds.Sort()
		was := acct.Policy.Bounds
		acct.Policy = p
		if err := acct.Validate(); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		out := w
		if a.json { // standard output is for the end
			out = cmd.ErrOrStderr()
		}
		showBounds(out, &was, &p.Bounds)
		if !yes {
			if err := confirm(cmd, fmt.Sprintf("propose %d rules and %d approvals?", len(p.Rules), len(p.Approvals))); err != nil {
				return err
			}
		}
		proposal, err := u.SetPolicy(ctx, p)
		if err != nil {
			return err
		}
		if proposal == nil { // its time was over before it was read
			fmt.Fprintln(w, "the policy is in effect")
			return nil
		}
		return a.proposed(w, proposal)
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// strictJSON refuses what it does not know: a rule that is misspelt is no rule.
func strictJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more behind it")
	}
	return nil
}

// accountIn is the account that the only argument names, or the user's own.
func accountIn(u *deploy.User, args []string) (identity.AccountID, error) {
	id := u.Account
	if len(args) == 0 {
		return id, nil
	}
	err := id.UnmarshalText([]byte(args[0]))
	return id, err
}
