package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"golang.org/x/crypto/cryptobyte"
)

// Limits of the format. docs/formats/tunnel.md is their authority.
const (
	headerVersion  = 1
	maxHeader      = 1 + 1 + maxHost + 1 + 16 + 2 + 32 + 8
	maxClaims      = 4096
	maxMessage     = 1 + 8 + 2 + maxClaims*(1+maxHost+32+8)
	messageClaims  = 1
	messageVerdict = 2
)

// A streamHeader is the payload of an open frame: whom the client asked for, who he is, and which workload in which epoch
// the Edge chose.
type streamHeader struct {
	claim  Claim
	client netip.AddrPort
}

func (h streamHeader) encode() ([]byte, error) {
	if normalHost(h.claim.Host) != h.claim.Host {
		return nil, fmt.Errorf("encode stream header: bad host %q", h.claim.Host)
	}
	if !h.client.IsValid() || h.client.Addr().Zone() != "" {
		return nil, fmt.Errorf("encode stream header: bad client address %v", h.client)
	}
	b := make([]byte, 0, maxHeader)
	b = append(b, headerVersion, byte(len(h.claim.Host)))
	b = append(b, h.claim.Host...)
	addr := h.client.Addr().Unmap().AsSlice()
	b = append(b, byte(len(addr)))
	b = append(b, addr...)
	b = binary.BigEndian.AppendUint16(b, h.client.Port())
	b = append(b, h.claim.Workload[:]...)
	return binary.BigEndian.AppendUint64(b, h.claim.Epoch), nil
}

func decodeHeader(b []byte) (streamHeader, error) {
	var (
		h       streamHeader
		s       = cryptobyte.String(b)
		version uint8
		addr    cryptobyte.String
		port    uint16
	)
	if len(b) > maxHeader || !s.ReadUint8(&version) {
		return h, errors.New("decode stream header: bad length")
	}
	if version != headerVersion {
		return h, fmt.Errorf("decode stream header: version %d is not known", version)
	}
	host, ok := readHost(&s)
	if !ok {
		return h, errors.New("decode stream header: bad host")
	}
	h.claim.Host = host
	if !s.ReadUint8LengthPrefixed(&addr) || !s.ReadUint16(&port) {
		return h, errors.New("decode stream header: bad client address")
	}
	ip, ok := netip.AddrFromSlice(addr)
	if !ok || ip.Is4In6() {
		return h, errors.New("decode stream header: bad client address")
	}
	h.client = netip.AddrPortFrom(ip, port)
	if !s.CopyBytes(h.claim.Workload[:]) || !s.ReadUint64(&h.claim.Epoch) || !s.Empty() {
		return h, errors.New("decode stream header: bad length")
	}
	return h, nil
}

// readHost reads a host name and accepts only its normal form, so that no two byte strings mean one host.
func readHost(s *cryptobyte.String) (string, bool) {
	var host cryptobyte.String
	if !s.ReadUint8LengthPrefixed(&host) {
		return "", false
	}
	name := string(host)
	return name, name != "" && normalHost(name) == name
}

// A claimList is what an Origin says it serves. The serial only grows in a tunnel; verdicts repeat it.
type claimList struct {
	serial uint64
	claims []Claim
}

func (l claimList) encode() ([]byte, error) {
	if len(l.claims) > maxClaims {
		return nil, fmt.Errorf("encode claims: %d exceed %d", len(l.claims), maxClaims)
	}
	b := []byte{messageClaims}
	b = binary.BigEndian.AppendUint64(b, l.serial)
	b = binary.BigEndian.AppendUint16(b, uint16(len(l.claims)))
	for _, c := range l.claims {
		if normalHost(c.Host) != c.Host {
			return nil, fmt.Errorf("encode claims: bad host %q", c.Host)
		}
		b = append(b, byte(len(c.Host)))
		b = append(b, c.Host...)
		b = append(b, c.Workload[:]...)
		b = binary.BigEndian.AppendUint64(b, c.Epoch)
	}
	return b, nil
}

func decodeClaims(b []byte) (claimList, error) {
	var (
		l     claimList
		s     = cryptobyte.String(b)
		kind  uint8
		count uint16
	)
	if !s.ReadUint8(&kind) || kind != messageClaims || !s.ReadUint64(&l.serial) || !s.ReadUint16(&count) || count > maxClaims {
		return claimList{}, errors.New("decode claims: bad start")
	}
	for i := range int(count) {
		host, ok := readHost(&s)
		c := Claim{Host: host}
		if !ok || !s.CopyBytes(c.Workload[:]) || !s.ReadUint64(&c.Epoch) {
			return claimList{}, fmt.Errorf("decode claims: bad claim %d", i)
		}
		l.claims = append(l.claims, c)
	}
	if !s.Empty() {
		return claimList{}, errors.New("decode claims: bytes left over")
	}
	return l, nil
}

// A reason says why an Edge refuses a claim.
type reason uint8

const (
	reasonNone reason = iota
	reasonHost
	reasonNode
	reasonEpoch
	reasonTwice
	reasonLimit
)

func (r reason) String() string {
	switch r {
	case reasonHost:
		return "the ledger has no route for this host"
	case reasonNode:
		return "the ledger does not assign this workload to this node for this host"
	case reasonEpoch:
		return "the epoch is superseded"
	case reasonTwice:
		return "claimed twice"
	case reasonLimit:
		return "too many claims"
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// A verdict is the Edge's answer to a claimList: which of its claims it refuses. All others are in force.
type verdict struct {
	serial  uint64
	refused []refusedClaim
}

type refusedClaim struct {
	index  uint16
	reason reason
}

func (v verdict) encode() []byte {
	b := []byte{messageVerdict}
	b = binary.BigEndian.AppendUint64(b, v.serial)
	b = binary.BigEndian.AppendUint16(b, uint16(len(v.refused)))
	for _, r := range v.refused {
		b = binary.BigEndian.AppendUint16(b, r.index)
		b = append(b, byte(r.reason))
	}
	return b
}

func decodeVerdict(b []byte) (verdict, error) {
	var (
		v     verdict
		s     = cryptobyte.String(b)
		kind  uint8
		count uint16
	)
	if !s.ReadUint8(&kind) || kind != messageVerdict || !s.ReadUint64(&v.serial) || !s.ReadUint16(&count) || count > maxClaims {
		return verdict{}, errors.New("decode verdict: bad start")
	}
	for i := range int(count) {
		var r refusedClaim
		if !s.ReadUint16(&r.index) || r.index >= maxClaims || !s.ReadUint8((*uint8)(&r.reason)) || r.reason == reasonNone {
			return verdict{}, fmt.Errorf("decode verdict: bad entry %d", i)
		}
		v.refused = append(v.refused, r)
	}
	if !s.Empty() {
		return verdict{}, errors.New("decode verdict: bytes left over")
	}
	return v, nil
}

// writeMessage sends one message on the control stream.
func writeMessage(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...))
	return err
}

// readMessage receives one message. It holds memory for the bytes that came, not for those that were promised.
func readMessage(r io.Reader) ([]byte, error) {
	var prefix [4]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(prefix[:])
	if size > maxMessage {
		return nil, fmt.Errorf("control message of %d bytes exceeds %d", size, maxMessage)
	}
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, int64(size)); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
