//go:build !amd64

package disperse

const lanes = false

func leaves2(l, m *[32]byte, p, q *[LeafSize]byte) { panic("no lanes") }
