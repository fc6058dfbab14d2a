package s3

import "golang.org/x/sys/cpu"

// md5x8 goes on with the MD5 of eight messages over n > 0 blocks of each. s[i] are the i-th words of their states.
//
//go:noescape
func md5x8(s *[4][8]uint32, p *[8]*byte, n int)

var hasMD5x8 = cpu.X86.HasAVX2
