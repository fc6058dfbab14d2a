//go:build race

package contract

// The race detector takes several times the memory.
const memoryFactor = 4
