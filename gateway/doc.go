// Package gateway brings the outside world to workloads without letting anything dial in.
//
// An [Edge] stands in public with one port. An [Origin] stands inside, with the node: it dials out to every Edge and
// listens on nothing. The Edge reads the name in a client's first TLS message, finds in the ledger who may serve it, and
// passes the client's bytes, still encrypted, down the tunnel of such an Origin. There TLS ends, and the request goes on
// to the workload.
//
// What it holds to:
//   - The Edge has no key for any host and sees no plaintext of any. It learns names, addresses, sizes and times.
//   - A tunnel is TLS 1.3 with X25519MLKEM768 and nothing else. Both ends show a key that the ledger lists; certificates
//     carry those keys and no other meaning.
//   - A connection lives while the ledger names its host, node, workload and epoch together. The Edge remembers the
//     highest epoch of every workload and refuses lower ones, whatever it is told later; [Edge.Update] cuts what was
//     superseded.
//   - An Origin serves only what its own node asked it to, in that epoch, and only when the client's own TLS message and
//     its Host header name that host. It need not believe the Edge in anything but the client's address.
//   - What a stranger, a node or an Edge can make another hold is bounded, and shared: no address uses up a service, no
//     service the Origin, and no workload the claims of its node.
//
// It never resolves names, never issues certificates, reads no file and imports no other room.
//
// # Wire format
//
// docs/formats/tunnel.md is the authority; this is its summary. All numbers are big-endian. Over TLS go frames:
//
//	kind uint8 | 0 uint8 | length uint16 | stream uint32 | payload
//
// of at most 16384 bytes, so that one frame is one TLS record. Kinds are open (1), data (2), fin (3), reset (4),
// window (5) and ping (6). Stream 0 is the control stream, open from the start; the Edge opens all others. An open frame
// carries
//
//	1 uint8 | length uint8, host | length uint8, client IP | client port uint16 | workload [32] | epoch uint64
//
// On the control stream go messages behind a uint32 length: the Origin's list of claims, and the Edge's verdict on it.
package gateway
