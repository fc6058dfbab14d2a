package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) templateCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "template", Short: "Publish Compose files with parameters for others to deploy"})
	cmd.AddCommand(a.templateListCmd(), a.templateShowCmd(), a.templatePublishCmd())
	return cmd
}

func (a *app) templateListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list [ACCOUNT]", Short: "List an account's templates", Args: cobra.MaximumNArgs(1),
		Example: "  holdfast template list                           # your own\n  holdfast template list acct1… --json",
		RunE: a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
			account, err := accountIn(u, args)
			if err != nil {
				return err
			}
			all, err := u.Templates(ctx, account)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(w, orEmpty(all))
			}
			if len(all) == 0 {
				fmt.Fprintln(w, "no templates yet: holdfast template publish FILE makes one")
				return nil
			}
			rows := [][]string{{"TEMPLATE", "PUBLISHED", "BYTES"}}
			for _, t := range all {
				rows = append(rows, []string{t.Name + "@" + t.Version, time.Unix(t.Time, 0).UTC().Format(time.RFC3339), fmt.Sprint(t.Size)})
			}
			table(w, rows...)
			return nil
		}),
	}
}

func (a *app) templateShowCmd() *cobra.Command {
	var body bool
	cmd := &cobra.Command{
		Use: "show [ACCOUNT/]NAME@VERSION", Short: "Show a template's parameters, and with --body its file", Args: asUsed,
		Example: "  holdfast template show blog@1.0\n  holdfast template show acct1…/blog@1.0 --body",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		t, raw, err := u.Template(ctx, args[0])
		if err != nil {
			return err
		}
		params, err := contract.Parameters(raw)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(w, struct {
				Template   *ledger.Template     `json:"template"`
				Parameters []contract.Parameter `json:"parameters"`
				Source     string               `json:"source,omitempty"`
			}{t, orEmpty(params), map[bool]string{true: string(raw)}[body]})
		}
		if body { // by somebody else, for a terminal
			showText(w, raw)
			return nil
		}
		table(w, []string{"template", t.Name + "@" + t.Version}, []string{"account", t.Account.String()},
			[]string{"published", time.Unix(t.Time, 0).UTC().Format(time.RFC3339)}, []string{"sha256", fmt.Sprintf("%x", t.Digest)})
		fmt.Fprintln(w)
		rows := [][]string{{"PARAMETER", "TYPE", "DEFAULT", "ABOUT"}}
		for _, p := range params {
			def := "must be given"
			if p.Default != nil {
				def = fmt.Sprintf("%q", *p.Default)
			}
			kind := p.Type
			if len(p.Choices) > 0 {
				kind = strings.Join(p.Choices, " | ")
			}
			rows = append(rows, []string{p.Name, printable([]byte(kind)), def, printable([]byte(p.About))})
		}
		table(w, rows...)
		return nil
	})
	cmd.Flags().BoolVar(&body, "body", false, "print the file")
	return cmd
}

func (a *app) templatePublishCmd() *cobra.Command {
	var name, version string
	cmd := &cobra.Command{
		Use: "publish FILE", Short: "Publish a Compose file as a version of a template, for good", Args: asUsed,
		Long:    "The file declares its parameters under x-holdfast.parameters, and is checked with their defaults and examples. Everybody on\nthe grid can read it: it holds no secrets. A version is never changed.",
		Example: "  holdfast template publish blog.yaml --name blog --version 1.0\n  holdfast deploy blog@1.0 --set host=blog.localhost",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		raw, err := io.ReadAll(io.LimitReader(f, contract.MaxCompose+1))
		f.Close()
		if err != nil {
			return err
		}
		if name == "" {
			name = strings.TrimSuffix(filepath.Base(args[0]), filepath.Ext(args[0]))
		}
		p, err := u.Publish(ctx, name, version, raw)
		if err != nil {
			return err
		}
		if p != nil {
			return a.proposed(w, p)
		}
		ref := u.Account.String() + "/" + name + "@" + version
		if a.json {
			return printJSON(w, struct {
				Template string `json:"template"`
			}{ref})
		}
		fmt.Fprintf(w, "published\nothers deploy it as %s\n", ref)
		return nil
	})
	cmd.Flags().StringVar(&name, "name", "", "the template's `name` (default the file's)")
	cmd.Flags().StringVar(&version, "version", "", "the `version`, as 1.0")
	cmd.MarkFlagRequired("version")
	return cmd
}

// showText shows what somebody else wrote.
func showText(w io.Writer, raw []byte) {
	for l := range strings.Lines(string(raw)) {
		fmt.Fprintln(w, printable([]byte(strings.TrimSuffix(l, "\n"))))
	}
}

// isTemplate says whether an argument names a template and no file.
func isTemplate(arg string) bool {
	if !strings.Contains(arg, "@") {
		return false
	}
	_, err := os.Stat(arg)
	return errors.Is(err, fs.ErrNotExist)
}

// parseSet reads --set NAME=VALUE.
func parseSet(cmd *cobra.Command, set []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range set {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, wrong(cmd, fmt.Errorf("--set %q: write NAME=VALUE", s))
		}
		if _, twice := out[k]; twice {
			return nil, wrong(cmd, fmt.Errorf("--set %s is there twice", k))
		}
		out[k] = v
	}
	return out, nil
}
