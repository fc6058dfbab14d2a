package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

// imageSignature is one for people and programs.
type imageSignature struct {
	Account string `json:"account"`
	Digest  string `json:"digest"`
	Time    string `json:"time"`
}

func signatureOf(s *ledger.ImageSignature) imageSignature {
	return imageSignature{s.Account.String(), fmt.Sprintf("sha256:%x", s.Digest), stamp(time.Unix(s.Time, 0))}
}

// manifestOf is the digest that an argument is, or that of the linux/amd64 manifest of the image that it names.
func manifestOf(ctx context.Context, arg string) ([32]byte, error) {
	if !strings.HasPrefix(arg, "sha256:") {
		src, err := deploy.Resolve(ctx, arg, ".")
		if err != nil {
			return [32]byte{}, err
		}
		arg = src.Manifest
	}
	return contract.ParseDigest(arg)
}

func (a *app) imageSignCmd() *cobra.Command {
	return a.signingCmd(&cobra.Command{
		Use: "sign REFERENCE|DIGEST", Short: "Vouch for an image of a container, for accounts whose policy asks for that", Args: asUsed,
		Long:    "Puts your account's signature on the image's manifest for linux/amd64, whose digest names all that is in it, on the ledger.\nIt is good for this grid, until image revoke takes it back. Accounts whose policy names yours under bounds.signers run no\nimage without it. What your own policy asks for sign-image decides who of you can.",
		Example: "  holdfast image sign registry.example.com/app:1.4\n  holdfast image sign oci:./app\n  holdfast image sign sha256:… --yes",
	}, false)
}

func (a *app) imageRevokeCmd() *cobra.Command {
	return a.signingCmd(&cobra.Command{
		Use: "revoke REFERENCE|DIGEST", Short: "Take your signature on an image back", Args: asUsed,
		Long:    "What runs goes on; no node starts it again for an account whose policy asks for your signature.",
		Example: "  holdfast image revoke sha256:…\n  holdfast image revoke registry.example.com/app:1.4 --yes",
	}, true)
}

func (a *app) signingCmd(cmd *cobra.Command, revoke bool) *cobra.Command {
	var yes, dry bool
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		digest, err := manifestOf(ctx, args[0])
		if err != nil {
			return err
		}
		all, err := u.ImageSignatures(ctx, u.Account)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("sha256:%x", digest)
		have := slices.ContainsFunc(all, func(s *ledger.ImageSignature) bool { return s.Digest == digest })
		if !dry && have == revoke {
			if !yes {
				question := "sign image " + name + "?"
				if revoke {
					question = "take the signature of image " + name + " back?"
				}
				if err := confirm(cmd, question); err != nil {
					return err
				}
			}
			p, err := u.SignImage(ctx, digest, revoke)
			if err != nil {
				return err
			}
			if p != nil {
				return a.proposed(w, p)
			}
			have = !revoke
		}
		if a.json {
			return printJSON(w, struct {
				Digest string `json:"digest"`
				Signed bool   `json:"signed"`
			}{name, have})
		}
		text := map[bool]string{true: "has your signature", false: "has no signature of yours"}[have]
		fmt.Fprintf(w, "image %s %s\n", name, text)
		return nil
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "say what the image is and whether it is signed, and change nothing")
	return cmd
}

func (a *app) imageSignaturesCmd() *cobra.Command {
	return &cobra.Command{
		Use: "signatures [ACCOUNT]", Short: "List the images that an account has signed", Args: cobra.MaximumNArgs(1),
		Example: "  holdfast image signatures                        # your own\n  holdfast image signatures acct1… --json",
		RunE: a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
			account, err := accountIn(u, args)
			if err != nil {
				return err
			}
			all, err := u.ImageSignatures(ctx, account)
			if err != nil {
				return err
			}
			out := []imageSignature{}
			for _, s := range all {
				out = append(out, signatureOf(s))
			}
			if a.json {
				return printJSON(w, out)
			}
			if len(out) == 0 {
				fmt.Fprintln(w, "no image is signed: holdfast image sign REFERENCE signs one")
				return nil
			}
			rows := [][]string{{"IMAGE", "SIGNED"}}
			for _, s := range out {
				rows = append(rows, []string{s.Digest, s.Time})
			}
			table(w, rows...)
			return nil
		}),
	}
}
