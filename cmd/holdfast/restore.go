package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/control"
	"holdfast/store/location"
	"holdfast/store/s3"
)

func (a *app) restoreCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "restore", Short: "Bring back what was lost, from its phrase"})
	cmd.AddCommand(a.restoreStoreCmd())
	return cmd
}

func (a *app) restoreStoreCmd() *cobra.Command {
	var o s3Options
	var undo undoOptions
	cmd := &cobra.Command{
		Use: "store", Short: "Bring back a dispersed store from its phrase and its locations", Args: asUsed,
		Long: "Makes the directory of a front end anew that was lost, from the recovery phrase and the addresses of the store's\nlocations: its keys, its metadata, the list of its locations and the queue of repairs. Whatever was acknowledged is there\nwhen at least k locations have kept it. Give all locations that there are; those that do not answer may be missing.\n\n" +
			"From then on the locations refuse the front end that had the store before.\n\n" +
			"--since undoes what a thief of the front end's keys deleted at the locations since a time: they hold it for 24 hours, and\ngive it back to the key of the phrase. He may have written a log of his own too: --before\ntakes the one that was before his. What others deleted meanwhile comes back as well.",
		Example: "  holdfast restore store --dir new --phrase-file /secure/phrase --scheme 2/3 \\\n    --location holdfast-location://a.example:7000/PIN,farm=anna --location …\n  holdfast restore store --dir new --location /old/locations/f1,farm=f1 --location …\n  holdfast restore store --dir new --since 3h --location …\n  holdfast restore store --dir new --since 2026-11-26T08:00:00Z --before 4 --location …",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				return err
			}
			switch {
			case o.dir == "":
				return wrong(cmd, errors.New("--dir is missing"))
			case len(o.locations) == 0:
				return wrong(cmd, errors.New("--location is missing: the store is at its locations"))
			case undo.before > 0 && undo.since.IsZero():
				return wrong(cmd, errors.New("--before needs --since: what was deleted since then has to come back too"))
			}
			return a.restoreStore(cmd, o, undo)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "", "new `directory` for the front end")
	f.StringVar(&o.phrase, "phrase-file", "", phraseUsage)
	f.StringArrayVar(&o.locations, "location", nil, "`URL,farm=NAME` of a location, or DIRECTORY,farm=NAME; once for each")
	f.StringVar(&o.scheme, "scheme", "4/6", "`k/n` of class STANDARD, as run s3 had it")
	f.StringArrayVar(&o.classes, "class", nil, "another storage class, `NAME=k/n`, as run s3 had it")
	f.BoolVar(&o.acceptLoss, "accept-loss", false, "go on where the last writes may be lost")
	f.Var(&undo.since, "since", sinceUsage)
	f.Uint64Var(&undo.before, "before", 0, "with --since, take the log that the front ends before this `number` left")
	return cmd
}

// undoOptions say what of a store's last day is undone.
type undoOptions struct {
	since  moment
	before uint64
}

// held is how long locations hold deletes, and how long a server of ours keeps what was deleted by S3.
const held = 24 * time.Hour

const sinceUsage = "undo what was deleted since a `time`: 3h for three hours ago, or 2026-11-26T08:00:00Z"

// moment is a flag's time in the past.
type moment struct{ time.Time }

func (m *moment) Set(text string) (err error) {
	if d, err := time.ParseDuration(text); err == nil {
		m.Time = time.Now().Add(-d)
	} else if m.Time, err = time.Parse(time.RFC3339, text); err != nil {
		return errors.New("it is neither a duration such as 3h nor a time such as 2026-11-26T08:00:00Z")
	}
	switch ago := time.Since(m.Time); {
	case ago < 0:
		return errors.New("it has not come yet")
	case ago > held:
		return fmt.Errorf("it is more than %v hours ago: what was deleted then is removed by now", held.Hours())
	}
	return nil
}

func (m *moment) Type() string { return "time" }

func (m *moment) String() string {
	if m.IsZero() {
		return ""
	}
	return stamp(m.Time)
}

// stamp is a time as commands show it, and take it.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// restoredStore is what was found.
type restoredStore struct {
	Dir       string             `json:"dir"`
	Epoch     uint64             `json:"epoch"`     // of the front end that restored it
	From      uint64             `json:"from"`      // of the one whose head was taken
	Block     uint64             `json:"block"`     // the log ends with it
	Snapshot  uint64             `json:"snapshot"`  // the block that the snapshot covers
	Replayed  uint64             `json:"replayed"`  // blocks behind it
	Dropped   bool               `json:"dropped"`   // a last block that nobody was told is durable
	KeyEpoch  store.KeyEpoch     `json:"key_epoch"` // of the store's keys
	Segments  int64              `json:"segments"`
	Bytes     int64              `json:"bytes"`
	Degraded  int64              `json:"degraded"`
	Lost      int64              `json:"lost"`
	Queue     int64              `json:"queue"`
	Undone    *undone            `json:"undone,omitempty"`
	Locations []restoredLocation `json:"locations"`
	Next      string             `json:"next"`
}

// undone is what --since brought back.
type undone struct {
	Since  time.Time `json:"since"`
	Before uint64    `json:"before,omitempty"` // front ends from this one on are left out
	Shards int       `json:"shards"`
	Failed []string  `json:"failed,omitempty"` // locations that gave nothing back, and why
	s3.Undeleted
}

type restoredLocation struct {
	Farm  string `json:"farm"`
	At    string `json:"at,omitempty"`
	State string `json:"state"` // or what is wrong with it
}

func (a *app) restoreStore(cmd *cobra.Command, o s3Options, u undoOptions) (err error) {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	scheme, classes, err := schemes(cmd, o)
	if err != nil {
		return err
	}
	places, err := parsePlaces(o.locations)
	if err != nil {
		return wrong(cmd, err)
	}
	keyFile := filepath.Join(o.dir, s3Keys)
	if _, err := os.Stat(keyFile); err == nil {
		return fmt.Errorf("there is a store in %s already: restore into a new directory, or start this one with holdfast run s3 --dir %[1]s", o.dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	root, err := readPhrase(ctx, o.phrase)
	if err != nil {
		return err
	}
	keys, err := root.Keys(0)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	lock, err := lockDir(o.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	members, err := control.OpenMembers(control.MembersConfig{Dir: o.dir, Keys: keys, Log: logger()}, places, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, members.Close()) }()
	p := newProgress(cmd.ErrOrStderr())
	defer p.done()
	silent, err := ask(ctx, p, members.All(), places)
	if err != nil {
		return err
	}
	var back *undone
	if !u.since.IsZero() {
		if back, err = undo(ctx, p, members, keys, root, u, cmd.ErrOrStderr()); err != nil {
			return err
		}
	}
	begin, last := time.Now(), time.Time{}
	st, err := store.Open(ctx, store.Config{
		Dir: filepath.Join(o.dir, s3Front), Keys: keys, Members: members.All(), Scheme: scheme, Classes: classes, Restore: true, Before: location.Epoch(u.before), AcceptLoss: o.acceptLoss, Fragile: true, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
		Replaying: func(what string, done, of int) {
			if p.tty != nil && time.Since(begin) > 2*time.Second && (time.Since(last) > 200*time.Millisecond || done == of) {
				last = time.Now()
				p.say("read %s %d of %d", what, done, of)
			}
		},
	})
	p.done()
	if err != nil {
		return restoreAdvice(err, silent, len(places))
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if back != nil {
		if back.Undeleted, err = s3.Undelete(ctx, st, u.since.Time); err != nil {
			return err
		}
	}
	// Heads do not say which shards of the last blocks have arrived: a round of repair finds out.
	if _, err := st.RepairAt(ctx, 0, nil); err != nil {
		return err
	}
	status, err := st.Status(ctx)
	if err != nil {
		return err
	}
	r := st.Recovery()
	got := restoredStore{
		Dir: o.dir, Epoch: uint64(r.Epoch), From: uint64(r.From), Block: r.Block, Snapshot: r.Snapshot, Replayed: r.Replayed, Dropped: r.Dropped, KeyEpoch: st.Keys().Epoch,
		Segments: status.Segments + status.Blocks, Bytes: status.Bytes, Degraded: status.Degraded, Lost: status.Lost, Queue: status.Queue, Undone: back,
		Next: fmt.Sprintf("holdfast run s3 --dir %s --scheme %v", o.dir, scheme),
	}
	for _, c := range o.classes {
		got.Next += " --class " + c
	}
	at := map[disperse.Place]string{}
	for _, p := range places {
		at[p.ID()] = p.URL()
	}
	for _, m := range status.Members {
		l := restoredLocation{m.Farm, at[m.ID], m.State.String()}
		switch {
		case m.State == store.Removed:
			continue
		case !m.Known:
			l.State += ", not named"
		case slices.Contains(r.Silent, m.ID):
			l.State += ", silent"
		case slices.Contains(r.Forged, m.ID):
			l.State += ", its log is not this store's"
		case slices.Contains(r.Rolled, m.ID):
			l.State += ", it went back in time"
		}
		got.Locations = append(got.Locations, l)
	}
	// The keys come last: with them the directory is a store.
	if err := errors.Join(members.Settle(st), store.SaveKeys(keyFile, st.Keys())); err != nil {
		return err
	}
	if a.json {
		return printJSON(out, got)
	}
	fmt.Fprintf(out, "the store is restored in %s: %s in %s and blocks\n", o.dir, bytesOf(got.Bytes), some(got.Segments, "segment"))
	fmt.Fprintf(out, "its log ends with block %d of front end %d; %s read", got.Block, got.From, some(got.Replayed, "block"))
	if got.Snapshot > 0 {
		fmt.Fprintf(out, ", and a snapshot of block %d", got.Snapshot)
	}
	fmt.Fprintln(out)
	if back != nil {
		fmt.Fprintf(out, "%d shards are back that were deleted since %s\n", back.Shards, stamp(back.Since))
		for _, f := range back.Failed {
			fmt.Fprintf(out, "not those of %s\n", printable([]byte(f)))
		}
		showUndeleted(out, back.Undeleted)
	}
	if got.Dropped {
		fmt.Fprintln(out, "one block more was begun, and nobody was told that it is durable: it is left out")
	}
	rows := [][]string{{"FARM", "STATE", "WHERE"}}
	unnamed := false
	for _, l := range got.Locations {
		unnamed = unnamed || l.At == ""
		rows = append(rows, []string{l.Farm, l.State, l.At})
	}
	table(out, rows...)
	if got.Degraded > 0 {
		fmt.Fprintf(out, "%s degraded, in the queue of repairs\n", some(got.Degraded, "segment"))
	}
	if unnamed {
		fmt.Fprintln(out, "the store has locations that were not named: holdfast location add tells it where they are, or drain and remove them")
	}
	for used := range status.Durable {
		if used != scheme && !slices.Contains(slices.Collect(maps.Values(classes)), used) {
			fmt.Fprintf(out, "there are segments of scheme %v, which neither --scheme nor --class names\n", used)
		}
	}
	fmt.Fprintf(out, "start it with %s\n", got.Next)
	if got.Lost > 0 {
		return lostError(got.Lost)
	}
	return nil
}

// undo has locations give back what was deleted. Which log is taken afterwards is for the user to say where there is a choice:
// one that began lately is a thief's, or that of a front end that was started again.
func undo(ctx context.Context, p *progress, members *control.Members, keys *store.Keys, root store.Root, u undoOptions, w io.Writer) (*undone, error) {
	ends, err := store.Ends(ctx, keys, members.All())
	if err != nil && !errors.Is(err, store.ErrNoStore) { // of which the restore says more
		return nil, err
	}
	if u.before == 0 && len(ends) > 1 && (ends[0].Wrote.IsZero() || !ends[0].Wrote.Before(u.since.Time)) {
		p.done()
		rows := [][]string{{"FRONT END", "WROTE LAST", "BLOCK", "LOCATIONS"}}
		for _, e := range ends {
			wrote := "–"
			if !e.Wrote.IsZero() {
				wrote = stamp(e.Wrote)
			}
			rows = append(rows, []string{fmt.Sprint(e.Epoch), wrote, fmt.Sprint(e.Block), fmt.Sprint(e.Locations)})
		}
		table(w, rows...)
		return nil, fmt.Errorf("%d front ends wrote the log lately, and a thief of the keys may be one: add --before NUMBER of his first; --before %d takes what the last one left", len(ends), ends[0].Epoch+1)
	}
	said := time.Time{}
	all, err := members.Undelete(ctx, root.Recovery(), u.since.Time, func(n int) {
		if p.tty != nil && time.Since(said) > 200*time.Millisecond {
			said = time.Now()
			p.say("%d shards are back", n)
		}
	})
	if err != nil {
		return nil, err
	}
	back := &undone{Since: u.since.Time, Before: u.before}
	for _, l := range all {
		back.Shards += l.N
		if l.Err == nil {
			continue
		}
		why := l.Err.Error()
		if strings.Contains(why, "tls: ") || strings.Contains(why, "EOF") {
			why += ": it does not allow the phrase's key, which holdfast location pin --phrase-file prints"
		}
		back.Failed = append(back.Failed, l.Place.Farm+": "+why)
	}
	p.say("%d shards are back", back.Shards)
	if len(back.Failed) == len(all) {
		return nil, fmt.Errorf("no location gave back what was deleted since %s\n  %s", stamp(u.since.Time), strings.Join(back.Failed, "\n  "))
	}
	return back, nil
}

// ask finds out who answers, before anything is changed anywhere.
func ask(ctx context.Context, p *progress, members []store.Member, places []control.Place) (silent []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	why := make([]error, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() { _, why[i] = m.Location.Status(ctx) })
	}
	wg.Wait()
	refused := 0
	for i, err := range why {
		if err == nil {
			continue
		}
		silent = append(silent, fmt.Sprintf("  %s %s: %v", places[i].Farm, places[i].URL(), err))
		if strings.Contains(err.Error(), "tls: ") || strings.Contains(err.Error(), "EOF") {
			refused++
		}
	}
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return nil, ctx.Err()
	}
	switch {
	case refused == len(members):
		return nil, fmt.Errorf("no location knows the key of this phrase: it is another store's, or they are not told to allow it\n%s", strings.Join(silent, "\n"))
	case len(silent) == len(members):
		return nil, fmt.Errorf("no location answers\n%s", strings.Join(silent, "\n"))
	}
	p.say("%d of %d locations answer", len(members)-len(silent), len(members))
	return silent, nil
}

// restoreAdvice says what a restore that failed lacks.
func restoreAdvice(err error, silent []string, all int) error {
	var advice string
	switch {
	case errors.Is(err, store.ErrRollback):
		advice = "locations that had the last writes are silent or went back in time: wait for them, or give --accept-loss and lose what only they have"
	case errors.Is(err, store.ErrBusy):
		advice = fmt.Sprintf("%d of %d locations do not answer; name others, or wait for these", len(silent), all)
	case errors.Is(err, store.ErrKeys):
		advice = "check that phrase and locations are of one store"
	case errors.Is(err, store.ErrNoStore):
		advice = "the locations know the key, and have no log of a store: are these all of them?"
	default:
		return err
	}
	for _, s := range silent {
		advice += "\n" + s
	}
	return fmt.Errorf("%w\n%s", err, advice)
}
