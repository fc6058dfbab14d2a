package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/ca"
	"holdfast/deploy"
	"holdfast/identity"
	"holdfast/internal/grid"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// connect reads the ledger as anybody can.
func (a *app) connect() (*api.Client, *grid.Client, error) {
	if err := a.noGrid(); err != nil {
		return nil, nil, err
	}
	return grid.Connect(a.dir)
}

// domains are what a local CA may speak for.
func domains() []string { return []string{"localhost"} }

// authority is the user's CA, made when there is none yet.
func (a *app) authority() (*ca.CA, error) {
	return ca.Open(filepath.Join(a.dir, "ca"), domains(), time.Now())
}

// user acts as the user: with the key file in --dir, whose passphrase is asked for or in HOLDFAST_PASSPHRASE.
func (a *app) user(ctx context.Context) (*deploy.User, *grid.Client, error) {
	c, cfg, err := a.connect()
	if err != nil {
		return nil, nil, err
	}
	keys, err := readKey(ctx, filepath.Join(a.dir, "user.key"))
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	authority, err := a.authority()
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return &deploy.User{Client: c, Account: cfg.Account, Keys: keys, CA: authority}, cfg, nil
}

func readKey(ctx context.Context, path string) (*identity.KeyFile, error) {
	given := os.Getenv("HOLDFAST_PASSPHRASE")
	keys, err := identity.ReadKeyFile(path, given)
	if !errors.Is(err, identity.ErrPassphrase) || given != "" {
		return keys, err
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil, fmt.Errorf("%w: there is no terminal to ask on, set HOLDFAST_PASSPHRASE", err)
	}
	pass, err := askSecret(ctx, "passphrase of "+path+": ")
	if err != nil {
		return nil, err
	}
	return identity.ReadKeyFile(path, pass)
}

// askSecret reads a line from the terminal without showing it. An interrupt gives the terminal back as it was.
func askSecret(ctx context.Context, question string) (string, error) {
	fd := int(os.Stdin.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("terminal: %w", err)
	}
	fmt.Fprint(os.Stderr, question)
	defer fmt.Fprintln(os.Stderr)
	text, err := interruptible(ctx, func() (string, error) {
		b, err := term.ReadPassword(fd)
		return string(b), err
	})
	if ctx.Err() != nil {
		term.Restore(fd, before)
	}
	return text, err
}

// interruptible waits for somebody who types. When ctx ends first, the process is about to end, and with it the reader.
func interruptible(ctx context.Context, read func() (string, error)) (string, error) {
	type answer struct {
		text string
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		text, err := read()
		done <- answer{text, err}
	}()
	select {
	case x := <-done:
		return x.text, x.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func confirm(cmd *cobra.Command, question string) error {
	line, err := answer(cmd, question+" [y/N] ")
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"y", "yes"}, strings.ToLower(line)) {
		return errNothing
	}
	return nil
}

// typed asks for a word where a y would be typed too easily.
func typed(cmd *cobra.Command, what, word string) error {
	line, err := answer(cmd, fmt.Sprintf("%s\nType %s to go ahead: ", what, word))
	if err != nil {
		return err
	}
	if line != word {
		return errNothing
	}
	return nil
}

// errNothing ends a command whose user thought better of it.
var errNothing = errors.New("nothing was done")

// answer reads a line from the terminal; one that ends early is an empty one.
func answer(cmd *cobra.Command, question string) (string, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", errors.New("there is no terminal to ask on: add --yes to go ahead")
	}
	fmt.Fprint(cmd.ErrOrStderr(), question)
	line, err := interruptible(cmd.Context(), func() (string, error) { return bufio.NewReader(os.Stdin).ReadString('\n') })
	if cmd.Context().Err() != nil {
		fmt.Fprintln(cmd.ErrOrStderr())
		return "", cmd.Context().Err()
	}
	if err != nil {
		return "", nil
	}
	return strings.TrimSpace(line), nil
}

func (a *app) caCmd() *cobra.Command {
	return &cobra.Command{
		Use: "ca", Short: "Print the root certificate of your local CA", Args: asUsed,
		Long:    "Prints the certificate that browsers and curl must trust to reach your routes. Its key stays in --dir, and it can speak\nfor names under localhost only.",
		Example: "  holdfast ca > ca.pem\n  curl --cacert ca.pem https://pocketbase.localhost:8443/",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.noGrid(); err != nil { // a new CA in a mistyped directory would be no help
				return err
			}
			c, err := a.authority()
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), struct {
					Root string `json:"root"`
				}{string(c.Root())})
			}
			_, err = cmd.OutOrStdout().Write(c.Root())
			return err
		},
	}
}
