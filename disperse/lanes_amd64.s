#include "textflag.h"

// SHA-256 of two messages at once with the processor's instructions for it (Intel SDM: SHA256RNDS2, SHA256MSG1, SHA256MSG2).
// Two rounds take four cycles before their result is there, but others can begin every two: a second message costs little.
// States are kept as the instructions want them, A B E F and C D G H from high to low, in X1 X2 and X7 X8; X3–X6 and X9–X12
// have the schedule's last sixteen words. X0 is what SHA256RNDS2 adds: words and constants.

DATA constants<>+0(SB)/8, $0x71374491428a2f98
DATA constants<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA constants<>+16(SB)/8, $0x59f111f13956c25b
DATA constants<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA constants<>+32(SB)/8, $0x12835b01d807aa98
DATA constants<>+40(SB)/8, $0x550c7dc3243185be
DATA constants<>+48(SB)/8, $0x80deb1fe72be5d74
DATA constants<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA constants<>+64(SB)/8, $0xefbe4786e49b69c1
DATA constants<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA constants<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA constants<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA constants<>+96(SB)/8, $0xa831c66d983e5152
DATA constants<>+104(SB)/8, $0xbf597fc7b00327c8
DATA constants<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA constants<>+120(SB)/8, $0x1429296706ca6351
DATA constants<>+128(SB)/8, $0x2e1b213827b70a85
DATA constants<>+136(SB)/8, $0x53380d134d2c6dfc
DATA constants<>+144(SB)/8, $0x766a0abb650a7354
DATA constants<>+152(SB)/8, $0x92722c8581c2c92e
DATA constants<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA constants<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA constants<>+176(SB)/8, $0xd6990624d192e819
DATA constants<>+184(SB)/8, $0x106aa070f40e3585
DATA constants<>+192(SB)/8, $0x1e376c0819a4c116
DATA constants<>+200(SB)/8, $0x34b0bcb52748774c
DATA constants<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA constants<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA constants<>+224(SB)/8, $0x78a5636f748f82ee
DATA constants<>+232(SB)/8, $0x8cc7020884c87814
DATA constants<>+240(SB)/8, $0xa4506ceb90befffa
DATA constants<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL constants<>(SB), RODATA|NOPTR, $256

DATA swap<>+0(SB)/8, $0x0405060700010203
DATA swap<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL swap<>(SB), RODATA|NOPTR, $16

// Four rounds of both messages.
#define rounds(group, a, b) \
	MOVO        a, X0; \
	PADDD       constants<>+(group*16)(SB), X0; \
	SHA256RNDS2 X0, X1, X2; \
	PSHUFD      $0x0E, X0, X13; \
	MOVO        b, X0; \
	PADDD       constants<>+(group*16)(SB), X0; \
	SHA256RNDS2 X0, X7, X8; \
	PSHUFD      $0x0E, X0, X14; \
	MOVO        X13, X0; \
	SHA256RNDS2 X0, X2, X1; \
	MOVO        X14, X0; \
	SHA256RNDS2 X0, X8, X7

// The second half of the four words that come next, from those of now and before; the first half is in next.
#define second(before, now, next) \
	MOVO       now, X15; \
	PALIGNR    $4, before, X15; \
	PADDD      X15, next; \
	SHA256MSG2 now, next

#define load(at, a, b) \
	MOVOU  at(SI), a; \
	PSHUFB swap<>(SB), a; \
	MOVOU  at(DI), b; \
	PSHUFB swap<>(SB), b

// A state in words, in the order that the instructions want.
#define pack(at, x, y) \
	MOVOU   0(at), X15; \
	MOVOU   16(at), y; \
	PSHUFD  $0xB1, X15, X15; \
	PSHUFD  $0x1B, y, y; \
	MOVO    X15, x; \
	PALIGNR $8, y, x; \
	PBLENDW $0xF0, X15, y

#define unpack(at, x, y) \
	PSHUFD  $0x1B, x, X15; \
	PSHUFD  $0xB1, y, y; \
	MOVO    X15, x; \
	PBLENDW $0xF0, y, x; \
	PALIGNR $8, X15, y; \
	MOVOU   x, 0(at); \
	MOVOU   y, 16(at)

// func blocks2(s, t *[8]uint32, p, q *byte, n int)
TEXT ·blocks2(SB), NOSPLIT, $64-40
	MOVQ s+0(FP), AX
	MOVQ t+8(FP), BX
	MOVQ p+16(FP), SI
	MOVQ q+24(FP), DI
	MOVQ n+32(FP), CX
	pack(AX, X1, X2)
	pack(BX, X7, X8)

next:
	MOVOU X1, 0(SP)
	MOVOU X2, 16(SP)
	MOVOU X7, 32(SP)
	MOVOU X8, 48(SP)
	load(0, X3, X9)
	rounds(0, X3, X9)
	load(16, X4, X10)
	rounds(1, X4, X10)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	load(32, X5, X11)
	rounds(2, X5, X11)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	load(48, X6, X12)
	rounds(3, X6, X12)
	second(X5, X6, X3)
	second(X11, X12, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	rounds(4, X3, X9)
	second(X6, X3, X4)
	second(X12, X9, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	rounds(5, X4, X10)
	second(X3, X4, X5)
	second(X9, X10, X11)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	rounds(6, X5, X11)
	second(X4, X5, X6)
	second(X10, X11, X12)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	rounds(7, X6, X12)
	second(X5, X6, X3)
	second(X11, X12, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	rounds(8, X3, X9)
	second(X6, X3, X4)
	second(X12, X9, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	rounds(9, X4, X10)
	second(X3, X4, X5)
	second(X9, X10, X11)
	SHA256MSG1 X4, X3
	SHA256MSG1 X10, X9
	rounds(10, X5, X11)
	second(X4, X5, X6)
	second(X10, X11, X12)
	SHA256MSG1 X5, X4
	SHA256MSG1 X11, X10
	rounds(11, X6, X12)
	second(X5, X6, X3)
	second(X11, X12, X9)
	SHA256MSG1 X6, X5
	SHA256MSG1 X12, X11
	rounds(12, X3, X9)
	second(X6, X3, X4)
	second(X12, X9, X10)
	SHA256MSG1 X3, X6
	SHA256MSG1 X9, X12
	rounds(13, X4, X10)
	second(X3, X4, X5)
	second(X9, X10, X11)
	rounds(14, X5, X11)
	second(X4, X5, X6)
	second(X10, X11, X12)
	rounds(15, X6, X12)
	MOVOU 0(SP), X15
	PADDD X15, X1
	MOVOU 16(SP), X15
	PADDD X15, X2
	MOVOU 32(SP), X15
	PADDD X15, X7
	MOVOU 48(SP), X15
	PADDD X15, X8
	ADDQ  $64, SI
	ADDQ  $64, DI
	DECQ  CX
	JNZ   next
	unpack(AX, X1, X2)
	unpack(BX, X7, X8)
	RET

// func cpuid(leaf uint32) (bx, cx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-16
	MOVL leaf+0(FP), AX
	XORL CX, CX
	CPUID
	MOVL BX, bx+8(FP)
	MOVL CX, cx+12(FP)
	RET
