package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"filippo.io/age"
)

// ErrPassphrase is returned for a key file that is sealed and no passphrase, or a wrong one, was given.
var ErrPassphrase = errors.New("key file is sealed with a passphrase")

const maxKeyFile = 1 << 16

// KeyFile is what a user's key file keeps: the device's seed and, on the devices that hold it, the account's root.
type KeyFile struct {
	Device [SeedSize]byte // seed of the device's hybrid key
	Root   [SeedSize]byte // root secret of the account: the HPKE key and the keys of stored blobs derive from it
}

type keyFileJSON struct {
	Version int    `json:"holdfast_key"`
	Device  string `json:"device"`
	Root    string `json:"root"`
}

// DeviceKey is the device's signing key.
func (f *KeyFile) DeviceKey() *PrivateKey { return NewKey(f.Device) }

// OpeningKey is the account's HPKE key.
func (f *KeyFile) OpeningKey() (*OpeningKey, error) {
	return NewOpeningKey([32]byte(Derive(f.Root[:], "holdfast/account/hpke/v1")))
}

// BlobSecret is the secret from which the keys of the account's sealed blobs derive.
func (f *KeyFile) BlobSecret() [32]byte {
	return [32]byte(Derive(f.Root[:], "holdfast/account/blobs/v1"))
}

// StoreRoot is the root of one of the account's dispersed stores, which an ID names.
func (f *KeyFile) StoreRoot(id [32]byte) [32]byte {
	return [32]byte(Derive(f.Root[:], "holdfast/account/store/v1"+string(id[:])))
}

// WriteKeyFile writes f to path, readable by its owner only, and refuses to replace a file that exists. With a
// passphrase the file is sealed by age (scrypt).
func WriteKeyFile(path string, f *KeyFile, passphrase string) error {
	b, err := json.Marshal(keyFileJSON{1, base64.StdEncoding.EncodeToString(f.Device[:]), base64.StdEncoding.EncodeToString(f.Root[:])})
	if err != nil {
		return fmt.Errorf("encode key file: %w", err)
	}
	if passphrase != "" {
		r, err := age.NewScryptRecipient(passphrase)
		if err != nil {
			return fmt.Errorf("seal key file: %w", err)
		}
		var buf bytes.Buffer
		w, err := age.Encrypt(&buf, r)
		if err != nil {
			return fmt.Errorf("seal key file: %w", err)
		}
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("seal key file: %w", err)
		}
		if err := w.Close(); err != nil {
			return fmt.Errorf("seal key file: %w", err)
		}
		b = buf.Bytes()
	}
	// Written beside its place and linked into it: a crash leaves the whole file or none, and link refuses to replace.
	tmp, err := os.CreateTemp(filepath.Dir(path), ".key-*")
	if err != nil {
		return fmt.Errorf("write key file %s: %w", path, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Link(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write key file %s: %w", path, err)
	}
	return nil
}

// ReadKeyFile reads a file that WriteKeyFile wrote. A file that others can read is refused: whoever could read it once
// may have its key.
func ReadKeyFile(path, passphrase string) (*KeyFile, error) {
	fh, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	defer fh.Close()
	if st, err := fh.Stat(); err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	} else if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s can be read by others (mode %#o): run chmod 600 on it, and consider the key known", path, st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(fh, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("read key file %s: %w", path, err)
	}
	if bytes.HasPrefix(b, []byte("age-encryption.org/")) {
		if passphrase == "" {
			return nil, fmt.Errorf("read key file %s: %w", path, ErrPassphrase)
		}
		id, err := age.NewScryptIdentity(passphrase)
		if err != nil {
			return nil, fmt.Errorf("open key file %s: %w", path, err)
		}
		r, err := age.Decrypt(bytes.NewReader(b), id)
		if err != nil {
			return nil, fmt.Errorf("open key file %s: %w: %w", path, ErrPassphrase, err)
		}
		if b, err = io.ReadAll(io.LimitReader(r, maxKeyFile)); err != nil {
			return nil, fmt.Errorf("open key file %s: %w", path, err)
		}
	}
	return parseKeyFile(b)
}

func parseKeyFile(b []byte) (*KeyFile, error) {
	var j keyFileJSON
	if err := json.Unmarshal(b, &j); err != nil || j.Version != 1 {
		return nil, errors.New("not a holdfast key file of version 1")
	}
	var f KeyFile
	for _, p := range []struct {
		dst  *[SeedSize]byte
		text string
	}{{&f.Device, j.Device}, {&f.Root, j.Root}} {
		raw, err := base64.StdEncoding.DecodeString(p.text)
		if err != nil || len(raw) != SeedSize {
			return nil, errors.New("key file holds a seed that is not 32 bytes")
		}
		copy(p.dst[:], raw)
	}
	return &f, nil
}
