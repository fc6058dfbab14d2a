package ledger

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/schedule"
)

func validName(s string) error {
	if len(s) == 0 || len(s) > identity.MaxName {
		return fmt.Errorf("name of %d bytes, 1 to %d are allowed", len(s), identity.MaxName)
	}
	for i, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && (c != '-' || i == 0 || i == len(s)-1) {
			return fmt.Errorf("name %q: only a-z, 0-9 and inner hyphens are allowed", s)
		}
	}
	return nil
}

// signers are the keys that really signed, after every one of them was verified.
type signers struct {
	devices []identity.DeviceID
	account *identity.Account // nil for a node and for account.create
	node    *Node

	consented []identity.AccountID // beside account, who consented to what is proposed
	ripe      bool                 // its time has come
}

// authenticate checks grid and signatures. It reads keys from the state, so that a transaction of an unknown actor fails.
func (s *State) authenticate(raw []byte, tx *Tx) (*signers, error) {
	grid, err := get[Grid](s, GridKey)
	if err != nil {
		return nil, fmt.Errorf("grid record: %w", err)
	}
	if tx.Grid != grid.ID {
		return nil, fmt.Errorf("transaction is for %v, this is %v", tx.Grid, grid.ID)
	}
	return s.signers(tx)
}

// signers verifies the signatures by the keys of the actor.
func (s *State) signers(tx *Tx) (_ *signers, err error) {
	out := &signers{}
	var keys []identity.PublicKey
	switch {
	case tx.Kind == KindAccountCreate:
		p, err := Payload[AccountCreate](tx)
		if err != nil {
			return nil, err
		}
		if len(p.Devices) > identity.MaxDevices {
			return nil, fmt.Errorf("account has %d devices, at most %d are allowed", len(p.Devices), identity.MaxDevices)
		}
		for _, d := range p.Devices {
			keys = append(keys, d.Key)
		}
		if len(tx.Signatures) != len(keys) {
			return nil, fmt.Errorf("account with %d devices has %d signatures: each device signs", len(keys), len(tx.Signatures))
		}
	case tx.Actor.Node:
		if out.node, err = get[Node](s, NodeKey(identity.NodeID(tx.Actor.ID))); err != nil {
			return nil, fmt.Errorf("%v: %w", identity.NodeID(tx.Actor.ID), err)
		}
		keys = []identity.PublicKey{out.node.Key}
	default:
		if out.account, err = get[identity.Account](s, AccountKey(identity.AccountID(tx.Actor.ID))); err != nil {
			return nil, fmt.Errorf("%v: %w", identity.AccountID(tx.Actor.ID), err)
		}
		for _, d := range out.account.Devices {
			keys = append(keys, d.Key)
		}
	}
	msg := tx.signBytes()
	for i := range tx.Signatures {
		sig := &tx.Signatures[i]
		j := slices.IndexFunc(keys, func(k identity.PublicKey) bool { return k.Digest() == sig.Key })
		if j < 0 {
			return nil, fmt.Errorf("signed by %v, which is not a key of the actor", identity.DeviceID(sig.Key))
		}
		if err := s.sigs.verify(&keys[j], txPurpose, msg, &sig.Signature); err != nil {
			return nil, fmt.Errorf("signature of %v: %w", identity.DeviceID(sig.Key), err)
		}
		out.devices = append(out.devices, identity.DeviceID(sig.Key))
	}
	return out, nil
}

// Payload reads what a transaction of a kind does.
func Payload[T any](tx *Tx) (*T, error) {
	p := new(T)
	if err := canonical.Decode(tx.Payload, MaxTx, p); err != nil {
		return nil, fmt.Errorf("%s payload: %w", tx.Kind, err)
	}
	return p, nil
}

// apply executes one transaction on b. After an error b is in an undefined state and must be dropped. A tx that comes with
// the error has used up its nonce all the same.
func (b *batch) apply(raw []byte) (used *Tx, code uint32, err error) {
	tx, err := DecodeTx(raw)
	if err != nil {
		return nil, CodeInvalid, err
	}
	who, err := b.authenticate(raw, tx)
	if err != nil {
		return nil, CodeInvalid, err
	}
	if tx.Kind != KindAccountCreate {
		last, err := orZero(get[uint64](&b.State, NonceKey(tx.Actor)))
		if err != nil {
			return nil, CodeRefused, fmt.Errorf("nonce: %w", err)
		}
		if tx.Nonce != *last+1 {
			return nil, CodeNonce, fmt.Errorf("nonce %d, the next one is %d: it was executed before, or another transaction comes first", tx.Nonce, *last+1)
		}
		if err := b.inTime(tx); err != nil {
			return nil, CodeNonce, err
		}
		set(b, NonceKey(tx.Actor), &tx.Nonce)
	} else if tx.Nonce != 0 || tx.Until != 0 || tx.Actor != (Actor{}) {
		return nil, CodeInvalid, errors.New("an account's creation has no actor, no nonce and no last time")
	}
	id, told, _ := b.about().of(tx)
	before := *b
	err = b.execute(tx, who)
	if open := new(unripe); errors.As(err, &open) {
		*b = before
		err = b.propose(tx, who, open)
	}
	if err == nil {
		err = b.grows(tx, len(raw))
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", tx.Kind, err)
		if who.could(tx.Kind) && !errors.As(err, new(notAllowed)) {
			return tx, CodeRefused, err
		}
		return nil, CodeRefused, err
	}
	if told {
		if err := b.record(id, raw); err != nil {
			return nil, CodeRefused, err
		}
		b.subject = id
	}
	return nil, CodeOK, nil
}

// inTime checks a transaction's last time against the block's.
func (b *batch) inTime(tx *Tx) error {
	text := func(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
	switch now := b.clock.Time / 1000; {
	case tx.Until < now:
		return fmt.Errorf("its time is over: it was good until %s, and it is %s", text(tx.Until), text(now))
	case tx.Until-now > int64(MaxTxLife/time.Second):
		return fmt.Errorf("it would be good until %s, it is %s, and more than %v are not allowed: is the clock right?", text(tx.Until), text(now), MaxTxLife)
	}
	return nil
}

// acts are what an account's policy may be asked for by a kind of transaction.
func acts(kind Kind) []identity.Act {
	switch kind {
	case KindAccountQuota:
		return []identity.Act{identity.ActSetQuota}
	case KindFarmAdmit:
		return []identity.Act{identity.ActAdmitFarm}
	case KindNodeAdmit:
		return []identity.Act{identity.ActAdmitNode}
	case KindGatewayAdmit:
		return []identity.Act{identity.ActAdmitGateway}
	case KindValidatorJoin, KindValidatorLeave:
		return []identity.Act{identity.ActValidators}
	case KindContractSubmit:
		return []identity.Act{identity.ActCreate, identity.ActRevise, identity.ActScale, identity.ActRoute}
	case KindContractCancel:
		return []identity.Act{identity.ActCancel}
	case KindVolumeRestore:
		return []identity.Act{identity.ActRevise}
	case KindContractState:
		return []identity.Act{identity.ActPause, identity.ActCancel}
	case KindAccountPolicy:
		return []identity.Act{identity.ActPolicy}
	case KindTemplate:
		return []identity.Act{identity.ActPublish}
	case KindImageSign:
		return []identity.Act{identity.ActSignImage}
	case KindConsent:
		return []identity.Act{identity.ActApprove}
	case KindEnvelopePut:
		return []identity.Act{identity.ActRevise}
	}
	return []identity.Act{identity.ActDefault}
}

// could reports whether the signers satisfy the actor's policy for this kind of transaction. Only then does a refusal use up
// the nonce: one stolen device of several must not be able to hold up its account, nor somebody who passes a transaction on
// and takes signatures off it.
func (w *signers) could(kind Kind) bool {
	switch {
	case w.node != nil:
		return true
	case w.account == nil:
		return false
	}
	return slices.ContainsFunc(acts(kind), func(a identity.Act) bool { return w.account.Allows(a, w.devices) == nil })
}

func (b *batch) execute(tx *Tx, who *signers) error {
	switch tx.Kind {
	case KindAccountCreate:
		return with(tx, func(p *AccountCreate) error { return b.accountCreate(tx, p) })
	case KindAccountQuota:
		return with(tx, func(p *AccountQuota) error { return b.accountQuota(who, p) })
	case KindFarmAdmit:
		return with(tx, func(p *FarmAdmit) error { return b.farmAdmit(tx, who, p) })
	case KindNodeAdmit:
		return with(tx, func(p *NodeAdmit) error { return b.nodeAdmit(who, p) })
	case KindNodeUpdate:
		return with(tx, func(p *NodeUpdate) error { return b.nodeUpdate(who, p) })
	case KindGatewayAdmit:
		return with(tx, func(p *GatewayAdmit) error { return b.gatewayAdmit(who, p) })
	case KindValidatorJoin:
		return with(tx, func(p *ValidatorJoin) error { return b.validatorJoin(tx, who, p) })
	case KindValidatorLeave:
		return with(tx, func(p *ValidatorLeave) error { return b.validatorLeave(who, p) })
	case KindContractSubmit:
		return with(tx, func(p *ContractSubmit) error { return b.contractSubmit(tx, who, p) })
	case KindContractCancel:
		return with(tx, func(p *ContractCancel) error { return b.contractCancel(who, p) })
	case KindContractState:
		return with(tx, func(p *ContractState) error { return b.contractState(who, p) })
	case KindAccountPolicy:
		return with(tx, func(p *AccountPolicy) error { return b.accountPolicy(who, p) })
	case KindTemplate:
		return with(tx, func(p *TemplatePublish) error { return b.templatePublish(who, p) })
	case KindImageSign:
		return with(tx, func(p *ImageSign) error { return b.imageSign(who, p) })
	case KindConsent:
		return with(tx, func(p *Consent) error { return b.consent(who, p) })
	case KindWithdraw:
		return with(tx, func(p *Withdraw) error { return b.withdraw(who, p) })
	case KindEnvelopePut:
		return with(tx, func(p *EnvelopePut) error { return b.envelopePut(who, p) })
	case KindWorkloadReport:
		return with(tx, func(p *WorkloadReport) error { return b.workloadReport(who, p) })
	case KindVolumeCreated:
		return with(tx, func(p *VolumeCreated) error { return b.volumeCreated(who, p) })
	case KindVolumeSaved:
		return with(tx, func(p *VolumeSaved) error { return b.volumeSaved(who, p) })
	case KindVolumeRestore:
		return with(tx, func(p *VolumeRestore) error { return b.volumeRestore(who, p) })
	}
	return errors.New("this kind of transaction is not known")
}

func with[T any](tx *Tx, f func(*T) error) error {
	p, err := Payload[T](tx)
	if err != nil {
		return err
	}
	return f(p)
}

// allowed checks that the account that acts is owner and that its policy is satisfied.
func (w *signers) allowed(owner identity.AccountID, act identity.Act) error {
	if w.account == nil {
		return errors.New("only an account can do this")
	}
	if w.account.ID != owner {
		return fmt.Errorf("only %v can do this, %v signed", owner, w.account.ID)
	}
	if err := w.account.Allows(act, w.devices); err != nil {
		return notAllowed{err}
	}
	return nil
}

// notAllowed is the refusal of what more signatures would make good.
type notAllowed struct{ error }

func (b *batch) grid() *Grid {
	g, err := get[Grid](&b.State, GridKey)
	if err != nil {
		panic("ledger without grid record") // New wrote it and nothing deletes it
	}
	return g
}

func (b *batch) accountCreate(tx *Tx, p *AccountCreate) error {
	a := identity.Account{ID: identity.AccountID(tx.ID()), Devices: p.Devices, Policy: p.Policy, Sealing: p.Sealing}
	if _, err := get[identity.Account](&b.State, AccountKey(a.ID)); err == nil {
		return fmt.Errorf("%v exists", a.ID)
	}
	if err := a.Validate(); err != nil {
		return err
	}
	set(b, AccountKey(a.ID), &a)
	return nil
}

func (b *batch) farmAdmit(tx *Tx, who *signers, p *FarmAdmit) error {
	if err := who.allowed(b.grid().Account, identity.ActAdmitFarm); err != nil {
		return err
	}
	if err := validName(p.Name); err != nil {
		return err
	}
	if _, taken := b.tree.get(farmNameKey(p.Name)); taken {
		return fmt.Errorf("a farm %q exists", p.Name)
	}
	if _, ok := b.tree.get(AccountKey(p.Owner)); !ok {
		return fmt.Errorf("owner %v: %w", p.Owner, ErrAbsent)
	}
	f := &Farm{ID: identity.FarmID(tx.ID()), Name: p.Name, Owner: p.Owner}
	set(b, FarmKey(f.ID), f)
	set(b, farmNameKey(p.Name), &f.ID)
	return errors.Join(push(b, FarmsKey, f.ID), who.agreed(identity.ActAdmitFarm))
}

func validEndpoints(eps []string) error {
	if len(eps) > 8 {
		return fmt.Errorf("%d endpoints, at most 8 are allowed", len(eps))
	}
	for _, e := range eps {
		if len(e) > 64 {
			return errors.New("endpoint is too long")
		}
		// A zone means nothing elsewhere, and may be any text.
		if a, err := netip.ParseAddr(e); err != nil || a.Zone() != "" {
			return fmt.Errorf("endpoint %q is not an address", e)
		}
	}
	return nil
}

func (b *batch) nodeAdmit(who *signers, p *NodeAdmit) error {
	f, err := get[Farm](&b.State, FarmKey(p.Farm))
	if err != nil {
		return fmt.Errorf("%v: %w", p.Farm, err)
	}
	if err := who.allowed(f.Owner, identity.ActAdmitNode); err != nil {
		return err
	}
	if err := p.valid(); err != nil {
		return err
	}
	id := p.Key.Node()
	if _, taken := b.tree.get(NodeKey(id)); taken {
		return fmt.Errorf("%v exists", id)
	}
	if _, taken := b.tree.get(nodeNameKey(p.Name)); taken {
		return fmt.Errorf("a node %q exists", p.Name)
	}
	if err := b.sigs.verify(&p.Key, NodeAdmitPurpose, p.ProofBytes(b.grid().ID), &p.Proof); err != nil {
		return fmt.Errorf("proof of %v: %w", id, err)
	}
	if len(b.fleet) >= MaxNodes {
		return fmt.Errorf("the grid has %d nodes, more are not allowed", len(b.fleet))
	}
	if n := b.nodesOf(f.Name); n >= maxFarmNodes {
		return fmt.Errorf("farm %s has %d nodes, more are not allowed", f.Name, n)
	}
	type use struct {
		use string
		key [32]byte
	}
	uses := []use{{useWireGuard, p.WireGuard}, {useTLS, p.TLS}, {useSession, p.Session}}
	if p.Storage > 0 {
		uses = append(uses, use{useLocation, p.Location})
	}
	for _, k := range uses {
		if err := b.claim(k.use, k.key, id); err != nil {
			return err
		}
	}
	n := &Node{
		ID: id, Name: p.Name, Farm: f.ID, FarmName: f.Name, Key: p.Key, Sealing: p.Sealing, WireGuard: p.WireGuard, TLS: p.TLS,
		Session: p.Session, Endpoints: p.Endpoints, CPUMilli: p.CPUMilli, Memory: p.Memory, Index: uint32(len(b.fleet)), Since: b.clock.Time,
		Storage: p.Storage, Location: p.Location,
	}
	set(b, NodeKey(id), n)
	set(b, nodeNameKey(p.Name), &id)
	b.fleet = append(slices.Clone(b.fleet), schedule.Node{
		ID: id, Name: n.Name, Farm: n.FarmName, CPUMilli: int64(n.CPUMilli), Memory: memoryOf(n), Workloads: schedule.MaxWorkloads,
	})
	return errors.Join(push(b, NodesKey, id), who.agreed(identity.ActAdmitNode))
}

// maxFarmNodes is how many nodes one farm has: no owner takes all places of the grid.
const maxFarmNodes = MaxNodes / 4

func (b *batch) nodesOf(farm string) (n int) {
	for i := range b.fleet {
		if b.fleet[i].Farm == farm {
			n++
		}
	}
	return n
}

// Uses of a node's keys, as they are named in its records and in refusals.
const (
	useWireGuard = "WireGuard"
	useTLS       = "TLS"
	useSession   = "session"
	useLocation  = "location"
)

// claim gives a key of node id to it alone. With another's WireGuard key a node would take its peers' traffic or cut it off,
// with another's TLS key its place at the gateways, with another's session key its signs of life. With another's location
// key it would pass that one's shards off as its own, and a segment would be on fewer places than its store counts.
func (b *batch) claim(use string, key [32]byte, id identity.NodeID) error {
	if key == ([32]byte{}) {
		return fmt.Errorf("%s key is missing", use)
	}
	if use == useTLS {
		if err := b.freeTLS(key); err != nil {
			return err
		}
	} else if _, taken := b.tree.get(nodeKeyKey(use, key)); taken {
		return fmt.Errorf("another node has this %s key", use)
	}
	if use == useWireGuard {
		if b.validatorHas(func(v *Validator) bool { return v.WireGuard == key }) {
			return fmt.Errorf("a validator has this %s key", use)
		}
	}
	set(b, nodeKeyKey(use, key), &id)
	return nil
}

// freeTLS refuses a TLS key that a node, a gateway or a validator is known by.
func (b *batch) freeTLS(key [32]byte) error {
	if _, taken := b.tree.get(nodeKeyKey(useTLS, key)); taken {
		return fmt.Errorf("another node has this %s key", useTLS)
	}
	if _, taken := b.tree.get(GatewayKey(identity.GatewayID(key))); taken {
		return fmt.Errorf("a gateway has this %s key", useTLS)
	}
	if b.validatorHas(func(v *Validator) bool { return v.TLS == key }) {
		return fmt.Errorf("a validator has this %s key", useTLS)
	}
	return nil
}

func (b *batch) nodeUpdate(who *signers, p *NodeUpdate) error {
	if who.node == nil {
		return errors.New("only a node can do this")
	}
	if err := validEndpoints(p.Endpoints); err != nil {
		return err
	}
	if p.Session != who.node.Session {
		if err := b.claim(useSession, p.Session, who.node.ID); err != nil {
			return err
		}
		b.del(nodeKeyKey(useSession, who.node.Session))
	}
	who.node.Session, who.node.Endpoints = p.Session, p.Endpoints
	set(b, NodeKey(who.node.ID), who.node)
	return nil
}

func (b *batch) gatewayAdmit(who *signers, p *GatewayAdmit) error {
	if err := who.allowed(b.grid().Account, identity.ActAdmitGateway); err != nil {
		return err
	}
	if err := validName(p.Name); err != nil {
		return err
	}
	if host, port, err := net.SplitHostPort(p.Address); err != nil || host == "" || port == "" || len(p.Address) > 256 {
		return fmt.Errorf("address %q is not host:port", p.Address)
	}
	g := &Gateway{ID: identity.GatewayID(p.TLS), Name: p.Name, Address: p.Address}
	if _, taken := b.tree.get(GatewayKey(g.ID)); taken {
		return fmt.Errorf("%v exists", g.ID)
	}
	if p.TLS == ([32]byte{}) {
		return errors.New("TLS key is missing")
	}
	if err := b.freeTLS(p.TLS); err != nil {
		return err
	}
	set(b, GatewayKey(g.ID), g)
	return errors.Join(push(b, GatewaysKey, g.ID), who.agreed(identity.ActAdmitGateway))
}

func (b *batch) contractSubmit(tx *Tx, who *signers, p *ContractSubmit) error {
	h, err := contract.DecodeHeader(p.Header)
	if err != nil {
		return err
	}
	if h.Grid != tx.Grid {
		return fmt.Errorf("header is for %v", h.Grid)
	}
	id, rev := h.ContractID(), h.RevisionID()
	var c *Contract
	was := &contract.Header{} // the revision before, empty for the first
	held, had := was, Quota{} // with what it holds beside itself
	if h.Revision > 1 {
		// Who may do it depends on what it changes. Before it is known that the signer may, it says no more than that.
		if c, err = get[Contract](&b.State, ContractKey(id)); err == nil {
			was, err = b.header(c.Current)
		}
		if err == nil {
			held, had, err = b.held(c)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", id, err)
		}
	}
	act := h.Act(was)
	if err := who.allowed(h.Account, act); err != nil {
		return err
	}
	if err := within(who.account, h); err != nil {
		return err
	}
	for i := range h.Approvals {
		for _, p := range h.Approvals[i].Parties {
			if _, ok := b.tree.get(AccountKey(p.Account)); !ok {
				return fmt.Errorf("approval %q: %v: %w", h.Approvals[i].Name, p.Account, ErrAbsent)
			}
		}
	}
	if h.Revision == 1 {
		if _, taken := b.tree.get(ContractKey(id)); taken {
			return fmt.Errorf("%v exists", id)
		}
		if old, err := get[contract.ID](&b.State, contractNameKey(h.Account, h.Name)); err == nil {
			return fmt.Errorf("the account has a contract %q already: %v", h.Name, *old)
		}
		c = &Contract{ID: id, Account: h.Account, Name: h.Name, State: Active}
		set(b, contractNameKey(h.Account, h.Name), &id)
		if err := errors.Join(push(b, ContractsKey, id), push(b, AccountWorkKey(h.Account), id)); err != nil {
			return err
		}
	} else {
		switch {
		case c.Account != h.Account:
			return fmt.Errorf("%v belongs to %v", id, c.Account)
		case c.State != Active && c.State != Paused:
			return fmt.Errorf("%v is %s", id, c.State)
		case c.Name != h.Name:
			return fmt.Errorf("%v is named %q, a revision cannot rename it to %q", id, c.Name, h.Name)
		case c.Current != h.Previous || h.Revision != c.Newest()+1:
			return fmt.Errorf("revision %d on %v: the current revision is %d, %v, the newest %d; plan again", h.Revision, h.Previous, c.Revision, c.Current, c.Newest())
		}
	}
	if err := b.putEnvelopes(p.Envelopes, rev, readers(who.account, was, h)); err != nil {
		return err
	}
	if err := b.begin(c, h, act); err != nil {
		return err
	}
	c.Current, c.Revision, c.Latest, c.Revisions, c.Times = rev, h.Revision, 0, append(c.Revisions, rev), append(c.Times, b.clock.Time/1000)
	if n := len(c.Revisions) - MaxRevisions; n > 0 {
		c.Revisions, c.Times = c.Revisions[n:], c.Times[n:]
	}
	set(b, ContractKey(id), c)
	b.tree = b.tree.put(RevisionKey(rev), p.Header)
	holds, has, err := b.held(c)
	if err != nil {
		return err
	}
	if err := b.bill(h.Account, had, has); err != nil {
		return err
	}
	if err := b.networks(id, held, holds); err != nil {
		return err
	}
	if err := b.volumes(id, h); err != nil {
		return err
	}
	if err := b.contractStore(c, was, h); err != nil {
		return err
	}
	if err := b.routes(id, held.Routes, holds.Routes); err != nil {
		return err
	}
	if err := who.agreed(act, kept(was, h, act), h.Consents(act)); err != nil {
		return err
	}
	if err := b.settle(id); err != nil || !c.Trial.On() {
		return err
	}
	_, err = b.concluded(c) // it may have nothing to run
	return err
}

// settle assigns a contract after its own transaction.
func (b *batch) settle(id contract.ID) error {
	freed, err := b.assign(id)
	if freed {
		b.more()
	}
	return err
}

// NetworkPrefix are the 40 bits of an overlay network's /48, as package overlay derives them (a test of node/ compares).
func NetworkPrefix(id contract.NetworkID) [5]byte {
	d := sha256.Sum256(append([]byte("holdfast/net/v1\x00"), id[:]...))
	return [5]byte(d[:5])
}

// maxNetwork bounds the indexes of networks: each is a UDP port on every node.
const maxNetwork = 30000

// networks gives each network of the contract its index and takes back those that it no longer has. An overlay prefix that
// another network already has is refused: addresses are 40 bits of a hash.
func (b *batch) networks(id contract.ID, was, h *contract.Header) error {
	for _, name := range was.Networks {
		if slices.Contains(h.Networks, name) {
			continue
		}
		n, err := get[Network](&b.State, NetworkKey(contract.NetworkOf(id, name)))
		if err != nil {
			return fmt.Errorf("network %q: %w", name, err)
		}
		prefix := NetworkPrefix(n.ID)
		b.del(addressKey(prefix[:]))
		b.del(NetworkKey(n.ID))
		if err := push(b, freeNetworksKey, n.Index); err != nil {
			return err
		}
	}
	for _, name := range h.Networks {
		if slices.Contains(was.Networks, name) {
			continue
		}
		nid := contract.NetworkOf(id, name)
		prefix := NetworkPrefix(nid)
		if _, taken := b.tree.get(addressKey(prefix[:])); taken {
			return fmt.Errorf("network %q would share its addresses with another: change the contract's name", name)
		}
		index, err := b.networkIndex()
		if err != nil {
			return err
		}
		set(b, addressKey(prefix[:]), &nid)
		set(b, NetworkKey(nid), &Network{ID: nid, Contract: id, Name: name, Index: index})
	}
	return nil
}

// networkIndex takes an index that no network had yet while there is one, and then the one that has been free for longest:
// nodes that lag behind may still have the network that had it.
func (b *batch) networkIndex() (uint16, error) {
	if g := b.grid(); g.NextNetwork < maxNetwork {
		n := g.NextNetwork
		g.NextNetwork++
		set(b, GridKey, g)
		return n, nil
	}
	free, err := list[uint16](&b.State, freeNetworksKey)
	if err != nil {
		return 0, err
	}
	if len(free) == 0 {
		return 0, errors.New("the grid has no room for another network")
	}
	return free[0], drop(b, freeNetworksKey, free[0])
}

// routes makes the contract's routes exactly those wanted, where it had those that were. A host of another contract is
// refused.
func (b *batch) routes(id contract.ID, was, want []contract.Route) error {
	var gone, come []string
	for _, r := range was {
		if !slices.ContainsFunc(want, func(w contract.Route) bool { return w.Host == r.Host }) {
			b.del(RouteKey(r.Host))
			gone = append(gone, r.Host)
		}
	}
	for _, w := range want {
		old, err := get[Route](&b.State, RouteKey(w.Host))
		switch {
		case errors.Is(err, ErrAbsent):
			come = append(come, w.Host)
		case err != nil:
			return fmt.Errorf("route of %q: %w", w.Host, err)
		case old.Contract != id:
			return fmt.Errorf("host %q belongs to another contract", w.Host)
		}
		set(b, RouteKey(w.Host), &Route{Host: w.Host, Contract: id, Service: w.Service, Port: w.Port})
	}
	if len(gone) > 0 {
		if err := drop(b, RoutesKey, gone...); err != nil {
			return err
		}
	}
	if len(come) > 0 {
		return push(b, RoutesKey, come...)
	}
	return nil
}

func (b *batch) envelopePut(who *signers, p *EnvelopePut) error {
	if len(p.Envelopes) == 0 {
		return errors.New("no envelopes")
	}
	rev := p.Envelopes[0].Revision
	raw, ok := b.tree.get(RevisionKey(rev))
	if !ok {
		return fmt.Errorf("%v: %w", rev, ErrAbsent)
	}
	h, err := contract.DecodeHeader(raw)
	if err != nil {
		return err
	}
	if who.node != nil {
		// A node hands on only what it was given itself, and never replaces the owner's envelope.
		if _, holds := b.tree.get(EnvelopeKey(rev, contract.RecipientNode, who.node.ID)); !holds {
			return fmt.Errorf("%v holds no envelope of %v", who.node.ID, rev)
		}
		for _, e := range p.Envelopes {
			if _, have := b.tree.get(EnvelopeKey(rev, e.Kind, e.Recipient)); have || e.Kind != contract.RecipientNode {
				return errors.New("a node can add envelopes for nodes that have none, nothing else")
			}
		}
	} else if err := who.allowed(h.Account, identity.ActRevise); err != nil {
		return err
	}
	owner, err := get[identity.Account](&b.State, AccountKey(h.Account))
	if err != nil {
		return fmt.Errorf("%v: %w", h.Account, err)
	}
	return b.putEnvelopes(p.Envelopes, rev, readers(owner, h, h))
}

func (b *batch) putEnvelopes(es []contract.Envelope, rev contract.RevisionID, readers []identity.AccountID) error {
	for i := range es {
		e := &es[i]
		if e.Revision != rev {
			return fmt.Errorf("envelope of another revision, %v", e.Revision)
		}
		if len(e.Sealed) > contract.MaxEnvelope {
			return fmt.Errorf("envelope of %d bytes, at most %d are allowed", len(e.Sealed), contract.MaxEnvelope)
		}
		switch e.Kind {
		case contract.RecipientAccount:
			if !slices.Contains(readers, identity.AccountID(e.Recipient)) {
				return errors.New("envelope for another account")
			}
		case contract.RecipientNode:
			n, err := get[Node](&b.State, NodeKey(identity.NodeID(e.Recipient)))
			if err != nil {
				return fmt.Errorf("envelope for %v: %w", identity.NodeID(e.Recipient), err)
			}
			if !b.eligible(rev, n) {
				return fmt.Errorf("envelope for %s, which the contract's placement does not allow", n.Name)
			}
		default:
			return fmt.Errorf("envelope for a %q", e.Kind)
		}
		set(b, EnvelopeKey(rev, e.Kind, e.Recipient), e)
	}
	return nil
}

// eligible reports whether some service of the revision may run on n. A revision not yet written allows all: its own
// submission checks the header's placement through the envelopes that the signer chose.
func (b *batch) eligible(rev contract.RevisionID, n *Node) bool {
	raw, ok := b.tree.get(RevisionKey(rev))
	if !ok {
		return true
	}
	h, err := contract.DecodeHeader(raw)
	return err == nil && Eligible(h, n)
}

// Eligible reports whether the placement of some service of h allows node n. A machine that only keeps shards runs nothing,
// and gets nobody's keys.
func Eligible(h *contract.Header, n *Node) bool {
	return n.CPUMilli >= schedule.OverheadCPUMilli && n.Memory >= schedule.OverheadMemory && slices.ContainsFunc(h.Services, func(s contract.Service) bool {
		return s.Placement.Allows(n.FarmName, n.Name)
	})
}
