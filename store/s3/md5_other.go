//go:build !amd64

package s3

const hasMD5x8 = false

func md5x8(s *[4][8]uint32, p *[8]*byte, n int) { panic("no lanes") }
