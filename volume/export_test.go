package volume

// NewShelf is the place of this package's own tests, for volume/placetest.
func NewShelf() Place { return newShelf() }
