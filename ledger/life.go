package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

// A contract's life: active, maybe paused, cancelling for a while in which all goes on and its owner can take it back,
// cancelled with its data kept, retired. What comes by itself with time is in lists, one a minute, of which a block does a
// bounded part.

// Delays are how long things take that a person, or a thief of his keys, might not have meant. One that is zero is that of
// DefaultDelays.
type Delays struct {
	Cancel   time.Duration `cbor:"1,keyasint,omitempty" json:"cancel,omitempty"`   // until a cancelled contract ends
	Retain   time.Duration `cbor:"2,keyasint,omitempty" json:"retain,omitempty"`   // from then until its data can go
	Policy   time.Duration `cbor:"3,keyasint,omitempty" json:"policy,omitempty"`   // until a new policy rules
	Proposal time.Duration `cbor:"4,keyasint,omitempty" json:"proposal,omitempty"` // until a proposal ends that has too little consent
}

// DefaultDelays are those of a grid that says nothing.
func DefaultDelays() Delays {
	const day = 24 * time.Hour
	return Delays{Cancel: day, Retain: 30 * day, Policy: day, Proposal: 7 * day}
}

// maxDelay bounds a delay: what can never be is not to be had by a long wait.
const maxDelay = 366 * 24 * time.Hour

func (d Delays) valid() error {
	for _, x := range []time.Duration{d.Cancel, d.Retain, d.Policy, d.Proposal} {
		if x != 0 && (x < time.Second || x > maxDelay) {
			return fmt.Errorf("a delay of %v: a second to a year is allowed", x)
		}
	}
	return nil
}

// OrDefault fills in what is zero.
func (d Delays) OrDefault() Delays {
	def := DefaultDelays()
	for _, x := range []struct{ have, want *time.Duration }{
		{&d.Cancel, &def.Cancel}, {&d.Retain, &def.Retain}, {&d.Policy, &def.Policy}, {&d.Proposal, &def.Proposal},
	} {
		if *x.have == 0 {
			*x.have = *x.want
		}
	}
	return d
}

func (b *batch) delays() Delays {
	g, err := b.Genesis()
	if err != nil {
		return DefaultDelays()
	}
	return g.Delays.OrDefault()
}

// contractCancel begins a contract's end.
func (b *batch) contractCancel(who *signers, p *ContractCancel) error {
	c, h, err := b.mine(who, p.Contract, identity.ActCancel)
	if err != nil {
		return err
	}
	if c.State != Active && c.State != Paused {
		return fmt.Errorf("%v is %s", p.Contract, c.State)
	}
	if err := who.agreed(identity.ActCancel, h.Consents(identity.ActCancel)); err != nil {
		return of(c.ID, err)
	}
	return b.become(c, Cancelling, b.delays().Cancel)
}

// contractState pauses a contract, or has it work again, which takes its end back where there is one.
func (b *batch) contractState(who *signers, p *ContractState) error {
	c, err := get[Contract](&b.State, ContractKey(p.Contract))
	if err != nil {
		return fmt.Errorf("%v: %w", p.Contract, err)
	}
	act := identity.ActPause
	switch {
	case p.State == Paused && c.State == Active, p.State == Active && c.State == Paused:
	case p.State == Active && (c.State == Cancelling || c.State == Cancelled):
		act = identity.ActCancel
	default:
		return fmt.Errorf("%v is %s and cannot become %q", p.Contract, c.State, p.State)
	}
	c, h, err := b.mine(who, p.Contract, act)
	if err != nil {
		return err
	}
	if p.State == Active && c.State != Cancelling { // what stands still begins again, by the policy as it is now
		if err := within(who.account, h); err != nil {
			return err
		}
	}
	if c.State == Cancelled {
		if err := b.revive(c, h); err != nil {
			return err
		}
	}
	if err := who.agreed(act, h.Consents(act)); err != nil {
		return of(c.ID, err)
	}
	return b.become(c, p.State, 0)
}

// mine reads a contract on which the signers may act.
func (b *batch) mine(who *signers, id contract.ID, act identity.Act) (*Contract, *contract.Header, error) {
	c, err := get[Contract](&b.State, ContractKey(id))
	if err != nil {
		return nil, nil, fmt.Errorf("%v: %w", id, err)
	}
	if err := who.allowed(c.Account, act); err != nil {
		return nil, nil, err
	}
	h, err := b.header(c.Current)
	return c, h, err
}

// of says which contract a proposal is about.
func of(id contract.ID, err error) error {
	if u := new(unripe); errors.As(err, &u) {
		u.contract = id
	}
	return err
}

// become changes a contract's state, and notes when the next comes by itself.
func (b *batch) become(c *Contract, state string, delay time.Duration) error {
	c.State, c.Due = state, 0
	if delay > 0 {
		c.Due = b.clock.Time + delay.Milliseconds()
		if err := b.remind(c.Due, dueContract, c.ID); err != nil {
			return err
		}
	}
	set(b, ContractKey(c.ID), c)
	return b.settle(c.ID)
}

// contractDue is a contract's next state, when its time has come.
func (b *batch) contractDue(id contract.ID) error {
	c, err := get[Contract](&b.State, ContractKey(id))
	if err != nil {
		return err
	}
	if c.Due == 0 || b.clock.Time < c.Due {
		return nil // it was taken back, or comes later
	}
	h, err := b.header(c.Current)
	if err != nil {
		return err
	}
	switch c.State {
	case Cancelling:
		return b.cancelled(c, h)
	case Cancelled:
		return b.retire(c, h)
	}
	return nil
}

// remains is what a contract that was cancelled still takes: for its volumes until it is retired, for its objects for good.
func remains(h *contract.Header) *contract.Header {
	return &contract.Header{Store: h.Store, Volumes: h.Volumes}
}

// cancelled ends what a contract has of the grid, but its data.
func (b *batch) cancelled(c *Contract, h *contract.Header) error {
	b.del(contractNameKey(c.Account, c.Name)) // the name is free again; the contract stays readable by its ID
	none := remains(h)
	held, had, err := b.held(c)
	if err != nil {
		return err
	}
	c.Trial = Trial{}
	for _, err := range []error{
		drop(b, ContractsKey, c.ID), b.bill(c.Account, had, usage(none)), b.networks(c.ID, held, none), b.routes(c.ID, held.Routes, nil),
	} {
		if err != nil {
			return err
		}
	}
	return b.become(c, Cancelled, b.delays().Retain)
}

// revive gives a contract back what cancelled took, if it can still be had.
func (b *batch) revive(c *Contract, h *contract.Header) error {
	if old, err := get[contract.ID](&b.State, contractNameKey(c.Account, c.Name)); err == nil {
		return fmt.Errorf("the account has another contract %q by now: %v", c.Name, *old)
	}
	set(b, contractNameKey(c.Account, c.Name), &c.ID)
	none := remains(h)
	for _, err := range []error{
		push(b, ContractsKey, c.ID), b.bill(c.Account, usage(none), usage(h)), b.networks(c.ID, none, h), b.routes(c.ID, nil, h.Routes),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

// retire is the end: the volumes are nobody's any more, and the nodes that have them remove them.
func (b *batch) retire(c *Contract, h *contract.Header) error {
	for _, v := range h.Volumes {
		if err := b.dropVolume(contract.VolumeOf(c.ID, v.Name)); err != nil {
			return err
		}
	}
	if err := b.bill(c.Account, usage(remains(h)), usage(&contract.Header{Store: h.Store})); err != nil {
		return err
	}
	if err := drop(b, AccountWorkKey(c.Account), c.ID); err != nil {
		return err
	}
	return b.become(c, Retired, 0)
}

// Kinds of what comes with time.
const (
	dueContract byte = 1
	dueProposal byte = 2
	dueTrial    byte = 3
)

// What a block does at most of what time brings, the rest comes in the next ones; and how many minutes it looks through when
// the ledger stood still.
const (
	maxDue     = 64
	maxMinutes = 1024
)

// dues is what there is of it.
type dues struct {
	Next uint64 `cbor:"1,keyasint"` // the first minute that is not done with
	Left uint64 `cbor:"2,keyasint"`
}

// remind has something looked at when its time has come: it may have become another by then.
func (b *batch) remind(at int64, kind byte, id [32]byte) error {
	minute := minuteOf(at)
	d, err := get[dues](&b.State, duesKey)
	switch {
	case errors.Is(err, ErrAbsent):
		d = &dues{Next: minuteOf(b.clock.Time)}
	case err != nil:
		return err
	}
	minute = max(minute, d.Next)
	d.Left++
	set(b, duesKey, d)
	e := append(binary.BigEndian.AppendUint64(nil, uint64(at)), kind)
	return push(b, dueKey(minute), append(e, id[:]...))
}

// due does what the block's time brings, minute by minute.
func (b *batch) due() {
	d, err := get[dues](&b.State, duesKey)
	if err != nil {
		return
	}
	var ripe [][]byte
	was, now, left := *d, minuteOf(b.clock.Time), maxDue
	for minutes := maxMinutes; d.Next <= now && minutes > 0; minutes-- {
		all, err := list[[]byte](&b.State, dueKey(d.Next))
		if err == nil && len(all) > 0 {
			wait := all[:0:0]
			for _, e := range all {
				if len(e) != 8+1+32 || binary.BigEndian.Uint64(e) > uint64(b.clock.Time) || left == 0 {
					wait = append(wait, e)
					continue
				}
				left--
				ripe = append(ripe, e)
			}
			if len(wait) > 0 && len(wait) < len(all) {
				set(b, dueKey(d.Next), &wait)
			}
			if len(wait) > 0 {
				break
			}
			b.del(dueKey(d.Next))
		}
		if d.Next == now {
			break
		}
		d.Next++
	}
	if d.Left -= uint64(len(ripe)); d.Left == 0 {
		b.del(duesKey)
	} else if *d != was {
		set(b, duesKey, d)
	}
	for _, e := range ripe { // what it does may remind of more
		b.look(e[8], [32]byte(e[9:]))
	}
}

func minuteOf(ms int64) uint64 { return uint64(ms / time.Minute.Milliseconds()) }

// look does what is due of one thing. What cannot be done, because a record cannot be read, holds up nothing else.
func (b *batch) look(kind byte, id [32]byte) {
	try := *b
	var err error
	switch kind {
	case dueContract:
		err = try.contractDue(id)
	case dueProposal:
		err = try.proposalDue(id)
	case dueTrial:
		err = try.trialDue(id)
	}
	if err == nil {
		b.tree, b.fleet, b.set, b.setAt = try.tree, try.fleet, try.set, try.setAt
	}
}
