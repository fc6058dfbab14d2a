package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"holdfast/store"
	"holdfast/store/control"
	"holdfast/store/location"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// locationConfig is the configuration file of a location.
type locationConfig struct {
	Dir    string          `json:"dir"`
	Listen string          `json:"listen"`
	Stores []locationStore `json:"stores"`
}

// locationStore is a store that keeps shards at a location.
type locationStore struct {
	Name  string         `json:"name"` // of its directory
	Quota location.Quota `json:"quota"`
	Keys  []locationKey  `json:"keys"`
}

type locationKey struct {
	Pin    string   `json:"pin"`
	Rights []string `json:"rights"`
}

func (k locationKey) parse() (out location.Key, err error) {
	if out.Pin, err = location.ParsePin(k.Pin); err != nil {
		return out, err
	}
	if out.Rights, err = location.ParseRights(k.Rights); err == nil && out.Rights == 0 {
		err = fmt.Errorf("key %v: it has no rights", out.Pin)
	}
	return out, err
}

// locationKeyFile is in a location's directory, and only store is the name of what --allow speaks of.
const (
	locationKeyFile = "key"
	onlyStore       = "store"
)

func (a *app) runLocationCmd() *cobra.Command {
	var dir, listen, file string
	var allow []string
	var quota size
	cmd := &cobra.Command{
		Use: "location", Short: "Keep shards for stores", Args: asUsed,
		Long: "Keeps shards of stores in --dir, for the keys that it is told of and nobody else. It prints what a front end takes as\n--location, and sees sealed bytes only. Deletes are held 24 hours, in which the key of the recovery phrase undoes them.\n" +
			"holdfast location pin prints what a store's keys need here. Several stores need --config.",
		Example: "  holdfast run location --dir /srv/shards --listen :7000 --allow PIN:read,write,delete --allow PIN:recover\n  holdfast run location --dir /srv/shards --listen :7000 --allow PIN:read,write,delete --quota 500GiB\n  holdfast run location --config location.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				return err
			}
			var cfg locationConfig
			if file != "" {
				if err := readConfig(file, &cfg); err != nil {
					return err
				}
			}
			cfg.Dir, cfg.Listen = cmp.Or(dir, cfg.Dir), cmp.Or(listen, cfg.Listen)
			if len(allow) > 0 {
				only := locationStore{Name: onlyStore, Quota: location.Quota{Bytes: int64(quota)}}
				for _, text := range allow {
					pin, rights, _ := strings.Cut(text, ":")
					k := locationKey{pin, strings.FieldsFunc(rights, func(r rune) bool { return r == ',' })}
					if _, err := k.parse(); err != nil {
						return wrong(cmd, fmt.Errorf("--allow %s: %w", text, err))
					}
					only.Keys = append(only.Keys, k)
				}
				cfg.Stores = append(cfg.Stores, only)
			}
			for _, x := range []struct{ flag, value string }{{"--dir", cfg.Dir}, {"--listen", cfg.Listen}} {
				if x.value == "" {
					return wrong(cmd, fmt.Errorf("neither --config nor a flag gives %s", x.flag))
				}
			}
			if quota > 0 && len(allow) == 0 {
				return wrong(cmd, errors.New("--quota is of the store that --allow speaks of; in --config each store has its own"))
			}
			if len(cfg.Stores) == 0 {
				return wrong(cmd, errors.New("neither --config nor --allow says who may use it"))
			}
			return a.runLocation(cmd.Context(), cmd.OutOrStdout(), &cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "`directory` of its key and the shards")
	f.StringVar(&listen, "listen", "", "`address` to listen on")
	f.StringArrayVar(&allow, "allow", nil, "key of a store and what it may, `PIN:RIGHT,…` of read, write, delete, recover; once for each key")
	f.Var(&quota, "quota", "`bytes` that the store may keep here, such as 500GiB; without it all that there is room for")
	f.StringVar(&file, "config", "", "configuration `file`, in JSON")
	return cmd
}

func (a *app) runLocation(ctx context.Context, out io.Writer, cfg *locationConfig) error {
	var stores []location.Store
	for _, s := range cfg.Stores {
		st := location.Store{Name: s.Name, Quota: s.Quota}
		for _, k := range s.Keys {
			key, err := k.parse()
			if err != nil {
				return fmt.Errorf("store %s: %w", s.Name, err)
			}
			st.Keys = append(st.Keys, key)
		}
		stores = append(stores, st)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return err
	}
	seed, err := location.LoadSeed(filepath.Join(cfg.Dir, locationKeyFile))
	if err != nil {
		return err
	}
	pin, err := location.PinOf(seed)
	if err != nil {
		return err
	}
	cert, err := location.Certificate(seed)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	s, err := location.NewServer(location.ServerConfig{Listener: l, Certificate: cert, Path: cfg.Dir, Stores: stores, Log: logger()})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	at := struct {
		URL string `json:"url"`
		Pin string `json:"pin"`
	}{control.Place{Addr: l.Addr().String(), Pin: pin}.URL(), pin.String()}
	if a.json {
		err = printJSON(out, at)
	} else {
		_, err = fmt.Fprintf(out, "location is at %s\na front end takes it as --location %[1]s,farm=NAME\n", at.URL)
	}
	if err != nil {
		return errors.Join(err, l.Close())
	}
	return s.Run(ctx)
}

func (a *app) locationCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "location", Short: "Look after the places that keep a store's shards"})
	cmd.AddCommand(a.locationListCmd(), a.locationAddCmd(), a.locationDrainCmd(), a.locationUndrainCmd(), a.locationRemoveCmd(), a.locationPinCmd(), a.locationStatusCmd())
	return cmd
}

func (a *app) locationListCmd() *cobra.Command {
	return a.frontCmd(&cobra.Command{
		Use: "list", Short: "List a store's locations", Example: "  holdfast location list --dir store\n  holdfast location list --dir store --json",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		st, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), st.Locations)
		}
		showMembers(cmd.OutOrStdout(), st.Locations)
		return nil
	})
}

func (a *app) locationAddCmd() *cobra.Command {
	return a.frontCmd(&cobra.Command{
		Use: "add LOCATION", Short: "Have a store use one more location",
		Long:    "Has a store use one more location, from now on and after a start too: URL,farm=NAME of one elsewhere, as run location\nprints it, or DIRECTORY,farm=NAME of one on this machine. The location must allow the store's key: holdfast location pin\nprints what to give it. What is written from now on goes there too; what is there moves only in repairs and drains.",
		Example: "  holdfast location add holdfast-location://g.example:7000/PIN,farm=greta --dir store\n  holdfast location add /mnt/disk7,farm=f7 --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		p, err := control.ParsePlace(args[0])
		if err == nil && p.Path != "" {
			p.Path, err = filepath.Abs(p.Path)
		}
		if err != nil {
			return wrong(cmd, fmt.Errorf("%s: %w", args[0], err))
		}
		got, err := c.AddLocation(cmd.Context(), p)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), got)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "location %s of farm %s is used from now on\n", got.ID[:8], got.Farm)
		return err
	})
}

// memberOf is the location that a word means: its farm, the beginning of its ID, or its address.
func memberOf(ctx context.Context, c *control.Client, word string) (*control.Location, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	url, _, _ := strings.Cut(word, ",farm=")
	var found []*control.Location
	for i := range st.Locations {
		l := &st.Locations[i]
		if l.State != store.Removed.String() && (l.Farm == word || l.At != "" && l.At == url || len(word) >= 8 && strings.HasPrefix(l.ID, word)) {
			found = append(found, l)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("the store has no location %q: holdfast location list shows which it has", word)
	case 1:
		return found[0], nil
	}
	var all []string
	for _, l := range found {
		all = append(all, l.ID)
	}
	return nil, fmt.Errorf("%q is more than one location: give an ID of %s", word, strings.Join(all, ", "))
}

// knownLocations completes the word of a location.
func knownLocations() cobra.CompletionFunc {
	return offered(func(ctx context.Context, c *control.Client) (out []string) {
		st, err := c.Status(ctx)
		if err != nil {
			return nil
		}
		for _, l := range st.Locations {
			if l.State != store.Removed.String() {
				out = append(out, l.Farm)
			}
		}
		return out
	})
}

const locationWord = "LOCATION is the location's farm, the first 8 or more digits of its ID, or its address."

func (a *app) locationDrainCmd() *cobra.Command {
	var rate size
	cmd := a.frontCmd(&cobra.Command{
		Use: "drain LOCATION", Short: "Move a location's shards to the others",
		Long:    "Gives a location nothing new, and makes its shards at the others: read from it if it answers, from the others if not. It\nreturns when the location is empty. When it is interrupted the store goes on by itself. It is refused where the others\nare too few: add one first.\n\n" + locationWord,
		Example: "  holdfast location drain anna --dir store\n  holdfast location drain anna --dir store --rate 20MiB",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		l, err := memberOf(cmd.Context(), c, args[0])
		if err != nil {
			return err
		}
		seen, done := a.watch(cmd)
		got, err := c.Drain(cmd.Context(), l.ID, control.Repair{Rate: int(rate)}, seen)
		if done(); err != nil {
			return err
		}
		if a.json {
			err = printJSON(cmd.OutOrStdout(), got)
		} else {
			left := "has none that is needed, and can be removed"
			if got.Left > 0 {
				left = "has shards of " + some(got.Left, "segment") + " yet"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "made %s elsewhere, %s; %s %s\n", some(got.Shards, "shard"), bytesOf(got.Bytes), l.Farm, left)
		}
		if err == nil && got.Left > 0 {
			err = fmt.Errorf("%s is not empty yet: the store goes on when locations answer", l.Farm)
		}
		return err
	})
	cmd.Flags().Var(&rate, "rate", "`bytes` a second that are made, such as 50MiB; without it as fast as it goes")
	cmd.ValidArgsFunction = knownLocations()
	return cmd
}

func (a *app) locationUndrainCmd() *cobra.Command {
	cmd := a.frontCmd(&cobra.Command{
		Use: "undrain LOCATION", Short: "Have a location that was drained be used again",
		Long:    "Has a location that was drained be used again. What has moved stays where it is.\n\n" + locationWord,
		Example: "  holdfast location undrain anna --dir store",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		l, err := memberOf(cmd.Context(), c, args[0])
		if err == nil {
			err = c.Undrain(cmd.Context(), l.ID)
		}
		if err != nil {
			return err
		}
		return a.did(cmd.OutOrStdout(), "location %s of farm %s is used again", l.ID[:8], l.Farm)
	})
	cmd.ValidArgsFunction = knownLocations()
	return cmd
}

func (a *app) locationRemoveCmd() *cobra.Command {
	var yes bool
	cmd := a.frontCmd(&cobra.Command{
		Use: "remove LOCATION", Short: "Let go of a location that was drained",
		Long:    "Has a store forget a location, which must have been drained and be empty. It asks for the farm's name. What is left in the\nlocation's directory, deletes that it holds for a day, is nobody's then.\n\n" + locationWord,
		Example: "  holdfast location remove anna --dir store\n  holdfast location remove anna --dir store --yes",
	}, func(cmd *cobra.Command, c *control.Client, args []string) error {
		l, err := memberOf(cmd.Context(), c, args[0])
		if err != nil {
			return err
		}
		if !yes {
			if err := typed(cmd, fmt.Sprintf("The store forgets location %s of farm %s, %s.", l.ID[:8], l.Farm, printable([]byte(or(l.At, "wherever it is")))), l.Farm); err != nil {
				return err
			}
		}
		seen, done := a.watch(cmd)
		got, err := c.RemoveLocation(cmd.Context(), l.ID, seen)
		if done(); err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), got)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "location %s of farm %s is removed\n", l.ID[:8], l.Farm)
		return err
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.ValidArgsFunction = knownLocations()
	return cmd
}

const storeDirUsage = "`directory` of the store, as in run s3"

func (a *app) locationPinCmd() *cobra.Command {
	var o s3Options
	cmd := &cobra.Command{
		Use: "pin", Short: "Print what a location must allow a store's keys", Args: asUsed,
		Long:    "Prints the pin and the rights of the key that a store's front end has at its locations, and with --phrase-file those of\nthe recovery key too, which undoes deletes. A store that has no keys yet gets them, as by run s3.",
		Example: "  holdfast location pin --dir store --phrase-file /secure/phrase",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.dir == "" {
				return wrong(cmd, errors.New("--dir is missing"))
			}
			if err := os.MkdirAll(o.dir, 0o700); err != nil {
				return err
			}
			keys, err := storeKeys(cmd, o)
			if err != nil {
				return err
			}
			seeds, rights := []location.Seed{keys.TLS()}, []location.Rights{location.Read | location.Write | location.Delete}
			if o.phrase != "" {
				b, err := os.ReadFile(o.phrase)
				if err != nil {
					return err
				}
				root, err := store.ParsePhrase(string(b))
				if err != nil {
					return fmt.Errorf("%s: %w", o.phrase, err)
				}
				seeds, rights = append(seeds, root.Recovery()), append(rights, location.Recover)
			}
			var all []locationKey
			for i, s := range seeds {
				pin, err := location.PinOf(s)
				if err != nil {
					return err
				}
				all = append(all, locationKey{pin.String(), strings.Split(rights[i].String(), ",")})
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), all)
			}
			for _, k := range all {
				fmt.Fprintf(cmd.OutOrStdout(), "--allow %s:%s\n", k.Pin, strings.Join(k.Rights, ","))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.dir, "dir", "", storeDirUsage)
	cmd.Flags().StringVar(&o.phrase, "phrase-file", "", "`file` of the recovery phrase")
	return cmd
}

// locationSeen is what a location says of itself.
type locationSeen struct {
	URL    string           `json:"url"`
	Status *location.Status `json:"status,omitempty"`
	Error  string           `json:"error,omitempty"`
}

func (a *app) locationStatusCmd() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "status URL…", Short: "Ask locations what they keep for a store", Args: cobra.MinimumNArgs(1),
		Long:    "Asks each location, as the store's front end, what it keeps for the store. It believes what they say: holdfast store audit\ndoes not.",
		Example: "  holdfast location status --dir store holdfast-location://a.example:7000/PIN",
		RunE: func(cmd *cobra.Command, urls []string) error {
			if dir == "" {
				return wrong(cmd, errors.New("--dir is missing"))
			}
			var places []control.Place
			for _, u := range urls {
				// The farm of those that are pasted is of no interest here, and what it is called neither.
				p, err := control.ParseURL(strings.SplitN(u, ",", 2)[0])
				if err != nil {
					return wrong(cmd, fmt.Errorf("%s: %w", u, err))
				}
				places = append(places, p)
			}
			keys, err := store.LoadKeys(filepath.Join(dir, s3Keys))
			if err != nil {
				return err
			}
			cert, err := location.Certificate(keys.TLS())
			if err != nil {
				return err
			}
			var all []locationSeen
			for i, p := range places {
				seen := locationSeen{URL: urls[i]}
				c, err := location.NewClient(location.ClientConfig{Addr: p.Addr, Pin: p.Pin, Certificate: cert})
				if err != nil {
					return err
				}
				st, err := c.Status(cmd.Context())
				c.Close()
				if err == nil {
					seen.Status = &st
				} else if seen.Error = err.Error(); cmd.Context().Err() != nil {
					return cmd.Context().Err()
				}
				all = append(all, seen)
			}
			return a.showLocations(cmd.OutOrStdout(), all)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", storeDirUsage)
	return cmd
}

func (a *app) showLocations(out io.Writer, all []locationSeen) error {
	silent := 0
	rows := [][]string{{"LOCATION", "SHARDS", "BYTES", "HELD", "ROTTEN", "EPOCH", "LAST SCRUB"}}
	for _, l := range all {
		if l.Status == nil {
			silent++
			rows = append(rows, []string{l.URL, printable([]byte(l.Error))})
			continue
		}
		s, scrub := l.Status, "none since its start"
		if !s.Scrubbed.IsZero() {
			scrub = s.Scrubbed.UTC().Format("2006-01-02 15:04 MST")
		}
		rows = append(rows, []string{l.URL, fmt.Sprint(s.Shards), bytesOf(s.Bytes), fmt.Sprint(s.Held), fmt.Sprint(s.Rotten), fmt.Sprint(s.Epoch), scrub})
	}
	if a.json {
		if err := printJSON(out, all); err != nil {
			return err
		}
	} else {
		table(out, rows...)
	}
	if silent > 0 {
		return fmt.Errorf("%d of %d locations do not answer", silent, len(all))
	}
	return nil
}
