#include "textflag.h"

// MD5 (RFC 1321) of eight messages, one in each 32 bits of a register: Y0 to Y3 are A B C D, the words of a block lie in the
// frame, eight messages side by side.

DATA sines<>+0(SB)/4, $0xd76aa478
DATA sines<>+4(SB)/4, $0xe8c7b756
DATA sines<>+8(SB)/4, $0x242070db
DATA sines<>+12(SB)/4, $0xc1bdceee
DATA sines<>+16(SB)/4, $0xf57c0faf
DATA sines<>+20(SB)/4, $0x4787c62a
DATA sines<>+24(SB)/4, $0xa8304613
DATA sines<>+28(SB)/4, $0xfd469501
DATA sines<>+32(SB)/4, $0x698098d8
DATA sines<>+36(SB)/4, $0x8b44f7af
DATA sines<>+40(SB)/4, $0xffff5bb1
DATA sines<>+44(SB)/4, $0x895cd7be
DATA sines<>+48(SB)/4, $0x6b901122
DATA sines<>+52(SB)/4, $0xfd987193
DATA sines<>+56(SB)/4, $0xa679438e
DATA sines<>+60(SB)/4, $0x49b40821
DATA sines<>+64(SB)/4, $0xf61e2562
DATA sines<>+68(SB)/4, $0xc040b340
DATA sines<>+72(SB)/4, $0x265e5a51
DATA sines<>+76(SB)/4, $0xe9b6c7aa
DATA sines<>+80(SB)/4, $0xd62f105d
DATA sines<>+84(SB)/4, $0x02441453
DATA sines<>+88(SB)/4, $0xd8a1e681
DATA sines<>+92(SB)/4, $0xe7d3fbc8
DATA sines<>+96(SB)/4, $0x21e1cde6
DATA sines<>+100(SB)/4, $0xc33707d6
DATA sines<>+104(SB)/4, $0xf4d50d87
DATA sines<>+108(SB)/4, $0x455a14ed
DATA sines<>+112(SB)/4, $0xa9e3e905
DATA sines<>+116(SB)/4, $0xfcefa3f8
DATA sines<>+120(SB)/4, $0x676f02d9
DATA sines<>+124(SB)/4, $0x8d2a4c8a
DATA sines<>+128(SB)/4, $0xfffa3942
DATA sines<>+132(SB)/4, $0x8771f681
DATA sines<>+136(SB)/4, $0x6d9d6122
DATA sines<>+140(SB)/4, $0xfde5380c
DATA sines<>+144(SB)/4, $0xa4beea44
DATA sines<>+148(SB)/4, $0x4bdecfa9
DATA sines<>+152(SB)/4, $0xf6bb4b60
DATA sines<>+156(SB)/4, $0xbebfbc70
DATA sines<>+160(SB)/4, $0x289b7ec6
DATA sines<>+164(SB)/4, $0xeaa127fa
DATA sines<>+168(SB)/4, $0xd4ef3085
DATA sines<>+172(SB)/4, $0x04881d05
DATA sines<>+176(SB)/4, $0xd9d4d039
DATA sines<>+180(SB)/4, $0xe6db99e5
DATA sines<>+184(SB)/4, $0x1fa27cf8
DATA sines<>+188(SB)/4, $0xc4ac5665
DATA sines<>+192(SB)/4, $0xf4292244
DATA sines<>+196(SB)/4, $0x432aff97
DATA sines<>+200(SB)/4, $0xab9423a7
DATA sines<>+204(SB)/4, $0xfc93a039
DATA sines<>+208(SB)/4, $0x655b59c3
DATA sines<>+212(SB)/4, $0x8f0ccc92
DATA sines<>+216(SB)/4, $0xffeff47d
DATA sines<>+220(SB)/4, $0x85845dd1
DATA sines<>+224(SB)/4, $0x6fa87e4f
DATA sines<>+228(SB)/4, $0xfe2ce6e0
DATA sines<>+232(SB)/4, $0xa3014314
DATA sines<>+236(SB)/4, $0x4e0811a1
DATA sines<>+240(SB)/4, $0xf7537e82
DATA sines<>+244(SB)/4, $0xbd3af235
DATA sines<>+248(SB)/4, $0x2ad7d2bb
DATA sines<>+252(SB)/4, $0xeb86d391
GLOBL sines<>(SB), RODATA|NOPTR, $256

// What steps have in common, Y4 being the round's function of b, c and d.
#define step(a, b, word, sine, left, right) \
	VPBROADCASTD sines<>+(sine*4)(SB), Y5; \
	VPADDD       (word*32)(SP), a, a; \
	VPADDD       Y5, Y4, Y4; \
	VPADDD       Y4, a, a; \
	VPSLLD       $left, a, Y5; \
	VPSRLD       $right, a, a; \
	VPOR         Y5, a, a; \
	VPADDD       b, a, a

#define step1(a, b, c, d, word, sine, left, right) \
	VPXOR c, d, Y4; \
	VPAND b, Y4, Y4; \
	VPXOR d, Y4, Y4; \
	step(a, b, word, sine, left, right)

#define step2(a, b, c, d, word, sine, left, right) \
	VPXOR b, c, Y4; \
	VPAND d, Y4, Y4; \
	VPXOR c, Y4, Y4; \
	step(a, b, word, sine, left, right)

#define step3(a, b, c, d, word, sine, left, right) \
	VPXOR b, c, Y4; \
	VPXOR d, Y4, Y4; \
	step(a, b, word, sine, left, right)

#define step4(a, b, c, d, word, sine, left, right) \
	VPXOR Y7, d, Y4; \
	VPOR  b, Y4, Y4; \
	VPXOR c, Y4, Y4; \
	step(a, b, word, sine, left, right)

// Four messages' eight words in r0 to r3 become four words of four messages in each half.
#define turn(r0, r1, r2, r3) \
	VPUNPCKLDQ  r1, r0, Y4; \
	VPUNPCKHDQ  r1, r0, Y5; \
	VPUNPCKLDQ  r3, r2, Y6; \
	VPUNPCKHDQ  r3, r2, Y7; \
	VPUNPCKLQDQ Y6, Y4, r0; \
	VPUNPCKHQDQ Y6, Y4, r1; \
	VPUNPCKLQDQ Y7, Y5, r2; \
	VPUNPCKHQDQ Y7, Y5, r3

#define keep(word, low, high) \
	VPERM2I128 $0x20, high, low, Y4; \
	VPERM2I128 $0x31, high, low, Y5; \
	VMOVDQU    Y4, ((word)*32)(SP); \
	VMOVDQU    Y5, ((word)*32+128)(SP)

// Half a block: words from word on.
#define half(word) \
	VMOVDQU (word*4)(R8)(CX*1), Y8; \
	VMOVDQU (word*4)(R9)(CX*1), Y9; \
	VMOVDQU (word*4)(R10)(CX*1), Y10; \
	VMOVDQU (word*4)(R11)(CX*1), Y11; \
	VMOVDQU (word*4)(R12)(CX*1), Y12; \
	VMOVDQU (word*4)(R13)(CX*1), Y13; \
	VMOVDQU (word*4)(SI)(CX*1), Y14; \
	VMOVDQU (word*4)(DI)(CX*1), Y15; \
	turn(Y8, Y9, Y10, Y11); \
	turn(Y12, Y13, Y14, Y15); \
	keep(word, Y8, Y12); \
	keep(word+1, Y9, Y13); \
	keep(word+2, Y10, Y14); \
	keep(word+3, Y11, Y15)

// func md5x8(s *[4][8]uint32, p *[8]*byte, n int)
TEXT ·md5x8(SB), 0, $640-24
	MOVQ    s+0(FP), AX
	MOVQ    p+8(FP), BX
	MOVQ    n+16(FP), DX
	MOVQ    0(BX), R8
	MOVQ    8(BX), R9
	MOVQ    16(BX), R10
	MOVQ    24(BX), R11
	MOVQ    32(BX), R12
	MOVQ    40(BX), R13
	MOVQ    48(BX), SI
	MOVQ    56(BX), DI
	XORL    CX, CX
	VMOVDQU 0(AX), Y0
	VMOVDQU 32(AX), Y1
	VMOVDQU 64(AX), Y2
	VMOVDQU 96(AX), Y3

next:
	half(0)
	half(8)
	VMOVDQU  Y0, 512(SP)
	VMOVDQU  Y1, 544(SP)
	VMOVDQU  Y2, 576(SP)
	VMOVDQU  Y3, 608(SP)
	VPCMPEQD Y7, Y7, Y7
	step1(Y0, Y1, Y2, Y3, 0, 0, 7, 25)
	step1(Y3, Y0, Y1, Y2, 1, 1, 12, 20)
	step1(Y2, Y3, Y0, Y1, 2, 2, 17, 15)
	step1(Y1, Y2, Y3, Y0, 3, 3, 22, 10)
	step1(Y0, Y1, Y2, Y3, 4, 4, 7, 25)
	step1(Y3, Y0, Y1, Y2, 5, 5, 12, 20)
	step1(Y2, Y3, Y0, Y1, 6, 6, 17, 15)
	step1(Y1, Y2, Y3, Y0, 7, 7, 22, 10)
	step1(Y0, Y1, Y2, Y3, 8, 8, 7, 25)
	step1(Y3, Y0, Y1, Y2, 9, 9, 12, 20)
	step1(Y2, Y3, Y0, Y1, 10, 10, 17, 15)
	step1(Y1, Y2, Y3, Y0, 11, 11, 22, 10)
	step1(Y0, Y1, Y2, Y3, 12, 12, 7, 25)
	step1(Y3, Y0, Y1, Y2, 13, 13, 12, 20)
	step1(Y2, Y3, Y0, Y1, 14, 14, 17, 15)
	step1(Y1, Y2, Y3, Y0, 15, 15, 22, 10)
	step2(Y0, Y1, Y2, Y3, 1, 16, 5, 27)
	step2(Y3, Y0, Y1, Y2, 6, 17, 9, 23)
	step2(Y2, Y3, Y0, Y1, 11, 18, 14, 18)
	step2(Y1, Y2, Y3, Y0, 0, 19, 20, 12)
	step2(Y0, Y1, Y2, Y3, 5, 20, 5, 27)
	step2(Y3, Y0, Y1, Y2, 10, 21, 9, 23)
	step2(Y2, Y3, Y0, Y1, 15, 22, 14, 18)
	step2(Y1, Y2, Y3, Y0, 4, 23, 20, 12)
	step2(Y0, Y1, Y2, Y3, 9, 24, 5, 27)
	step2(Y3, Y0, Y1, Y2, 14, 25, 9, 23)
	step2(Y2, Y3, Y0, Y1, 3, 26, 14, 18)
	step2(Y1, Y2, Y3, Y0, 8, 27, 20, 12)
	step2(Y0, Y1, Y2, Y3, 13, 28, 5, 27)
	step2(Y3, Y0, Y1, Y2, 2, 29, 9, 23)
	step2(Y2, Y3, Y0, Y1, 7, 30, 14, 18)
	step2(Y1, Y2, Y3, Y0, 12, 31, 20, 12)
	step3(Y0, Y1, Y2, Y3, 5, 32, 4, 28)
	step3(Y3, Y0, Y1, Y2, 8, 33, 11, 21)
	step3(Y2, Y3, Y0, Y1, 11, 34, 16, 16)
	step3(Y1, Y2, Y3, Y0, 14, 35, 23, 9)
	step3(Y0, Y1, Y2, Y3, 1, 36, 4, 28)
	step3(Y3, Y0, Y1, Y2, 4, 37, 11, 21)
	step3(Y2, Y3, Y0, Y1, 7, 38, 16, 16)
	step3(Y1, Y2, Y3, Y0, 10, 39, 23, 9)
	step3(Y0, Y1, Y2, Y3, 13, 40, 4, 28)
	step3(Y3, Y0, Y1, Y2, 0, 41, 11, 21)
	step3(Y2, Y3, Y0, Y1, 3, 42, 16, 16)
	step3(Y1, Y2, Y3, Y0, 6, 43, 23, 9)
	step3(Y0, Y1, Y2, Y3, 9, 44, 4, 28)
	step3(Y3, Y0, Y1, Y2, 12, 45, 11, 21)
	step3(Y2, Y3, Y0, Y1, 15, 46, 16, 16)
	step3(Y1, Y2, Y3, Y0, 2, 47, 23, 9)
	step4(Y0, Y1, Y2, Y3, 0, 48, 6, 26)
	step4(Y3, Y0, Y1, Y2, 7, 49, 10, 22)
	step4(Y2, Y3, Y0, Y1, 14, 50, 15, 17)
	step4(Y1, Y2, Y3, Y0, 5, 51, 21, 11)
	step4(Y0, Y1, Y2, Y3, 12, 52, 6, 26)
	step4(Y3, Y0, Y1, Y2, 3, 53, 10, 22)
	step4(Y2, Y3, Y0, Y1, 10, 54, 15, 17)
	step4(Y1, Y2, Y3, Y0, 1, 55, 21, 11)
	step4(Y0, Y1, Y2, Y3, 8, 56, 6, 26)
	step4(Y3, Y0, Y1, Y2, 15, 57, 10, 22)
	step4(Y2, Y3, Y0, Y1, 6, 58, 15, 17)
	step4(Y1, Y2, Y3, Y0, 13, 59, 21, 11)
	step4(Y0, Y1, Y2, Y3, 4, 60, 6, 26)
	step4(Y3, Y0, Y1, Y2, 11, 61, 10, 22)
	step4(Y2, Y3, Y0, Y1, 2, 62, 15, 17)
	step4(Y1, Y2, Y3, Y0, 9, 63, 21, 11)
	VPADDD 512(SP), Y0, Y0
	VPADDD 544(SP), Y1, Y1
	VPADDD 576(SP), Y2, Y2
	VPADDD 608(SP), Y3, Y3
	ADDQ $64, CX
	DECQ DX
	JNZ  next
	VMOVDQU Y0, 0(AX)
	VMOVDQU Y1, 32(AX)
	VMOVDQU Y2, 64(AX)
	VMOVDQU Y3, 96(AX)
	VZEROUPPER
	RET
