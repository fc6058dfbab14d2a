package store

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tyler-smith/go-bip39"

	"holdfast/disperse"
	"holdfast/store/location"
)

// ErrPhrase is returned for words that are no phrase.
var ErrPhrase = errors.New("not a recovery phrase")

// A Root is what everything of a store derives from. It is never on the front end's disk: who restores brings it along, as
// a phrase of 24 words.
type Root [32]byte

// NewRoot draws one.
func NewRoot() (r Root) {
	rand.Read(r[:])
	return r
}

// Phrase is the root as 24 words of BIP39.
func (r Root) Phrase() string {
	words, err := bip39.NewMnemonic(r[:])
	if err != nil {
		panic(err) // of 32 bytes there always is one
	}
	return words
}

// ParsePhrase reads words that Phrase gave. Case and space do not matter. Its errors tell places, never words.
func ParsePhrase(phrase string) (r Root, err error) {
	words := strings.Fields(strings.ToLower(phrase))
	if len(words) != 24 {
		return r, fmt.Errorf("%d words, not 24: %w", len(words), ErrPhrase)
	}
	for i, w := range words {
		if _, ok := bip39.GetWordIndex(w); !ok {
			return r, fmt.Errorf("word %d is not in the list: %w", i+1, ErrPhrase)
		}
	}
	b, err := bip39.EntropyFromMnemonic(strings.Join(words, " "))
	if err != nil || len(b) != len(r) {
		return r, fmt.Errorf("the words do not belong together, one is wrong or in the wrong place: %w", ErrPhrase)
	}
	return Root(b), nil
}

// Format prints no secret, whatever the verb.
func (r Root) Format(f fmt.State, _ rune) { fmt.Fprint(f, "[root]") }

// LogValue implements slog.LogValuer.
func (r Root) LogValue() slog.Value { return slog.StringValue("[root]") }

// Labels of what derives from a root.
const (
	labelStore    = "holdfast store key "
	labelShards   = "holdfast store shard mac"
	labelHeads    = "holdfast store head mac"
	labelFrontEnd = "holdfast store front end tls"
	labelRecovery = "holdfast store recovery tls"
)

func (r Root) derive(label string) (k [32]byte) {
	b, err := hkdf.Key(sha256.New, r[:], nil, label, len(k))
	if err != nil {
		panic(err) // 32 bytes can always be had
	}
	return [32]byte(b)
}

// Recovery is the seed of the key that may undelete and purge at locations. The front end does not keep it.
func (r Root) Recovery() location.Seed { return r.derive(labelRecovery) }

// KeyEpoch numbers a store's keys. Rotating them begins a new one.
type KeyEpoch uint32

// Keys is what a front end keeps on its disk: enough to run the store, and not the root. Who steals it reads what he can
// reach and deletes, but neither purges nor brings back what the holder of the phrase takes from him.
type Keys struct {
	// Epoch is of the key that new segments are sealed under. Those of earlier ones are kept until nothing needs them.
	Epoch  KeyEpoch
	stores map[KeyEpoch]disperse.Key
	shards disperse.Key
	heads  [32]byte
	tls    location.Seed
	root   *Root // nil in those that come from a file
}

// Keys derives a front end's keys, those of every epoch up to e among them.
func (r Root) Keys(e KeyEpoch) (*Keys, error) {
	if e > maxKeyEpoch {
		return nil, fmt.Errorf("derive keys of epoch %d: at most %d", e, maxKeyEpoch)
	}
	k := &Keys{Epoch: e, stores: map[KeyEpoch]disperse.Key{}, shards: r.derive(labelShards), heads: r.derive(labelHeads), tls: r.derive(labelFrontEnd), root: &r}
	for i := range e + 1 {
		k.stores[i] = r.derive(fmt.Sprintf("%s%d", labelStore, i))
	}
	return k, nil
}

// raise makes the keys those of a later epoch. Who has the phrase at hand can, who has the file cannot.
func (k *Keys) raise(e KeyEpoch) (*Keys, error) {
	if k.root == nil {
		return nil, fmt.Errorf("the store has keys of epoch %d, the file those up to %d: the phrase derives them", e, k.Epoch)
	}
	return k.root.Keys(e)
}

// TLS is the seed of the front end's key, which locations know by its pin.
func (k *Keys) TLS() location.Seed { return k.tls }

// Format prints no secret, whatever the verb.
func (k *Keys) Format(f fmt.State, _ rune) { fmt.Fprint(f, "[keys]") }

// LogValue implements slog.LogValuer.
func (k *Keys) LogValue() slog.Value { return slog.StringValue("[keys]") }

// store is the key of an epoch.
func (k *Keys) store(e KeyEpoch) (*disperse.Key, error) {
	key, ok := k.stores[e]
	if !ok {
		return nil, fmt.Errorf("no key of epoch %d is here: the phrase derives it", e)
	}
	return &key, nil
}

const (
	keysMagic   = "holdfast keys\x001\n"
	maxKeyEpoch = 1 << 10
)

func (k *Keys) marshal() []byte {
	b := []byte(keysMagic)
	b = append(b, k.shards[:]...)
	b = append(b, k.heads[:]...)
	b = append(b, k.tls[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(k.Epoch))
	epochs := make([]KeyEpoch, 0, len(k.stores))
	for e := range k.stores {
		epochs = append(epochs, e)
	}
	slices.Sort(epochs)
	for _, e := range epochs {
		key := k.stores[e]
		b = append(binary.BigEndian.AppendUint32(b, uint32(e)), key[:]...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func parseKeys(b []byte) (*Keys, error) {
	const each = 4 + 32
	fixed := len(keysMagic) + 3*32 + 4
	n := len(b) - fixed - 32
	if n < each || n%each != 0 || n/each > maxKeyEpoch+1 || string(b[:len(keysMagic)]) != keysMagic {
		return nil, errors.New("not a file of keys")
	}
	if b, sum := b[:len(b)-32], [32]byte(b[len(b)-32:]); sha256.Sum256(b) != sum {
		return nil, errors.New("the file of keys is damaged")
	}
	k := &Keys{stores: map[KeyEpoch]disperse.Key{}}
	p := b[len(keysMagic):]
	k.shards, k.heads, k.tls = disperse.Key(p[:32]), [32]byte(p[32:64]), location.Seed(p[64:96])
	k.Epoch = KeyEpoch(binary.BigEndian.Uint32(p[96:]))
	for p = p[100 : len(p)-32]; len(p) > 0; p = p[each:] {
		k.stores[KeyEpoch(binary.BigEndian.Uint32(p))] = disperse.Key(p[4:each])
	}
	if _, ok := k.stores[k.Epoch]; !ok {
		return nil, errors.New("the file of keys lacks that of its epoch")
	}
	return k, nil
}

// SaveKeys writes a front end's keys to a file that only its owner reads, whole or not at all.
func SaveKeys(file string, k *Keys) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".keys-*") // 0600
	if err != nil {
		return fmt.Errorf("save keys: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(k.marshal())
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("save keys %s: %w", file, err)
	}
	if err := errors.Join(os.Rename(f.Name(), file), SyncDir(filepath.Dir(file))); err != nil {
		return fmt.Errorf("save keys %s: %w", file, err)
	}
	return nil
}

// LoadKeys reads what SaveKeys wrote. A file that others may read is refused.
func LoadKeys(file string) (*Keys, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("load keys: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("load keys %s: others may read it, its mode is %v and not 0600", file, st.Mode().Perm())
	}
	if st.Size() > 1<<20 {
		return nil, fmt.Errorf("load keys %s: %w", file, fs.ErrInvalid)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("load keys: %w", err)
	}
	k, err := parseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("load keys %s: %w", file, err)
	}
	return k, nil
}
