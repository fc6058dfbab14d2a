package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"holdfast/ca"
	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/control"
	"holdfast/store/s3"
)

// s3Options are the flags of run s3.
type s3Options struct {
	dir, listen, scheme, phrase, host string
	locations                         []string
	classes                           []string
	restore, degraded, acceptLoss     bool
	front                             bool
}

// Files of a store's directory.
const (
	s3Keys        = "keys"
	s3Credentials = "credentials.json"
	s3Front       = "front"
	s3Locations   = "locations"
)

func (a *app) s3Cmd() *cobra.Command {
	var o s3Options
	cmd := &cobra.Command{
		Use: "s3", Short: "Serve a dispersed store as S3", Args: asUsed,
		Long: "Serves S3 from a store whose data is encrypted and dispersed over locations: any k of n shards restore it. Without\n--location they are directories under --dir, of farms f1, f2 and so on: one disk, good for trying. --dir keeps the list of\nthe locations from the first start on, and holdfast location changes it while the store runs.\n\n" +
			"The first start makes the store's root key and shows its recovery phrase, 24 words, once: it alone restores the store when\n--dir is lost. The account that may do everything is in HOLDFAST_S3_ACCESS_KEY and HOLDFAST_S3_SECRET_KEY, or made and shown\nonce. On an address that is not loopback it speaks TLS under a CA of its own, in --dir/ca.",
		Example: "  holdfast run s3 --dir store --listen 127.0.0.1:9000 --scheme 4/6\n  holdfast run s3 --dir store --listen 127.0.0.1:9000 --phrase-file /secure/phrase\n  holdfast run s3 --dir store --listen :9000 --host s3.example --scheme 2/3 \\\n    --location holdfast-location://a.example:7000/PIN,farm=anna --location …",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				return err
			}
			if o.front {
				return runFront(cmd.Context(), os.Stdin, os.Stdout, os.NewFile(3, "listener"))
			}
			if o.dir == "" {
				return wrong(cmd, errors.New("--dir is missing"))
			}
			return a.runS3(cmd, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "", "`directory` of the store's keys, its database and, without --location, its locations")
	f.StringVar(&o.listen, "listen", "127.0.0.1:9000", "`address` to serve S3 on")
	f.StringVar(&o.scheme, "scheme", "4/6", "`k/n` of class STANDARD: any k of n shards restore an object")
	f.StringArrayVar(&o.classes, "class", nil, "another storage class, `NAME=k/n`")
	f.StringArrayVar(&o.locations, "location", nil, "`URL,farm=NAME` of a location, as run location prints it, or DIRECTORY,farm=NAME; once for each")
	f.StringVar(&o.phrase, "phrase-file", "", "`file` of the recovery phrase: read if it is there, written at the first start if not")
	f.BoolVar(&o.restore, "restore", false, "take over the store that the locations keep: needs its phrase")
	f.BoolVar(&o.acceptLoss, "accept-loss", false, "with --restore, start where the last writes may be lost")
	f.BoolVar(&o.degraded, "degraded-writes", false, "acknowledge writes that only k locations have")
	f.BoolVar(&o.front, "front", false, "serve the buckets of a contract, as a node asks on standard input")
	f.Lookup("front").Hidden = true
	f.StringVar(&o.host, "host", "", "`name` that clients know this server by, for its certificate (default the machine's)")
	return cmd
}

func (a *app) runS3(cmd *cobra.Command, o s3Options) (err error) {
	ctx := cmd.Context()
	scheme, classes, err := schemes(cmd, o)
	if err != nil {
		return err
	}
	places, err := parsePlaces(o.locations)
	if err != nil {
		return wrong(cmd, err)
	}
	host, _, err := net.SplitHostPort(o.listen)
	if err != nil {
		return wrong(cmd, fmt.Errorf("--listen: %w", err))
	}
	if err := firstPlacement(o.dir, scheme, classes, places); err != nil {
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
	keys, err := storeKeys(cmd, o)
	if err != nil {
		return err
	}
	access, secret, made, err := rootAccount(filepath.Join(o.dir, s3Credentials))
	if err != nil {
		return err
	}
	members, err := control.OpenMembers(control.MembersConfig{Dir: o.dir, Keys: keys, Log: logger()}, places, directories(scheme.N))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, members.Close()) }()
	st, err := store.Open(ctx, store.Config{
		Dir: filepath.Join(o.dir, s3Front), Keys: keys, Members: members.All(), Scheme: scheme, Classes: classes, Restore: o.restore, AcceptLoss: o.acceptLoss, DegradedWrites: o.degraded, Log: logger(),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	// The list is that of locations which have been a store's together.
	if err := members.Settle(st); err != nil {
		return err
	}
	seed := keys.TLS()
	seal, err := hkdf.Key(sha256.New, seed[:], nil, "holdfast store s3 users", 32)
	if err != nil {
		return err
	}
	eg, ctx := errgroup.WithContext(ctx)
	cfg := s3.Config{Store: st, Listen: o.listen, Access: access, Secret: secret, Seal: [32]byte(seal), Keep: held, Log: logger()}
	w := welcome{Endpoint: "http://" + o.listen, Access: access}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		name := o.host
		if name == "" {
			if name, err = os.Hostname(); err != nil {
				return err
			}
		}
		reload := make(chan struct{})
		c := certificate{dir: filepath.Join(o.dir, "ca"), host: name}
		if err := c.issue(); err != nil {
			return err
		}
		cfg.Certificate, cfg.Key = c.files()
		cfg.Reload = reload
		eg.Go(func() error { return c.renew(ctx, reload) })
		_, port, _ := net.SplitHostPort(o.listen)
		w.Endpoint, w.CA = "https://"+net.JoinHostPort(name, port), filepath.Join(c.dir, "ca.pem")
	}
	if made {
		w.Secret = secret
	}
	cfg.Ready = func() { a.welcomeS3(cmd.OutOrStdout(), w) }
	socket, err := control.Listen(o.dir, func(uid uint32) { logger().Warn("control: another user was refused", "uid", uid) })
	if err != nil {
		return err
	}
	defer socket.Close()
	cfg.Admin = func(admin *s3.Admin) {
		eg.Go(func() error {
			return control.Serve(ctx, control.Config{
				Listener: socket, Store: st, Members: members, Admin: admin, Scheme: scheme, Classes: classes, Log: logger(),
				Keys: func() (*store.Keys, error) { return store.LoadKeys(filepath.Join(o.dir, s3Keys)) },
			})
		})
	}
	eg.Go(func() error { return ended(ctx, st.Run(ctx)) })
	eg.Go(func() error { return ended(ctx, members.Run(ctx)) })
	eg.Go(func() error {
		if err := s3.Run(ctx, cfg); err != nil {
			return err
		}
		return ctx.Err() // ends the others
	})
	return ended(cmd.Context(), eg.Wait())
}

// firstPlacement refuses schemes that the named locations cannot bear, before a first start makes keys and shows a phrase. What a
// store has become since, the store knows.
func firstPlacement(dir string, scheme disperse.Scheme, classes map[string]disperse.Scheme, named []control.Place) error {
	if _, err := os.Lstat(filepath.Join(dir, s3Keys)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(named) == 0 {
		named = directories(scheme.N)
	}
	var members []store.Member
	for _, p := range named {
		members = append(members, store.Member{Farm: p.Farm})
	}
	if err := store.Placement(scheme, members); err != nil {
		return fmt.Errorf("--scheme: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(classes)) {
		if err := store.Placement(classes[name], members); err != nil {
			return fmt.Errorf("--class %s: %w", name, err)
		}
	}
	return nil
}

// schemes are those of class STANDARD and of the others.
func schemes(cmd *cobra.Command, o s3Options) (scheme disperse.Scheme, classes map[string]disperse.Scheme, err error) {
	if scheme, err = disperse.ParseScheme(o.scheme); err != nil {
		return scheme, nil, wrong(cmd, fmt.Errorf("--scheme: %w", err))
	}
	classes = map[string]disperse.Scheme{}
	for _, c := range o.classes {
		name, text, _ := strings.Cut(c, "=")
		if classes[name], err = disperse.ParseScheme(text); err != nil || name == "" {
			return scheme, nil, wrong(cmd, fmt.Errorf("--class %s: %w", c, cmp.Or(err, errors.New("it has no name"))))
		}
	}
	return scheme, classes, nil
}

// welcome is what is said when the server answers.
type welcome struct {
	Endpoint string `json:"endpoint"`
	Access   string `json:"access_key"`
	Secret   string `json:"secret_key,omitempty"` // only when it was made
	CA       string `json:"ca,omitempty"`
}

func (a *app) welcomeS3(out io.Writer, w welcome) {
	if a.json {
		printJSON(out, w)
		return
	}
	fmt.Fprintf(out, "s3 is at %s\n", w.Endpoint)
	if w.CA != "" {
		fmt.Fprintf(out, "clients trust it by %s\n", w.CA)
	}
	if w.Secret != "" {
		fmt.Fprintf(out, "access key  %s\nsecret key  %s\nThe secret key is shown this once; it is kept beside the store's keys.\n", w.Access, w.Secret)
	}
}

// storeKeys reads the front end's keys, or makes them from a phrase: the one in a file, or a new one.
func storeKeys(cmd *cobra.Command, o s3Options) (*store.Keys, error) {
	file := filepath.Join(o.dir, s3Keys)
	keys, err := store.LoadKeys(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return keys, err
	}
	root, err := storeRoot(cmd, o)
	if err != nil {
		return nil, err
	}
	if keys, err = root.Keys(0); err != nil {
		return nil, err
	}
	return keys, store.SaveKeys(file, keys)
}

func storeRoot(cmd *cobra.Command, o s3Options) (root store.Root, err error) {
	terminal := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd()))
	if o.phrase != "" {
		b, err := os.ReadFile(o.phrase)
		if err == nil {
			if root, err = store.ParsePhrase(string(b)); err != nil {
				return root, fmt.Errorf("%s: %w", o.phrase, err)
			}
			return root, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return root, err
		}
		if o.restore {
			return root, fmt.Errorf("restore: %w", err)
		}
		root = store.NewRoot()
		f, err := os.OpenFile(o.phrase, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return root, err
		}
		_, err = fmt.Fprintln(f, root.Phrase())
		if err := errors.Join(err, f.Sync(), f.Close(), store.SyncDir(filepath.Dir(o.phrase))); err != nil {
			return root, fmt.Errorf("write %s: %w", o.phrase, err)
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "The recovery phrase is in %s, and nowhere else: move it to where this machine's thief does not find it.\n", o.phrase)
		return root, nil
	}
	if !terminal {
		return root, errors.New("the first start shows the recovery phrase, or takes it, and there is no terminal: add --phrase-file FILE")
	}
	if o.restore {
		phrase, err := askSecret(cmd.Context(), "recovery phrase: ")
		if err != nil {
			return root, err
		}
		return store.ParsePhrase(phrase)
	}
	root = store.NewRoot()
	return root, askBack(cmd, strings.Fields(root.Phrase()))
}

// askBack shows a phrase and asks for two of its words, so that nobody passes over it.
func askBack(cmd *cobra.Command, words []string) error {
	out := cmd.ErrOrStderr()
	fmt.Fprint(out, "The store's recovery phrase. It is shown this once, and is all that restores the store when this directory is lost:\n\n")
	for i := range 6 {
		for j := range 4 {
			fmt.Fprintf(out, "  %2d %-9s", 4*i+j+1, words[4*i+j])
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintln(out)
	in := bufio.NewReader(os.Stdin)
	asked := -1
	for range 2 {
		i := asked
		for i == asked {
			n, err := rand.Int(rand.Reader, big.NewInt(int64(len(words))))
			if err != nil {
				return err
			}
			i = int(n.Int64())
		}
		asked = i
		for {
			fmt.Fprintf(out, "word %d: ", i+1)
			line, err := interruptible(cmd.Context(), func() (string, error) { return in.ReadString('\n') })
			if err != nil {
				return fmt.Errorf("the phrase was not confirmed, and nothing was made: %w", err)
			}
			if strings.EqualFold(strings.TrimSpace(line), words[i]) {
				break
			}
			fmt.Fprintln(out, "that is another word")
		}
	}
	// What was shown should not stay on the screen.
	fmt.Fprint(out, "\x1b[3J\x1b[H\x1b[2J")
	return nil
}

// rootAccount is the account that may do everything, from the environment, or from a file that is made.
func rootAccount(file string) (access, secret string, made bool, err error) {
	access, secret = os.Getenv("HOLDFAST_S3_ACCESS_KEY"), os.Getenv("HOLDFAST_S3_SECRET_KEY")
	if access != "" && secret != "" {
		return access, secret, false, nil
	}
	if access != "" || secret != "" {
		return "", "", false, errors.New("HOLDFAST_S3_ACCESS_KEY and HOLDFAST_S3_SECRET_KEY: set both or none")
	}
	var c struct {
		Access string `json:"access_key"`
		Secret string `json:"secret_key"`
	}
	err = readConfig(file, &c)
	if err == nil {
		st, err := os.Stat(file)
		if err == nil && st.Mode().Perm()&0o077 != 0 {
			err = fmt.Errorf("%s: others may read it, its mode is %v and not 0600", file, st.Mode().Perm())
		}
		return c.Access, c.Secret, false, err
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", "", false, err
	}
	var b [32]byte
	rand.Read(b[:])
	text := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:])
	c.Access, c.Secret = "HF"+text[:18], text[18:]+rand.Text()[:8]
	raw, err := json.Marshal(c)
	if err != nil {
		return "", "", false, err
	}
	return c.Access, c.Secret, true, writePrivate(file, append(raw, '\n'))
}

// writePrivate writes a file that its owner alone reads, whole or not at all.
func writePrivate(file string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return errors.Join(os.Rename(tmp.Name(), file), store.SyncDir(filepath.Dir(file)))
}

// directories are the locations of a store that has no others: one disk, a farm each.
func directories(n int) (all []control.Place) {
	for i := range n {
		farm := fmt.Sprintf("f%d", i+1)
		all = append(all, control.Place{Path: filepath.Join(s3Locations, farm), Farm: farm})
	}
	return all
}

// parsePlaces reads the values of --location. Directories are as they are seen from here.
func parsePlaces(all []string) ([]control.Place, error) {
	places := make([]control.Place, len(all))
	for i, l := range all {
		p, err := control.ParsePlace(l)
		if err == nil && p.Path != "" {
			p.Path, err = filepath.Abs(p.Path)
		}
		if err != nil {
			return nil, fmt.Errorf("--location %s: %w", l, err)
		}
		places[i] = p
	}
	return places, nil
}

// lockDir has a store's directory be used by one process.
func lockDir(dir string) (io.Closer, error) {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("%s is in use by another process: %w", dir, err)
	}
	return lock, nil
}

// certificate is the server's own, under a CA that speaks for its name alone.
type certificate struct{ dir, host string }

func (c certificate) files() (cert, key string) {
	return filepath.Join(c.dir, "s3.pem"), filepath.Join(c.dir, "s3.key")
}

func (c certificate) issue() error {
	authority, err := ca.Open(c.dir, []string{c.host}, time.Now())
	if err != nil {
		return err
	}
	chain, key, err := authority.Issue(c.host, time.Now())
	if err != nil {
		return err
	}
	var text bytes.Buffer
	for _, der := range chain {
		pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	certFile, keyFile := c.files()
	return errors.Join(writePrivate(certFile, text.Bytes()), writePrivate(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
}

// renew issues another every so often, and has it read.
func (c certificate) renew(ctx context.Context, reload chan<- struct{}) error {
	for {
		select {
		case <-time.After(ca.LeafValidity / 3):
			if err := c.issue(); err != nil {
				logger().Error("renew the certificate", "error", err)
				continue
			}
			select {
			case reload <- struct{}{}:
			case <-ctx.Done():
			}
		case <-ctx.Done():
			return nil
		}
	}
}
