package gateway

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/crypto/cryptobyte"
)

// A hello is what the Edge learns from a client's first message. raw holds every byte that was read for it.
type hello struct {
	raw        []byte
	serverName string   // as sent; "" where the client names none
	alpn       []string // as sent
}

// TLS numbers, from RFC 8446, RFC 6066 and RFC 7301.
const (
	recordAlert        = 21
	recordHandshake    = 22
	handshakeHello     = 1
	extensionName      = 0
	extensionALPN      = 16
	alertDecode        = 50
	alertInternal      = 80
	alertName          = 112
	alertProtocol      = 120
	recordHeader       = 5
	maxRecord          = 1 << 14
	handshakeHeader    = 4
	minimalHello       = 2 + 32 + 1 + 2 + 2 + 1 + 1
	firstHelloCapacity = 2 << 10 // a browser's hello with X25519MLKEM768 fits
)

var errHello = errors.New("not a ClientHello")

// readHello reads one ClientHello, over however many records it was cut into, and not a byte beyond its last record.
// limit bounds what it holds, record headers included.
func readHello(r io.Reader, limit int) (hello, error) {
	var (
		h       = hello{raw: make([]byte, 0, min(limit, firstHelloCapacity))}
		message []byte // the records' content, once there are several
	)
	for {
		start := len(h.raw)
		if start+recordHeader > limit {
			return h, fmt.Errorf("%w: more than %d bytes", errHello, limit)
		}
		if err := readInto(r, &h.raw, recordHeader); err != nil {
			return h, err
		}
		head := h.raw[start:]
		size := int(head[3])<<8 | int(head[4])
		if head[0] != recordHandshake || head[1] != 3 || size == 0 || size > maxRecord {
			return h, errHello
		}
		if start+recordHeader+size > limit {
			return h, fmt.Errorf("%w: more than %d bytes", errHello, limit)
		}
		if err := readInto(r, &h.raw, size); err != nil {
			return h, err
		}
		body := h.raw[start+recordHeader:]
		if message == nil {
			message = body[:len(body):len(body)] // grows into memory of its own
		} else {
			message = append(message, body...)
		}
		if message[0] != handshakeHello {
			return h, errHello
		}
		if len(message) < handshakeHeader {
			continue
		}
		want := int(message[1])<<16 | int(message[2])<<8 | int(message[3])
		if want < minimalHello || want > limit {
			return h, fmt.Errorf("%w: message of %d bytes", errHello, want)
		}
		if have := len(message) - handshakeHeader; have > want {
			return h, fmt.Errorf("%w: bytes behind it", errHello)
		} else if have == want {
			err := h.parse(message[handshakeHeader:])
			return h, err
		}
	}
}

// readInto appends exactly n bytes of r to b.
func readInto(r io.Reader, b *[]byte, n int) error {
	start := len(*b)
	for cap(*b) < start+n {
		*b = append((*b)[:cap(*b)], 0)
	}
	*b = (*b)[:start+n]
	got, err := io.ReadFull(r, (*b)[start:])
	if err != nil {
		*b = (*b)[:start+got]
	}
	return err
}

// parse reads the two extensions that the Edge needs and checks the frame of all others.
func (h *hello) parse(message []byte) error {
	var (
		s                              = cryptobyte.String(message)
		session, compression           cryptobyte.String
		ciphers, extensions, extension cryptobyte.String
	)
	if !s.Skip(2+32) || !s.ReadUint8LengthPrefixed(&session) || !s.ReadUint16LengthPrefixed(&ciphers) ||
		!s.ReadUint8LengthPrefixed(&compression) || !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return fmt.Errorf("%w: bad structure", errHello)
	}
	var seenName, seenALPN bool
	for !extensions.Empty() {
		var kind uint16
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&extension) {
			return fmt.Errorf("%w: bad extensions", errHello)
		}
		switch kind {
		case extensionName:
			var (
				list, name cryptobyte.String
				nameType   uint8
			)
			// RFC 6066 allows one name of each type, and there is only one type.
			if seenName || !extension.ReadUint16LengthPrefixed(&list) || !extension.Empty() ||
				!list.ReadUint8(&nameType) || nameType != 0 || !list.ReadUint16LengthPrefixed(&name) || name.Empty() || !list.Empty() {
				return fmt.Errorf("%w: bad server name", errHello)
			}
			seenName = true
			h.serverName = string(name)
		case extensionALPN:
			var list, protocol cryptobyte.String
			if seenALPN || !extension.ReadUint16LengthPrefixed(&list) || !extension.Empty() || list.Empty() {
				return fmt.Errorf("%w: bad protocol list", errHello)
			}
			seenALPN = true
			for !list.Empty() {
				if !list.ReadUint8LengthPrefixed(&protocol) || protocol.Empty() {
					return fmt.Errorf("%w: bad protocol list", errHello)
				}
				h.alpn = append(h.alpn, string(protocol))
			}
		}
	}
	return nil
}

// host returns the server name in the form in which routes are looked up. RFC 6066 sends names without a trailing dot.
func (h *hello) host() string {
	if strings.HasSuffix(h.serverName, ".") {
		return ""
	}
	return normalHost(h.serverName)
}

// alert is the fatal TLS alert that tells a client why he is sent away.
func alert(code byte) []byte { return []byte{recordAlert, 3, 3, 0, 2, 2, code} }
