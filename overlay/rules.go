package overlay

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// tableName is our table's, in NET as in the node's own namespace.
const tableName = "holdfast"

// A ruleset is one table under construction. Every apply replaces its content in one transaction, so that there is no moment
// without rules and no difference between a first and a repeated run. The table and its chains stay: where the kernel takes
// one chain off a hook and puts another on it, packets get past between the two.
type ruleset struct {
	chains map[string]bool // those that belong
	conn   *nftables.Conn
	table  *nftables.Table
	sets   uint32
}

// set adds a set. Its ID is unique in the transaction, as it must be; the library would count in a global without a lock.
func (r *ruleset) set(s *nftables.Set, elements []nftables.SetElement) error {
	r.sets++
	s.Table, s.ID = r.table, r.sets
	if err := r.conn.AddSet(s, elements); err != nil {
		return fmt.Errorf("add set %s: %w", s.Name, err)
	}
	return nil
}

// replaceTable fills our table anew in the thread's namespace.
func replaceTable(build func(*ruleset) error) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	chains, sets, err := contents(conn, table)
	if err != nil {
		return fmt.Errorf("read nftables rules: %w", err)
	}
	r := &ruleset{conn: conn, table: conn.AddTable(table), chains: map[string]bool{}}
	conn.FlushTable(table)
	for _, s := range sets {
		conn.DelSet(s)
	}
	if err := build(r); err != nil {
		return err
	}
	for _, c := range chains {
		if !r.chains[c.Name] {
			conn.DelChain(c)
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("apply nftables rules: %w", err)
	}
	return nil
}

// contents lists what our table has.
func contents(conn *nftables.Conn, table *nftables.Table) (chains []*nftables.Chain, sets []*nftables.Set, err error) {
	tables, err := conn.ListTablesOfFamily(table.Family)
	if err != nil {
		return nil, nil, err
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == table.Name }) {
		return nil, nil, nil
	}
	all, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range all {
		if c.Table.Name == table.Name {
			chains = append(chains, c)
		}
	}
	sets, err = conn.GetSets(table)
	return chains, sets, err
}

func (r *ruleset) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy nftables.ChainPolicy) func(parts ...[]expr.Any) {
	r.chains[name] = true
	chain := r.conn.AddChain(&nftables.Chain{Name: name, Table: r.table, Type: kind, Hooknum: hook, Priority: priority, Policy: &policy})
	return func(parts ...[]expr.Any) {
		r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: chain, Exprs: slices.Concat(parts...)})
	}
}

// pins adds the set of (interface, source MAC, source address) of all attachments, and returns the match for it.
func (r *ruleset) pins(name string, addr nftables.SetDatatype, elements []nftables.SetElement) ([]expr.Any, error) {
	set := &nftables.Set{
		Name: name, Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, addr),
	}
	if err := r.set(set, elements); err != nil {
		return nil, err
	}
	proto, offset := byte(unix.NFPROTO_IPV6), uint32(8)
	if addr.Bytes == 4 {
		proto, offset = unix.NFPROTO_IPV4, 12
	}
	// The key lies in consecutive 32-bit registers: name 8 to 11, MAC 12 and 13, address from 14.
	return slices.Concat(family(proto), ethernet(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 8},
		&expr.Payload{Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6, DestRegister: 12},
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: addr.Bytes, DestRegister: 14},
		&expr.Lookup{SourceRegister: 8, SetName: set.Name, SetID: set.ID},
	}), nil
}

// members adds a set of addresses and returns the matches for packets from one of them, and to one of them.
func (r *ruleset) members(name string, addrs []netip.Addr) (from, to []expr.Any, err error) {
	set := &nftables.Set{Name: name, KeyType: nftables.TypeIP6Addr}
	var elements []nftables.SetElement
	for _, a := range addrs {
		if !a.Is6() {
			return nil, nil, fmt.Errorf("set %s: %v is not an IPv6 address", name, a)
		}
		elements = append(elements, nftables.SetElement{Key: a.AsSlice()})
	}
	if err := r.set(set, elements); err != nil {
		return nil, nil, err
	}
	at := func(offset uint32) []expr.Any {
		return slices.Concat(family(unix.NFPROTO_IPV6), []expr.Any{
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 16, DestRegister: 1},
			&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID},
		})
	}
	return at(8), at(24), nil
}

func pin(p place, addr netip.Addr) nftables.SetElement {
	mac, _ := macs(p.ID)
	key := append(ifname(linkName(p.ID)), mac...)
	return nftables.SetElement{Key: append(append(key, 0, 0), addr.AsSlice()...)}
}

// replaceRules sets what passes through NET. It runs in NET.
//
//	pin:     from a workload only with its own MAC and address; from the tunnel only the network's addresses;
//	         from the uplink anything, which forward then wants to be an answer. What stays inside the network, and
//	         DNS, is not tracked, so that a flood of connections fills no table
//	input:   from workloads DNS, echo and neighbour solicitation, from the tunnel echo, and answers to Dial
//	forward: between workloads and the tunnel, never from tunnel to tunnel; out only by rule
func (n *Network) replaceRules(places []place, egress map[netip.Addr][]Egress) error {
	return replaceTable(func(r *ruleset) error {
		var elements6, elements4 []nftables.SetElement
		for _, p := range places {
			elements6 = append(elements6, pin(p, p.Addr))
			if p.slot != 0 {
				elements4 = append(elements4, pin(p, n.addr4(p.slot)))
			}
		}
		pins6, err := r.pins("pins6", nftables.TypeIP6Addr, elements6)
		if err != nil {
			return err
		}
		pins4, err := r.pins("pins4", nftables.TypeIPAddr, elements4)
		if err != nil {
			return err
		}
		inside := to(n.prefix)
		self := to(netip.PrefixFrom(n.cfg.Self, 128))

		rule := r.chain("pin", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyDrop)
		rule(iif("lo"), accept())
		rule(iif(n.tunName()), from(n.prefix), self, accept())
		rule(iif(n.tunName()), from(n.prefix), inside, notrack(), accept())
		rule(iif(uplinkInner), accept())
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rule(pins6, self, l4(proto), dport(53), notrack(), accept())
		}
		rule(pins6, self, accept())
		rule(pins6, inside, notrack(), accept())
		rule(pins6, accept())
		rule(pins4, accept())

		rule = r.chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rule(oif("w*"), from(netip.PrefixFrom(n.cfg.Self, 128)), l4(proto), sport(53), notrack())
		}

		rule = r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
		rule(iif("lo"), accept())
		rule(iif(uplinkInner), drop())
		rule(answers(), accept())
		rule(iif("w*"), icmp6(icmpNeighbourSolicit), hopLimit255(), accept())
		rule(self, icmp6(icmpEcho), accept())
		rule(iif("w*"), self, l4(unix.IPPROTO_UDP), dport(53), accept())
		rule(iif("w*"), self, l4(unix.IPPROTO_TCP), dport(53), accept())

		rule = r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
		rule(iif("w*"), oif("w*"), inside, accept())
		rule(iif("w*"), oif(n.tunName()), inside, accept())
		rule(iif(n.tunName()), oif("w*"), inside, accept())
		rule(iif(uplinkInner), oif("w*"), answers(), accept())
		for _, p := range privatePrefixes() {
			rule(oif(uplinkInner), to(p), drop())
		}
		for _, p := range places {
			if len(egress[p.Addr]) > 0 {
				rule(iif(linkName(p.ID)), oif(uplinkInner), fresh(), faster(egressRate, egressFlows), drop())
				rule(iif(linkName(p.ID)), oif(uplinkInner), over(egressFlows), drop())
			}
			for _, e := range egress[p.Addr] {
				source := p.Addr
				if e.Prefix.Addr().Is4() {
					if source = n.addr4(p.slot); p.slot == 0 {
						continue
					}
				}
				parts := [][]expr.Any{iif(linkName(p.ID)), oif(uplinkInner), from(netip.PrefixFrom(source, source.BitLen())), to(e.Prefix), l4(protocol(e.Proto))}
				if e.Port != 0 {
					parts = append(parts, dport(e.Port))
				}
				rule(append(parts, accept())...)
			}
		}
		return nil
	})
}

func protocol(name string) byte {
	if name == "udp" {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}

// privatePrefixes is what egress never reaches: everything that is not the public unicast Internet, also where it is
// wrapped in an IPv6 address that a translator would unwrap.
func privatePrefixes() []netip.Prefix {
	var list []netip.Prefix
	for _, s := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
		"192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
	} {
		p := netip.MustParsePrefix(s)
		mapped := netip.MustParseAddr("64:ff9b::").As16()
		copy(mapped[12:], p.Addr().AsSlice())
		list = append(list, p, netip.PrefixFrom(netip.AddrFrom16(mapped), 96+p.Bits()))
	}
	for _, s := range []string{
		"::/96", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2002::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
	} {
		list = append(list, netip.MustParsePrefix(s))
	}
	return list
}

const (
	icmpEcho                 = 128
	icmpRouterAdvert         = 134
	icmpNeighbourSolicit     = 135
	icmpNeighbourAdvert      = 136
	ctEstablished, ctRelated = expr.CtStateBitESTABLISHED, expr.CtStateBitRELATED
)

// Matches and verdicts, each as the list of expressions that nft would compile it to.

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

func equal(data ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func meta(key expr.MetaKey, data ...byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, equal(data...)}
}

func ifname(name string) []byte {
	return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...)
}

// ifmatch is an interface's name as a comparison; one that ends in * stands for all that begin so.
func ifmatch(name string) []byte {
	if name[len(name)-1] == '*' {
		return []byte(name[:len(name)-1])
	}
	return ifname(name)
}

func iif(name string) []expr.Any { return meta(expr.MetaKeyIIFNAME, ifmatch(name)...) }
func oif(name string) []expr.Any { return meta(expr.MetaKeyOIFNAME, ifmatch(name)...) }
func notIif(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: ifname(name)}}
}
func notOif(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: ifname(name)}}
}
func family(f byte) []expr.Any { return meta(expr.MetaKeyNFPROTO, f) }
func l4(proto byte) []expr.Any { return meta(expr.MetaKeyL4PROTO, proto) }
func ethernet() []expr.Any {
	return meta(expr.MetaKeyIIFTYPE, binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)...)
}
func dport(p uint16) []expr.Any {
	return payload(expr.PayloadBaseTransportHeader, 2, binaryutil.BigEndian.PutUint16(p)...)
}
func sport(p uint16) []expr.Any {
	return payload(expr.PayloadBaseTransportHeader, 0, binaryutil.BigEndian.PutUint16(p)...)
}
func hopLimit255() []expr.Any { return payload(expr.PayloadBaseNetworkHeader, 7, 255) }

func icmp6(kind byte) []expr.Any {
	return slices.Concat(family(unix.NFPROTO_IPV6), l4(unix.IPPROTO_ICMPV6), payload(expr.PayloadBaseTransportHeader, 0, kind))
}

// noPort matches what the kernel answers for a UDP port that nobody has.
func noPort(f byte) []expr.Any {
	if f == unix.NFPROTO_IPV4 {
		return slices.Concat(family(f), l4(unix.IPPROTO_ICMP), payload(expr.PayloadBaseTransportHeader, 0, 3, 3))
	}
	return slices.Concat(family(f), l4(unix.IPPROTO_ICMPV6), payload(expr.PayloadBaseTransportHeader, 0, 1, 4))
}

func payload(base expr.PayloadBase, offset uint32, data ...byte) []expr.Any {
	return []expr.Any{&expr.Payload{Base: base, Offset: offset, Len: uint32(len(data)), DestRegister: 1}, equal(data...)}
}

func from(p netip.Prefix) []expr.Any { return inPrefix(p, 12, 8) }
func to(p netip.Prefix) []expr.Any   { return inPrefix(p, 16, 24) }

func inPrefix(p netip.Prefix, offset4, offset6 uint32) []expr.Any {
	proto, offset, size := byte(unix.NFPROTO_IPV6), offset6, uint32(16)
	if p.Addr().Is4() {
		proto, offset, size = unix.NFPROTO_IPV4, offset4, 4
	}
	if p.Bits() == 0 {
		return family(proto)
	}
	return slices.Concat(family(proto), []expr.Any{
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size, DestRegister: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: ipNet(p).Mask, Xor: make([]byte, size)},
		equal(p.Masked().Addr().AsSlice()...),
	})
}

// answers matches what belongs to a connection opened from this side, and errors about one.
func answers() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ctEstablished | ctRelated), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// replies matches the direction back to this side of a connection that this side opened.
func replies() []expr.Any {
	const reply = 1 // IP_CT_DIR_REPLY
	return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equal(reply)}
}

func notrack() []expr.Any { return []expr.Any{&expr.Notrack{}} }

// fresh matches the first packet of a connection.
func fresh() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: bytes32(expr.CtStateBitNEW), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// faster matches what exceeds a rate.
func faster(perSecond uint64, burst uint32) []expr.Any {
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: perSecond, Unit: expr.LimitTimeSecond, Burst: burst, Over: true}}
}

// over matches a packet of one connection more than count.
func over(count uint32) []expr.Any {
	const invert = 1 // NFT_CONNLIMIT_F_INV
	return []expr.Any{&expr.Connlimit{Count: count, Flags: invert}}
}

func bytes32(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func mark() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: bytes32(egressMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}
