//go:build !race

package contract

const memoryFactor = 1
