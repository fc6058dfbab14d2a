package contract

import (
	"bytes"
	"fmt"
	"testing"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// Validators decode and validate each header that comes in, also those of strangers.
func BenchmarkDecodeHeader(b *testing.B) {
	h, _, _ := vectorContract()
	large := *h
	large.Services, large.Volumes, large.Routes = nil, nil, nil
	for i := range MaxServices {
		large.Services = append(large.Services, Service{Name: fmt.Sprintf("s%02d", i), Replicas: 2, CPUMilli: 1, Memory: MinMemory, Pids: 1, Networks: large.Networks})
	}
	for name, raw := range map[string][]byte{"two services": h.Encode(), "64 services": large.Encode()} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(raw)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := DecodeHeader(raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRevisionID(b *testing.B) {
	h, _, _ := vectorContract()
	for b.Loop() {
		h.RevisionID()
	}
}

// Nodes open a body once a revision; a body of 4 MiB holds large files.
func BenchmarkBody(b *testing.B) {
	for name, size := range map[string]int{"small": 0, "4 MiB": 4 << 20} {
		h, k, body := vectorContract()
		body.Services[1].Files[0].Data = bytes.Repeat([]byte("x"), size)
		sealed, err := Seal(h, k, body)
		if err != nil {
			b.Fatal(err)
		}
		b.Run("seal "+name, func(b *testing.B) {
			b.SetBytes(int64(len(sealed)))
			for b.Loop() {
				if _, err := Seal(h, k, body); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("open "+name, func(b *testing.B) {
			b.SetBytes(int64(len(sealed)))
			for b.Loop() {
				if _, err := Open(h, k, sealed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A signer seals one for every eligible node.
func BenchmarkEnvelope(b *testing.B) {
	_, k, _ := vectorContract()
	key, err := identity.NewOpeningKey([32]byte{1})
	if err != nil {
		b.Fatal(err)
	}
	pub := key.Public()
	e, err := SealEnvelope(RevisionID{}, RecipientNode, [32]byte{}, &pub, k)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			if _, err := SealEnvelope(RevisionID{}, RecipientNode, [32]byte{}, &pub, k); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := e.Open(key); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encode keys", func(b *testing.B) {
		for b.Loop() {
			canonical.Encode(k)
		}
	})
}

func BenchmarkLoad(b *testing.B) {
	path := project(b, planned, nil)
	for b.Loop() {
		if _, err := Load(b.Context(), Input{Path: path, Env: map[string]string{"FROM_USER": "u"}}); err != nil {
			b.Fatal(err)
		}
	}
}
