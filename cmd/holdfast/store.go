package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"holdfast/store"
	"holdfast/store/control"
)

func (a *app) storeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "store", Short: "Look after a dispersed store", Long: "Looks after the store that holdfast run s3 serves: each command asks the one that runs in --dir, over a socket there that\nonly its own user can use."})
	cmd.AddCommand(a.storeStatusCmd(), a.storeScrubCmd(), a.storeAuditCmd(), a.storeRepairCmd(), a.storeUndeleteCmd(), a.storeRotateCmd(), a.storeUserCmd(), a.storePolicyCmd())
	return cmd
}

// frontCmd makes a command that asks the front end of a store.
func (a *app) frontCmd(cmd *cobra.Command, f func(cmd *cobra.Command, c *control.Client, args []string) error) *cobra.Command {
	var dir string
	cmd.Flags().StringVar(&dir, "dir", "", storeDirUsage)
	if cmd.Args == nil {
		cmd.Args = asUsed
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := dialFront(cmd, dir)
		if err != nil {
			return err
		}
		return f(cmd, c, args)
	}
	return cmd
}

func dialFront(cmd *cobra.Command, dir string) (*control.Client, error) {
	if dir == "" {
		return nil, wrong(cmd, errors.New("--dir is missing"))
	}
	c, err := control.Dial(dir)
	if !errors.Is(err, control.ErrNotRunning) {
		return c, err
	}
	if _, err := os.Stat(filepath.Join(dir, s3Keys)); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no store in %s: holdfast run s3 --dir %[1]s begins one, holdfast restore store --dir %[1]s brings one back", dir)
	}
	return nil, fmt.Errorf("no front end runs in %s: start it with holdfast run s3 --dir %[1]s", dir)
}

// watch shows progress on a terminal, of what takes longer than two seconds.
func (a *app) watch(cmd *cobra.Command) (seen func(control.Progress), done func()) {
	w := cmd.ErrOrStderr()
	if _, ok := terminal(w); !ok || a.json {
		return nil, func() {}
	}
	p, begin := newProgress(w), time.Now()
	return func(x control.Progress) {
		if time.Since(begin) < 2*time.Second {
			return
		}
		if x.Of == 0 {
			p.say("%s: %d %s", x.What, x.Done, x.Unit)
			return
		}
		p.say("%s: %d of %d %s, %d %%", x.What, x.Done, x.Of, x.Unit, min(100, 100*x.Done/x.Of))
	}, p.done
}

// size is a flag's number of bytes, such as 20MiB.
type size int64

func (s *size) Set(text string) error {
	n, err := units.RAMInBytes(text)
	if err == nil && n <= 0 {
		err = errors.New("it is not more than 0")
	}
	*s = size(n)
	return err
}

func (s *size) Type() string { return "size" }

func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return units.BytesSize(float64(*s))
}

func bytesOf(n int64) string {
	return units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})
}

func (a *app) storeStatusCmd() *cobra.Command {
	return a.frontCmd(&cobra.Command{
		Use: "status", Short: "Show what a store keeps, and how safe it is",
		Long:    "Counts segments by how many durable shards they have: one with d of them survives the loss of any d−k. It reads all\nmetadata, and asks every location. It fails when something is lost.",
		Example: "  holdfast store status --dir store\n  holdfast store status --dir store --json",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		st, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			if err := printJSON(w, st); err != nil {
				return err
			}
		} else {
			showStore(w, st)
		}
		if st.Lost > 0 {
			return lostError(st.Lost)
		}
		return nil
	})
}

func lostError(n int64) error {
	return fmt.Errorf("lost: %s with fewer shards than restore it", some(n, "segment"))
}

func showStore(w io.Writer, st *control.Status) {
	scheme := "scheme " + st.Scheme
	for _, name := range slices.Sorted(maps.Keys(st.Classes)) {
		scheme += fmt.Sprintf(", %s %s", name, st.Classes[name])
	}
	keys := fmt.Sprintf("of epoch %d", st.KeyEpoch)
	if st.OldKey > 0 {
		keys += fmt.Sprintf(", %s under earlier ones", some(st.OldKey, "segment"))
	}
	table(w,
		[]string{"store", scheme},
		[]string{"keeps", fmt.Sprintf("%s in %s and %s with %s", bytesOf(st.Bytes), some(st.Segments, "segment"), some(st.Blocks, "block"), some(st.Small, "small body"))},
		[]string{"keys", keys},
		[]string{"front end", fmt.Sprintf("the %s of this store, since %s", ordinal(st.Epoch), st.Started.Format("2006-01-02 15:04 MST"))},
		[]string{"repair", some(st.Queue, "segment") + " in the queue"},
	)
	fmt.Fprintln(w)
	rows := [][]string{{"SCHEME", "DURABLE", "SEGMENTS", "SURVIVES THE LOSS OF"}}
	for _, scheme := range slices.Sorted(maps.Keys(st.Durable)) {
		var k, n int
		fmt.Sscanf(scheme, "%d/%d", &k, &n)
		for d := n; d >= 0; d-- {
			count, ok := st.Durable[scheme][strconv.Itoa(d)]
			if !ok && d < n {
				continue
			}
			survives := fmt.Sprintf("any %d locations", d-k)
			if d == k+1 {
				survives = "any location"
			}
			switch {
			case d < k:
				survives = paint(w, red, "lost")
			case d == k:
				survives = paint(w, red, "none")
			case d < n:
				survives = paint(w, yellow, survives)
			}
			rows = append(rows, []string{scheme, fmt.Sprintf("%d of %d", d, n), fmt.Sprint(count), survives})
		}
	}
	table(w, rows...)
	fmt.Fprintln(w)
	showMembers(w, st.Locations)
}

// some is a number of things.
func some[N ~int | ~int64 | ~uint64](n N, thing string) string {
	switch stem, y := strings.CutSuffix(thing, "y"); {
	case n == 1:
	case y:
		thing = stem + "ies"
	default:
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func ordinal(n uint64) string {
	end := "th"
	if n/10%10 != 1 {
		switch n % 10 {
		case 1:
			end = "st"
		case 2:
			end = "nd"
		case 3:
			end = "rd"
		}
	}
	return fmt.Sprint(n) + end
}

func showMembers(w io.Writer, all []control.Location) {
	rows := [][]string{{"FARM", "STATE", "SHARDS", "BYTES", "AUDITS", "ID", "WHERE"}}
	var notes []string
	for _, l := range all {
		state := l.State
		switch {
		case l.State == store.Removed.String():
			continue
		case l.At == "":
			state += ", not found"
			notes = append(notes, fmt.Sprintf("%s: the store knows this location, and its address is in no list: holdfast location add tells it, or drain and remove it", l.Farm))
		case !l.Answers:
			state += ", silent"
			notes = append(notes, fmt.Sprintf("%s has not answered for %v: %s", l.Farm, (time.Duration(l.Down)*time.Second).Round(time.Second), printable([]byte(l.Why))))
		case l.Full:
			state += ", full"
		}
		if l.Rotten > 0 {
			notes = append(notes, fmt.Sprintf("%s knows of %d rotten shards of its own: a scrub has them repaired", l.Farm, l.Rotten))
		}
		if l.Lies > 0 {
			notes = append(notes, fmt.Sprintf("%s gave wrong bytes or proofs %d times since the start", l.Farm, l.Lies))
		}
		audits := fmt.Sprintf("%d passed", l.Passed)
		if l.Failed > 0 {
			audits += paint(w, red, fmt.Sprintf(", %d failed", l.Failed))
		}
		if state == "active" {
			state = stateColour(w, state)
		} else {
			state = paint(w, yellow, state)
		}
		where := l.At
		if at, err := control.ParseURL(l.At); err == nil {
			where = at.Addr
		}
		kept := bytesOf(l.Bytes)
		if l.Quota > 0 {
			kept += " of " + bytesOf(l.Quota)
		}
		rows = append(rows, []string{l.Farm, state, fmt.Sprint(l.Shards), kept, audits, l.ID[:8], printable([]byte(where))})
	}
	table(w, rows...)
	for _, n := range notes {
		fmt.Fprintln(w, n)
	}
}

func (a *app) storeScrubCmd() *cobra.Command {
	var rate size
	var deep bool
	cmd := a.frontCmd(&cobra.Command{
		Use: "scrub", Short: "Find shards that are missing, rotten, or of nothing",
		Long:    "Compares all records with what every location lists, and queues for repair what is missing or known to be rotten. With\n--deep it reads every shard and checks it against its name, and believes no list. Locations check their own shards all\nthe time, and a store scrubs itself every six hours.",
		Example: "  holdfast store scrub --dir store\n  holdfast store scrub --dir store --rate 10000        # shards a second\n  holdfast store scrub --dir store --deep --rate 20MiB # bytes a second",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		seen, done := a.watch(cmd)
		got, err := c.Scrub(cmd.Context(), control.Scrub{Rate: int(rate), Deep: deep}, seen)
		if done(); err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			return printJSON(w, got)
		}
		if got.Deep {
			fmt.Fprintf(w, "read %s, %s: %d missing or wrong\n", some(got.Shards, "shard"), bytesOf(got.Bytes), got.Missing)
		} else {
			fmt.Fprintf(w, "compared %s: %d missing or rotten\n", some(got.Shards, "shard"), got.Missing)
			if got.Orphans > 0 {
				fmt.Fprintf(w, "%s belong to nothing any more, %d of these are removed\n", some(got.Orphans, "shard"), got.Removed)
			}
		}
		if got.Missing > 0 {
			fmt.Fprintln(w, "their segments wait for repair, which begins by itself")
		}
		if got.Silent > 0 && got.Deep {
			fmt.Fprintf(w, "%d shards could not be read, since their locations do not answer\n", got.Silent)
		} else if got.Silent > 0 {
			fmt.Fprintf(w, "%d locations do not answer, and were not looked at\n", got.Silent)
		}
		return nil
	})
	cmd.Flags().Var(&rate, "rate", "`number` of shards a second, of bytes with --deep; without it as fast as it goes")
	cmd.Flags().BoolVar(&deep, "deep", false, "read all shards")
	return cmd
}

func (a *app) storeAuditCmd() *cobra.Command {
	var count, rate int
	cmd := a.frontCmd(&cobra.Command{
		Use: "audit", Short: "Have locations prove that they hold their shards",
		Long:    "Challenges locations with random leaves of random shards: only who has the bytes can answer. What a location cannot prove\nis made anew. A store audits itself every minute. It fails when a challenge did.",
		Example: "  holdfast store audit --dir store\n  holdfast store audit --dir store --count 1000 --rate 50",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		if count < 1 || rate < 0 {
			return wrong(cmd, errors.New("--count is at least 1, --rate at least 0"))
		}
		seen, done := a.watch(cmd)
		got, err := c.Audit(cmd.Context(), control.Audit{Count: count, Rate: rate}, seen)
		if done(); err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			err = printJSON(w, got)
		} else {
			_, err = fmt.Fprintf(w, "%d challenges passed, %d failed, %d were not answered\n", got.Passed, got.Failed, got.Silent)
		}
		if err == nil && got.Failed > 0 {
			err = fmt.Errorf("%d of %d challenges failed: holdfast store status says whose", got.Failed, got.Passed+got.Failed)
		}
		return err
	})
	cmd.Flags().IntVar(&count, "count", 100, "`number` of challenges")
	cmd.Flags().IntVar(&rate, "rate", 0, "`number` of challenges a second; 0 is as fast as it goes")
	return cmd
}

func (a *app) storeRepairCmd() *cobra.Command {
	var rate size
	cmd := a.frontCmd(&cobra.Command{
		Use: "repair", Short: "Make missing shards anew now",
		Long:    "Goes through the queue of repairs once, the most endangered segments first. A store repairs by itself; shards of a location\nthat does not answer are made elsewhere after ten minutes, and at once when it is drained.",
		Example: "  holdfast store repair --dir store\n  holdfast store repair --dir store --rate 50MiB",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		seen, done := a.watch(cmd)
		got, err := c.Repair(cmd.Context(), control.Repair{Rate: int(rate)}, seen)
		if done(); err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			return printJSON(w, got)
		}
		fmt.Fprintf(w, "made %s, %s: %s whole again, %d in the queue\n", some(got.Shards, "shard"), bytesOf(got.Bytes), some(got.Whole, "segment"), got.Queue)
		if got.Lost > 0 {
			return lostError(int64(got.Lost))
		}
		return nil
	})
	cmd.Flags().Var(&rate, "rate", "`bytes` a second that are made, such as 50MiB; without it as fast as it goes")
	return cmd
}

// readPhrase takes a recovery phrase from a file, or from the terminal.
func readPhrase(ctx context.Context, file string) (root store.Root, err error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return root, err
		}
		if root, err = store.ParsePhrase(string(b)); err != nil {
			return root, fmt.Errorf("%s: %w", file, err)
		}
		return root, nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return root, errors.New("it asks for the recovery phrase, and there is no terminal: add --phrase-file FILE")
	}
	text, err := askSecret(ctx, "recovery phrase: ")
	if err != nil {
		return root, err
	}
	return store.ParsePhrase(text)
}

const phraseUsage = "`file` of the recovery phrase, instead of asking for it"

func (a *app) storeRotateCmd() *cobra.Command {
	var dir, phrase string
	var resume bool
	cmd := &cobra.Command{
		Use: "rotate", Short: "Seal everything under new keys", Args: asUsed,
		Long: "Begins a new epoch of the store's keys, which derive from the recovery phrase: it asks for it, and the front end never sees\nit. New segments are sealed under the new key at once; the keys of all others are wrapped anew, without their data being\nread or written. The phrase stays as it is.\n\nWhoever has a copy of the old keys does not open what is written from now on. What was there before he opens as long as he\nfinds the old wrapped keys, in metadata that locations remove a day later, if they are honest. And he is the front end to\nlocations as before: from one whose keys were stolen, copy the objects to a new store.\n\n" +
			"One that was interrupted goes on with --resume.",
		Example: "  holdfast store rotate --dir store\n  holdfast store rotate --dir store --phrase-file /secure/phrase\n  holdfast store rotate --dir store --resume",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := dialFront(cmd, dir)
			if err != nil {
				return err
			}
			if !resume {
				if err := newEpoch(cmd.Context(), filepath.Join(dir, s3Keys), phrase); err != nil {
					return err
				}
			}
			seen, done := a.watch(cmd)
			got, err := c.Rotate(cmd.Context(), seen)
			if done(); err != nil {
				return fmt.Errorf("%w\nholdfast store rotate --dir %s --resume goes on", err, dir)
			}
			w := cmd.OutOrStdout()
			if a.json {
				err = printJSON(w, got)
			} else {
				_, err = fmt.Fprintf(w, "keys are of epoch %d now; %d segments were re-wrapped\n", got.KeyEpoch, got.Changed)
			}
			if err == nil && got.Left > 0 {
				err = fmt.Errorf("%d segments are under earlier keys yet, since too few of their locations answer: holdfast store rotate --dir %s --resume goes on", got.Left, dir)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", storeDirUsage)
	cmd.Flags().StringVar(&phrase, "phrase-file", "", phraseUsage)
	cmd.Flags().BoolVar(&resume, "resume", false, "go on with what was interrupted")
	return cmd
}

// newEpoch writes keys of the next epoch: durably, before anything is sealed under them.
func newEpoch(ctx context.Context, file, phrase string) error {
	now, err := store.LoadKeys(file)
	if err != nil {
		return err
	}
	root, err := readPhrase(ctx, phrase)
	if err != nil {
		return err
	}
	next, err := root.Keys(now.Epoch + 1)
	if err != nil {
		return err
	}
	if err := next.Follow(now); err != nil {
		return fmt.Errorf("the phrase is not that of this store: %w", err)
	}
	return store.SaveKeys(file, next)
}

func (a *app) storeUserCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "user", Short: "Give and take access to a store"})
	list := a.frontCmd(&cobra.Command{
		Use: "list", Short: "List users, and the buckets that they own", Example: "  holdfast store user list --dir store",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		all, err := c.Users(cmd.Context())
		if err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			return printJSON(w, all)
		}
		rows := [][]string{{"ACCESS KEY", "ROLE", "BUCKETS"}}
		for _, u := range all {
			role := u.Role
			if u.Root {
				role = "the server's own"
			}
			rows = append(rows, []string{u.Access, role, strings.Join(u.Buckets, " ")})
		}
		table(w, rows...)
		return nil
	})
	var role string
	var addSecret, rotateSecret bool
	const secretUsage = "read the secret key from standard input instead of drawing one"
	add := a.frontCmd(&cobra.Command{
		Use: "add ACCESS_KEY", Short: "Make a user",
		Long:    "Makes a user, and shows its secret key this once. A user of role user uses what policies give it, one of role userplus\nmakes buckets of its own too, an admin may do everything.",
		Example: "  holdfast store user add anna --dir store\n  holdfast store user add backup --role userplus --dir store --secret-stdin < secret",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		u := control.User{Access: args[0], Role: role}
		var err error
		if addSecret {
			if u.Secret, err = secretFrom(cmd.InOrStdin()); err != nil {
				return err
			}
		}
		got, err := c.AddUser(cmd.Context(), u)
		if err != nil {
			return err
		}
		return a.showSecret(cmd.OutOrStdout(), got, addSecret)
	})
	add.Flags().StringVar(&role, "role", "user", "user, userplus or admin")
	add.Flags().BoolVar(&addSecret, "secret-stdin", false, secretUsage)
	rotate := a.frontCmd(&cobra.Command{
		Use: "rotate ACCESS_KEY", Short: "Give a user another secret key",
		Long:    "Replaces a user's secret key, and shows the new one this once. The old one opens nothing from then on.",
		Example: "  holdfast store user rotate anna --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		secret := ""
		var err error
		if rotateSecret {
			if secret, err = secretFrom(cmd.InOrStdin()); err != nil {
				return err
			}
		}
		got, err := c.SetSecret(cmd.Context(), args[0], secret)
		if err != nil {
			return err
		}
		return a.showSecret(cmd.OutOrStdout(), got, rotateSecret)
	})
	rotate.Flags().BoolVar(&rotateSecret, "secret-stdin", false, secretUsage)
	var yes bool
	remove := a.frontCmd(&cobra.Command{
		Use: "remove ACCESS_KEY", Short: "Take a user away",
		Long:    "Takes a user away at once. The buckets that it owns stay, and the server's own account reaches them.",
		Example: "  holdfast store user remove anna --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		if !yes {
			if err := confirm(cmd, fmt.Sprintf("take user %s away?", args[0])); err != nil {
				return err
			}
		}
		if err := c.RemoveUser(cmd.Context(), args[0]); err != nil {
			return err
		}
		return a.did(cmd.OutOrStdout(), "user %s is removed", args[0])
	})
	remove.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	for _, x := range []*cobra.Command{rotate, remove} {
		x.ValidArgsFunction = offered(func(ctx context.Context, c *control.Client) (out []string) {
			all, _ := c.Users(ctx)
			for _, u := range all {
				if !u.Root {
					out = append(out, u.Access)
				}
			}
			return out
		})
	}
	cmd.AddCommand(list, add, rotate, remove)
	return cmd
}

// secretFrom reads one line, so that a secret is in no list of processes.
func secretFrom(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, 4<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the secret key: %w", err)
	}
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return "", errors.New("standard input has no secret key")
	}
	return line, nil
}

// showSecret shows what was drawn. What the user brought along he has.
func (a *app) showSecret(w io.Writer, c control.Credentials, brought bool) error {
	if brought {
		c.Secret = ""
	}
	if a.json {
		return printJSON(w, struct {
			Access string `json:"access_key"`
			Secret string `json:"secret_key,omitempty"`
		}{c.Access, c.Secret})
	}
	fmt.Fprintf(w, "access key  %s\n", c.Access)
	if !brought {
		fmt.Fprintf(w, "secret key  %s\nThe secret key is shown this once.\n", c.Secret)
	}
	return nil
}

// did says that something was done that has no other answer.
func (a *app) did(w io.Writer, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if a.json {
		return printJSON(w, struct {
			Done string `json:"done"`
		}{text})
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// offered completes a command's first argument with what the front end of --dir has.
func offered(f func(context.Context, *control.Client) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		dir, err := cmd.Flags().GetString("dir")
		if len(args) > 0 || err != nil || dir == "" {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c, err := control.Dial(dir)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		return f(ctx, c), cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) storePolicyCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "policy", Short: "Say who may do what in a bucket"})
	list := a.frontCmd(&cobra.Command{
		Use: "list", Short: "List buckets, their owners, and which have a policy", Example: "  holdfast store policy list --dir store",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		all, err := c.Buckets(cmd.Context())
		if err != nil {
			return err
		}
		w := cmd.OutOrStdout()
		if a.json {
			return printJSON(w, all)
		}
		rows := [][]string{{"BUCKET", "OWNER", "POLICY"}}
		for _, b := range all {
			has := "none"
			if b.Policy {
				has = "yes"
			}
			rows = append(rows, []string{b.Name, b.Owner, has})
		}
		table(w, rows...)
		return nil
	})
	show := a.frontCmd(&cobra.Command{
		Use: "show BUCKET", Short: "Print a bucket's policy", Example: "  holdfast store policy show photos --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		p, err := c.Policy(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return printJSON(cmd.OutOrStdout(), p)
	})
	set := a.frontCmd(&cobra.Command{
		Use: "set BUCKET FILE", Short: "Set a bucket's policy",
		Long:    "Replaces a bucket's policy by the JSON in a file, - is standard input. Principals are access keys. A policy that speaks of\nanother bucket, or of users that are not there, is refused.",
		Example: "  holdfast store policy set photos policy.json --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		in := cmd.InOrStdin()
		if args[1] != "-" {
			f, err := os.Open(args[1])
			if err != nil {
				return err
			}
			defer f.Close()
			in = f
		}
		p, err := io.ReadAll(io.LimitReader(in, 64<<10))
		if err != nil {
			return err
		}
		if !json.Valid(p) {
			return fmt.Errorf("%s: it is not JSON", args[1])
		}
		if err := c.SetPolicy(cmd.Context(), args[0], p); err != nil {
			return err
		}
		return a.did(cmd.OutOrStdout(), "bucket %s has its policy", args[0])
	})
	var yes bool
	remove := a.frontCmd(&cobra.Command{
		Use: "remove BUCKET", Short: "Take a bucket's policy away",
		Long:    "Takes a bucket's policy away: only its owner and admins have access then.",
		Example: "  holdfast store policy remove photos --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		if !yes {
			if err := confirm(cmd, fmt.Sprintf("take the policy of bucket %s away?", args[0])); err != nil {
				return err
			}
		}
		if err := c.RemovePolicy(cmd.Context(), args[0]); err != nil {
			return err
		}
		return a.did(cmd.OutOrStdout(), "bucket %s has no policy", args[0])
	})
	remove.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	for _, x := range []*cobra.Command{show, set, remove} {
		x.ValidArgsFunction = offered(func(ctx context.Context, c *control.Client) (out []string) {
			all, _ := c.Buckets(ctx)
			for _, b := range all {
				out = append(out, b.Name)
			}
			return out
		})
	}
	cmd.AddCommand(list, show, set, remove)
	return cmd
}
