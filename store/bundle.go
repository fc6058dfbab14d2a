package store

import (
	"bytes"
	"fmt"

	"holdfast/store/location"
)

// Marshal is the form of keys in a file.
func (k *Keys) Marshal() []byte { return k.marshal() }

// ParseKeys reads what Marshal wrote.
func ParseKeys(b []byte) (*Keys, error) { return parseKeys(bytes.Clone(b)) }

// Pins are how locations know a store's front end, and who undoes deletes.
func (r Root) Pins() (frontEnd, recovery location.Pin, err error) {
	if frontEnd, err = location.PinOf(location.Seed(r.derive(labelFrontEnd))); err != nil {
		return frontEnd, recovery, fmt.Errorf("pin of the front end: %w", err)
	}
	if recovery, err = location.PinOf(r.Recovery()); err != nil {
		return frontEnd, recovery, fmt.Errorf("pin for recovery: %w", err)
	}
	return frontEnd, recovery, nil
}
