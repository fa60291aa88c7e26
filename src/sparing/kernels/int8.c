/* 8-bit integer matrix products, int32 sums of u8 x s8 (AVX512_VNNI's vpdpbusd), quantised on the way in; rounding to small floats.
 *
 * The inner dimension is cut into blocks (a multiple of 4 long, at most 32768: the sums fit). In each block every row of A and every column
 * of B has its own scale, amax / 127; blocks add up in float32. A's numbers are stored with 128 added, which the start of each column's sum
 * takes off again. B lies in panels of 32 columns, four rows to a word; A in rows of words, or in panels of 8 where it is transposed.
 * For the matrix unit (AMX-INT8, tdpbusd), which gives the same integers, A lies tile by tile, and B's panels are filled up with zeros to
 * whole tiles; what A has there is of no account.
 * A block with an infinity or NaN makes its row or column NaN, one too small to scale counts as zeros; both are counted.
 * precision/eight_bit.py is the plain form.
 */
#include "numbers.inc"
#include <time.h>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "vectors.inc"
#include "tiles.inc"

enum { LONGEST = 32768, TILE_ROWS = 16, TILE_BYTES = 64, TILE_SIZE = TILE_ROWS * TILE_BYTES };

static int tiles_on; /* whether callers that ask for the matrix unit get it */

/* Switch it on or off; -> whether it is on. The processor must have it (amx_int8). */
int64_t use_tiles(int64_t on) { return tiles_on = on && tiles_allowed(); }

typedef struct { int64_t overflow, dead; } Faults;

/* Scale and its inverse of a block from its largest magnitude. */
static inline void scale_of(float amax, float *scale, float *inverse, Faults *faults) {
    *inverse = 0.0f;
    if (!(amax <= 3.4028234663852886e38f)) {
        *scale = NAN;
        faults->overflow++;
    } else if (amax == 0.0f)
        *scale = 1.0f;
    else if (amax / 127.0f < 1.1754943508222875e-38f) {
        *scale = 0.0f;
        faults->dead++;
    } else {
        *scale = amax / 127.0f;
        *inverse = 127.0f / amax;
    }
}

/* 16 numbers of a row as float32. */
static inline __m512 load16(const void *x, int f32, __mmask16 mask) {
    return f32 ? _mm512_maskz_loadu_ps(mask, x) : (__m512)_mm512_slli_epi32(widen(x, mask), 16);
}

static inline __m512i quantise16(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

/* The numbers of a row that `mask` has, of 32, as float32; of bfloat16 the even ones, then the odd ones, which takes fewest steps. */
static inline void load32(const char *x, int f32, __mmask32 mask, __m512 out[2]) {
    if (f32)
        for (int h = 0; h < 2; h++) out[h] = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16 * h), x + 64 * h);
    else {
        __m512i both = _mm512_maskz_loadu_epi16(mask, x);
        out[0] = (__m512)_mm512_slli_epi32(both, 16);
        out[1] = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
    }
}

static inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

/* 64 numbers, of which n are there, to bytes in order. */
static inline __m512i bytes64(const char *x, int f32, int64_t n, __m512 inverse) {
    __m512 v[4];
    load32(x, f32, n >= 64 ? 0xffffffffu : first32(n), v);
    load32(x + (f32 ? 128 : 64), f32, n >= 64 ? 0xffffffffu : first32(n - 32), v + 2);
    __m512i low = _mm512_packs_epi32(quantise16(v[0], inverse), quantise16(v[1], inverse));
    __m512i high = _mm512_packs_epi32(quantise16(v[2], inverse), quantise16(v[3], inverse));
    __m512i bytes = _mm512_packs_epi16(low, high); /* in each quarter 4 numbers of each part: put in order */
    if (f32) return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
}

/* Bits of the magnitudes of the numbers that `mask` has, of 32; float32: the larger of two each. NaN and infinities win, because as
 * integers their bits are the largest. */
static inline __m512i magnitudes(const char *x, int f32, __mmask32 mask) {
    if (!f32) return _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x), _mm512_set1_epi16(0x7fff));
    __m512 v[2];
    load32(x, 1, mask, v);
    return _mm512_max_epi32((__m512i)_mm512_abs_ps(v[0]), (__m512i)_mm512_abs_ps(v[1]));
}

/* The largest magnitude of n numbers. */
static inline float amax_of(const void *x, int f32, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    const char *at = x;
    int64_t size = f32 ? 4 : 2, whole = n / 32 * 32;
    for (int64_t i = 0; i < whole; i += 32) {
        __m512i here = magnitudes(at + i * size, f32, 0xffffffffu);
        most = f32 ? _mm512_max_epi32(most, here) : _mm512_max_epu16(most, here);
    }
    if (whole < n) {
        __m512i here = magnitudes(at + whole * size, f32, first32(n - whole));
        most = f32 ? _mm512_max_epi32(most, here) : _mm512_max_epu16(most, here);
    }
    if (!f32) most = _mm512_max_epi32(_mm512_slli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0x7fff0000)));
    uint32_t bits = (uint32_t)_mm512_reduce_max_epi32(most);
    float amax;
    memcpy(&amax, &bits, 4);
    return amax;
}

typedef struct {
    uint8_t *words;
    float *scale;  /* A: (M, blocks); B: (blocks, N up to 32) */
    int32_t *start; /* B: (blocks, N up to 32): what the sums start at */
    int64_t length; /* bytes of a row of A or of a column of B: K, filled up */
    int tiles;      /* for the matrix unit */
} Side;

static Side side(int slot, int64_t K, int64_t N, int64_t block, int tiles) {
    int64_t blocks = (K + block - 1) / block, wide = up(N, NR), length = up(K, tiles ? TILE_BYTES : 4), words = wide * length;
    uint8_t *at = scratch(slot, up(words, 64) + blocks * wide * 8);
    return (Side){at, (float *)(at + up(words, 64)), (int32_t *)(at + up(words, 64) + blocks * wide * 4), length, tiles};
}

/* Zeros behind the K rows of B. */
static inline void fill_up(Side right, int64_t K, int64_t N) {
    int64_t there = up(K, 4);
    if (there < right.length)
        for (int64_t n = 0; n < N; n += NR) memset(right.words + n * right.length + there * NR, 0, (right.length - there) * NR);
}

enum { NEAR = 16384 }; /* bytes that are still in the first cache when they are read again */

/* Rows of n numbers -> bytes, exclusive or `flip` (128: adds 128), past the end zeros up to the end of the word; row m's scale goes to
 * scale[m * step]. A row's first 64 bytes lie `wide` after those of the row before, the next 64 `far` after them. Where the scale is no
 * number, bytes have no meaning. */
static inline void quantise_rows(const char *x, int f32, int64_t stride, int64_t rows, int64_t n, int flip, float *scale, int64_t step,
                                 uint8_t *out, int64_t wide, int64_t far, Faults *faults) {
    int64_t size = f32 ? 4 : 2, some = NEAR / (n * size);
    some = some < 1 ? 1 : some > 16 ? 16 : some;
    for (int64_t m = 0; m < rows; m += some) {
        float inverse[16];
        for (int64_t i = 0; i < some && m + i < rows; i++)
            scale_of(amax_of(x + (m + i) * stride * size, f32, n), scale + (m + i) * step, inverse + i, faults);
        for (int64_t i = 0; i < some && m + i < rows; i++) {
            const char *from = x + (m + i) * stride * size;
            uint8_t *to = out + (m + i) * wide;
            __m512 factor = _mm512_set1_ps(inverse[i]);
            for (int64_t j = 0; j < n; j += 64, to += far) {
                __m512i bytes = _mm512_xor_si512(bytes64(from + j * size, f32, n - j, factor), _mm512_set1_epi8((char)flip));
                int64_t stay = up(n, 4) - j;
                if (stay >= 64)
                    _mm512_storeu_si512(to, bytes);
                else
                    _mm512_mask_storeu_epi8(to, ((__mmask64)1 << stay) - 1, bytes);
            }
        }
    }
}

/* A (M, K) as it lies -> rows of words with 128 added, or tiles of such rows. */
static void rows8(const bf16 *a, int64_t stride, int64_t M, int64_t K, int64_t block, Side out, Faults *faults) {
    int64_t blocks = (K + block - 1) / block, row = out.tiles ? TILE_BYTES : out.length, far = out.tiles ? TILE_SIZE : 64;
    for (int64_t m = 0; m < M; m += TILE_ROWS)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t k = b * block, n = K - k < block ? K - k : block, rows = M - m < TILE_ROWS ? M - m : TILE_ROWS;
            uint8_t *to = out.words + m * out.length + (out.tiles ? k * TILE_ROWS : k);
            quantise_rows((const char *)(a + m * stride + k), 0, stride, rows, n, 128, out.scale + m * blocks + b, blocks, to, row, far, faults);
        }
}

static inline __m512i minus_128_times(__m512i sums) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7)); }

/* B (N, K) -> panels of its transpose. */
static inline __attribute__((always_inline)) void columns8(const char *b, int f32, int64_t stride, int64_t K, int64_t N, int64_t block,
                                                           Side out, Faults *faults) {
    int64_t words = out.length / 4, blocks = (K + block - 1) / block, wide = up(N, NR), size = f32 ? 4 : 2;
    int64_t apart = up(block, 64) + 64; /* not a power of two: 16 rows would share their places in the cache */
    uint8_t *rows = scratch(13, 16 * apart);
    for (int64_t n = 0; n < wide; n += 16)
        for (int64_t k = 0, at = 0; at < blocks; at++, k += block) {
            int64_t length = K - k < block ? K - k : block, there = N - n < 0 ? 0 : N - n < 16 ? N - n : 16;
            float *scale = out.scale + at * wide + n;
            __m512i sums = _mm512_setzero_si512();
            for (int64_t i = there; i < 16; i++) scale[i] = 0.0f;
            quantise_rows(b + (n * stride + k) * size, f32, stride, there, length, 0, scale, 1, rows, apart, 64, faults);
            for (int64_t j = 0; j < length; j += 64) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) r[i] = i < there ? _mm512_load_si512(rows + i * apart + j) : _mm512_setzero_si512();
                transpose16(r);
                int64_t stop = (length - j + 3) / 4 < 16 ? (length - j + 3) / 4 : 16;
                uint8_t *to = out.words + ((n / NR * words + (k + j) / 4) * NR + n % NR) * 4;
                for (int64_t i = 0; i < stop; i++) {
                    _mm512_storeu_si512(to + i * NR * 4, r[i]);
                    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), r[i]);
                }
            }
            _mm512_storeu_si512(out.start + at * wide + n, minus_128_times(sums));
        }
    fill_up(out, K, N);
}

enum { ACROSS = 64 }; /* columns that are turned at a time: two cache lines of bfloat16 */

/* Words (16, ACROSS) -> one word of each of 16 rows after the other, for each 16 of `columns`, `apart` bytes from one 16 to the next. */
static inline void turn_words(const int32_t *words, int64_t columns, uint8_t *out, int64_t apart) {
    for (int64_t n = 0; n < ACROSS && n < columns; n += 16, out += apart) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(words + i * ACROSS + n);
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * 64, r[i]);
    }
}

/* source (K, N), scales of columns -> panels of B (width 32), or of a transposed A (128 added, and scales (N, blocks)): in panels (width 8) or
 * tiles (width 16). */
static inline __attribute__((always_inline)) void turned8(const char *source, int f32, int64_t stride, int64_t K, int64_t N, int64_t block,
                                                          int64_t width, Side out, Faults *faults) {
    int64_t words = out.length / 4, blocks = (K + block - 1) / block, wide = up(N, NR), size = f32 ? 4 : 2;
    int32_t turned[TILE_ROWS * ACROSS] __attribute__((aligned(64)));
    const __m512i flip = _mm512_set1_epi8(width == NR ? 0 : (char)0x80), upper = _mm512_set1_epi32((int)0xffff0000);
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i mixed = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    for (int64_t k = 0, at = 0; at < blocks; at++, k += block)
        for (int64_t n = 0; n < N; n += ACROSS) {
            int64_t length = K - k < block ? K - k : block;
            const char *from = source + (k * stride + n) * size;
            __m512i most[4], sums[4];
            __mmask32 mask[2] = {first32(N - n), first32(N - n - 32)};
            __mmask16 use[4];
            __m512 factor[4];
            float amax[ACROSS], inverse[ACROSS], scale[ACROSS];
            for (int h = 0; h < 4; h++) most[h] = sums[h] = _mm512_setzero_si512();
            for (int64_t r = 0; r < length; r++)
                for (int h = 0; h < 2; h++) {
                    const char *x = from + (r * stride + 32 * h) * size;
                    if (f32) {
                        __m512 v[2];
                        load32(x, 1, mask[h], v);
                        for (int i = 0; i < 2; i++) most[2 * h + i] = _mm512_max_epi32(most[2 * h + i], (__m512i)_mm512_abs_ps(v[i]));
                    } else
                        most[2 * h] = _mm512_max_epu16(most[2 * h], magnitudes(x, 0, mask[h]));
                }
            for (int h = 0; h < 2; h++) { /* bfloat16: the even columns, then the odd ones */
                _mm512_storeu_si512(amax + 32 * h, f32 ? most[2 * h] : _mm512_slli_epi32(most[2 * h], 16));
                _mm512_storeu_si512(amax + 32 * h + 16, f32 ? most[2 * h + 1] : _mm512_and_si512(most[2 * h], upper));
            }
            for (int64_t i = 0; i < ACROSS; i++) {
                int64_t column = n + (f32 ? i : i / 32 * 32 + i % 16 * 2 + i / 16 % 2);
                scale_of(column < N ? amax[i] : 0.0f, scale + i, inverse + i, faults);
                if (width == NR && column < wide)
                    out.scale[at * wide + column] = scale[i];
                else if (width != NR && column < N)
                    out.scale[column * blocks + at] = scale[i];
            }
            for (int h = 0; h < 4; h++) {
                factor[h] = _mm512_loadu_ps(inverse + 16 * h);
                /* numbers whose scale is no number are left out: infinity times 0 would not be 0 */
                use[h] = _mm512_cmp_ps_mask(factor[h], _mm512_setzero_ps(), _CMP_NEQ_OQ);
            }
            for (int64_t r = 0; r < length; r += 4) {
                for (int g = 0; g < 2; g++) {
                    __m512 v[4][2];
                    __m512i word[2];
                    for (int q = 0; q < 4; q++) load32(from + ((r + q) * stride + 32 * g) * size, f32, r + q < length ? mask[g] : 0, v[q]);
                    for (int h = 0; h < 2; h++) {
                        __m512i x[4];
                        for (int q = 0; q < 4; q++)
                            x[q] = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(use[2 * g + h], v[q][h], factor[2 * g + h]));
                        __m512i low = _mm512_packs_epi32(x[0], x[1]), high = _mm512_packs_epi32(x[2], x[3]);
                        word[h] = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_packs_epi16(low, high), turn), flip);
                    }
                    if (!f32) {
                        __m512i even = word[0];
                        word[0] = _mm512_permutex2var_epi32(even, mixed, word[1]);
                        word[1] = _mm512_permutex2var_epi32(even, _mm512_add_epi32(mixed, _mm512_set1_epi32(8)), word[1]);
                    }
                    int64_t p = (k + r) / 4, place = n + 32 * g;
                    if (width == NR) {
                        if (place >= wide) continue;
                        for (int h = 0; h < 2; h++) {
                            _mm512_storeu_si512(out.words + ((place / NR * words + p) * NR + 16 * h) * 4, word[h]);
                            sums[2 * g + h] = _mm512_dpbusd_epi32(sums[2 * g + h], _mm512_set1_epi8(1), word[h]);
                        }
                    } else if (width == MR)
                        for (int h = 0; h < 4; h++) {
                            __m256i part = h % 2 ? _mm512_extracti64x4_epi64(word[h / 2], 1) : _mm512_castsi512_si256(word[h / 2]);
                            uint8_t *to = out.words + ((place / MR + h) * words + p) * MR * 4;
                            if (place + MR * h < N) _mm256_storeu_si256((__m256i *)to, part);
                        }
                    else
                        for (int h = 0; h < 2; h++) _mm512_store_si512(turned + p % 16 * ACROSS + 32 * g + 16 * h, word[h]);
                }
                if (width == TILE_ROWS && (r + 4 >= length || (k + r) % TILE_BYTES == TILE_BYTES - 4))
                    turn_words(turned, N - n, out.words + n * out.length + (k + r) / TILE_BYTES * TILE_SIZE, TILE_ROWS * out.length);
            }
            if (width == NR)
                for (int h = 0; h < 4 && n + 16 * h < wide; h++)
                    _mm512_storeu_si512(out.start + at * wide + n + 16 * h, minus_128_times(sums[h]));
        }
    if (width == NR) fill_up(out, K, N);
}

typedef struct {
    int64_t words, block, blocks, wide; /* words of the inner dimension, words of a block, blocks, columns of B's tables */
} Inner;

/* 16 sums of a block times their scale, to those of the blocks before in `part`; after the last block to where they belong, `to` (+ base). */
static inline __attribute__((always_inline)) void put_sums(__m512i sums, __m512 scale, int first_block, int last_block, float *part,
                                                           __mmask16 mask, void *to, int kind, const bf16 *base) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
    __asm__("" : "+v"(value)); /* rounded: adding it must not be fused in one path and not in the other */
    if (!first_block) value = _mm512_add_ps(value, _mm512_load_ps(part));
    if (!last_block) {
        _mm512_store_ps(part, value);
        return;
    }
    if (base) value = _mm512_add_ps(value, (__m512)_mm512_slli_epi32(widen(base, mask), 16));
    if (kind == TO_BF16)
        _mm256_mask_storeu_epi16(to, mask, narrow(value));
    else
        _mm512_mask_storeu_ps(to, mask, value);
}

/* One tile: rows (<= 8) x 32 columns. Word (i, p) of A lies at a[i * a_row + p * a_word]; scale (i, block) at a_scale[i * blocks + block]. */
static inline __attribute__((always_inline)) void tile8(int rows, int halves, Inner inner, const int32_t *a, int64_t a_row, int64_t a_word,
                                                        const float *a_scale, const int32_t *b, const float *b_scale, const int32_t *start,
                                                        void *c, int64_t stride, int kind, const bf16 *base, int64_t base_stride,
                                                        int64_t columns, float *partial) {
    for (int64_t block = 0; block < inner.blocks; block++) {
        __m512i sum[MR][2];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) sum[i][h] = _mm512_loadu_si512(start + block * inner.wide + 16 * h);
        int64_t stop = (block + 1) * inner.block < inner.words ? (block + 1) * inner.block : inner.words;
        if (kind == TO_F32) /* a weight's gradient is in no cache: its lines come while the sums are made */
            for (int i = 0; i < rows; i++)
                for (int h = 0; h < halves; h++) __builtin_prefetch((float *)c + i * stride + 16 * h, 1);
        for (int64_t p = block * inner.block; p < stop; p++) {
            __m512i b0 = _mm512_load_si512(b + p * NR), b1 = b0;
            if (halves == 2) b1 = _mm512_load_si512(b + p * NR + 16);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                __m512i x = _mm512_set1_epi32(a[i * a_row + p * a_word]);
                sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], x, b0);
                if (halves == 2) sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], x, b1);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_scale[i * inner.blocks + block]), _mm512_loadu_ps(b_scale + block * inner.wide + 16 * h));
                void *to = kind == TO_BF16 ? (void *)((bf16 *)c + i * stride + 16 * h) : (float *)c + i * stride + 16 * h;
                /* partial sums in memory: registers hold the integer sums */
                put_sums(sum[i][h], scale, block == 0, block + 1 == inner.blocks, partial + i * NR + 16 * h, first(columns - 16 * h), to, kind,
                         base ? base + i * base_stride + 16 * h : 0);
            }
    }
}

#ifdef TILES
/* Sums of 16 or 32 rows and 16 or 32 columns over so many tiles -> (32, 32); from A's rows to the next 16 it is `apart` bytes. */
TILES static inline __attribute__((always_inline)) void block8(int two_rows, int two_columns, int64_t tiles, const uint8_t *a, int64_t apart,
                                                               const uint8_t *b, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t p = 0; p < tiles; p++, a += TILE_SIZE, b += 2 * TILE_SIZE) {
        _tile_loadd(6, b, NR * 4);
        _tile_loadd(4, a, TILE_BYTES);
        _tile_dpbusd(0, 4, 6);
        if (two_columns) _tile_loadd(7, b + 64, NR * 4);
        if (two_columns) _tile_dpbusd(1, 4, 7);
        if (two_rows) _tile_loadd(5, a + apart, TILE_BYTES);
        if (two_rows) _tile_dpbusd(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, NR * 4);
    if (two_columns) _tile_stored(1, sums + 16, NR * 4);
    if (two_rows) _tile_stored(2, sums + 16 * NR, NR * 4);
    if (two_rows && two_columns) _tile_stored(3, sums + 16 * NR + 16, NR * 4);
}

TILES static void multiply8_tiles(int64_t M, int64_t N, int64_t K, int64_t length, Side left, Side right, void *c, int64_t stride, int kind,
                                  const bf16 *base, int64_t base_stride) {
    int32_t sums[32 * NR] __attribute__((aligned(64)));
    float partial[32 * NR] __attribute__((aligned(64)));
    int64_t size = kind == TO_BF16 ? 2 : 4, blocks = (K + length - 1) / length, wide = up(N, NR);
    configure();
    for (int64_t m = 0; m < M; m += 32)
        for (int64_t n = 0; n < N; n += NR)
            for (int64_t at = 0; at < blocks; at++) {
                int64_t rows = M - m < 32 ? M - m : 32, columns = N - n < NR ? N - n : NR, k = at * length;
                int64_t tiles = (up(K - k < length ? K - k : length, TILE_BYTES)) / TILE_BYTES;
                const uint8_t *a = left.words + m * left.length + k * TILE_ROWS, *b = right.words + n * right.length + k * NR;
                if (rows > 16 && columns > 16)
                    block8(1, 1, tiles, a, TILE_ROWS * left.length, b, sums);
                else if (rows > 16)
                    block8(1, 0, tiles, a, TILE_ROWS * left.length, b, sums);
                else if (columns > 16)
                    block8(0, 1, tiles, a, TILE_ROWS * left.length, b, sums);
                else
                    block8(0, 0, tiles, a, TILE_ROWS * left.length, b, sums);
                for (int64_t h = 0; h < columns; h += 16) {
                    __mmask16 mask = first(columns - h);
                    __m512 scale = _mm512_loadu_ps(right.scale + at * wide + n + h);
                    __m512i start = _mm512_loadu_si512(right.start + at * wide + n + h);
                    for (int64_t i = 0; i < rows; i++)
                        put_sums(_mm512_add_epi32(start, _mm512_load_si512(sums + i * NR + h)),
                                 _mm512_mul_ps(_mm512_set1_ps(left.scale[(m + i) * blocks + at]), scale), at == 0, at + 1 == blocks,
                                 partial + i * NR + h, mask, (char *)c + ((m + i) * stride + n + h) * size, kind,
                                 base ? base + (m + i) * base_stride + n + h : 0);
                }
            }
    release_tiles(); /* libraries between two products set the tiles up in their own way */
}
#endif

/* A's word (i, p) without tiles: at m / 8 * a_block + m % 8 * a_row + p * a_word. */
static void multiply8(int64_t M, int64_t N, int64_t K, int64_t length, Side left, int64_t a_row, int64_t a_word, int64_t a_block, Side right,
                      void *c, int64_t stride, int kind, const bf16 *base, int64_t base_stride) {
#ifdef TILES
    if (left.tiles) {
        multiply8_tiles(M, N, K, length, left, right, c, stride, kind, base, base_stride);
        return;
    }
#endif
    Inner inner = {right.length / 4, length / 4, (K + length - 1) / length, up(N, NR)};
    float partial[MR * NR] __attribute__((aligned(64))) = {0};
    int64_t size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0, rows; m < M; m += rows) {
            const int32_t *a = (const int32_t *)left.words + m / MR * a_block + m % MR * a_row, *b = (const int32_t *)right.words + n * inner.words;
            void *to = (char *)c + (m * stride + n) * size;
            const bf16 *from = base ? base + m * base_stride + n : 0;
            int64_t columns = N - n < NR ? N - n : NR;
#define TILE8(R, H) tile8(R, H, inner, a, a_row, a_word, left.scale + m * inner.blocks, b, right.scale + n, right.start + n, to, stride, kind, from, base_stride, columns, partial)
#define ROWS8(R) case R: if (columns > 16) TILE8(R, 2); else TILE8(R, 1); break
            switch (rows = tile_rows(M - m)) {
                ROWS8(1); ROWS8(2); ROWS8(4); ROWS8(8);
            }
        }
}

/* Whether the matrix unit serves M rows of C (of fewer vectors are faster) and these blocks: they must be of whole tiles, but for the last. */
static inline int whole(int64_t M, int64_t K, int64_t block, int64_t tiles) {
    return tiles && tiles_on && M >= TILE_ROWS && (K <= block || block % TILE_BYTES == 0);
}

enum { STRIP = 65536 }; /* bytes of quantised rows of A, which are multiplied while they are in a cache */

/* c (M, N) = a (M, K) times the packed `right` (K, N) (+ base). */
static void rows_times(const bf16 *a, int64_t s_a, Side right, char *c, int64_t s_c, int64_t kind, const bf16 *base, int64_t s_base, int64_t M,
                       int64_t N, int64_t K, int64_t block, Faults *faults) {
    int64_t some = up(STRIP / right.length + 1, 32), size = kind == TO_BF16 ? 2 : 4;
    some = some < M ? some : M;
    Side left = side(11, K, some, block, right.tiles);
    for (int64_t m = 0; m < M; m += some) {
        int64_t rows = M - m < some ? M - m : some;
        rows8(a + m * s_a, s_a, rows, K, block, left, faults);
        multiply8(rows, N, K, block, left, left.length / 4, 1, MR * left.length / 4, right, c + m * s_c * size, s_c, kind,
                  base ? base + m * s_base : 0, s_base);
    }
}

/* c (M, N) = a (M, K) b (N, K)^T (+ base); faults (2,) is added to. Inner blocks of `block`. tiles: by the matrix unit where it serves. */
void int8_nt(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
             int64_t s_base, int64_t M, int64_t N, int64_t K, int64_t block, int64_t tiles, Faults *faults) {
    Side right = side(12, K, N, block, whole(M, K, block, tiles));
    if (f32)
        columns8(b, 1, s_b, K, N, block, right, faults);
    else
        columns8(b, 0, s_b, K, N, block, right, faults);
    rows_times(a, s_a, right, c, s_c, kind, base, s_base, M, N, K, block, faults);
}

/* c (M, N) = a (M, K) b (K, N) (+ base). */
void int8_nn(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
             int64_t s_base, int64_t M, int64_t N, int64_t K, int64_t block, int64_t tiles, Faults *faults) {
    Side right = side(12, K, N, block, whole(M, K, block, tiles));
    if (f32)
        turned8(b, 1, s_b, K, N, block, NR, right, faults);
    else
        turned8(b, 0, s_b, K, N, block, NR, right, faults);
    rows_times(a, s_a, right, c, s_c, kind, base, s_base, M, N, K, block, faults);
}

/* c (M, N) = a (K, M)^T b (K, N). */
void int8_tn(const bf16 *a, int64_t s_a, const bf16 *b, int64_t s_b, void *c, int64_t s_c, int64_t kind, int64_t M, int64_t N, int64_t K,
             int64_t block, int64_t tiles, Faults *faults) {
    Side left = side(11, K, M, block, whole(M, K, block, tiles)), right = side(12, K, N, block, left.tiles);
    if (left.tiles)
        turned8((const char *)a, 0, s_a, K, M, block, TILE_ROWS, left, faults);
    else
        turned8((const char *)a, 0, s_a, K, M, block, MR, left, faults);
    turned8((const char *)b, 0, s_b, K, N, block, NR, right, faults);
    multiply8(M, N, K, block, left, 1, MR, left.length / 4 * MR, right, c, s_c, kind, 0, 0);
}

/* Group e is rows ends[e - 1] to ends[e]. c (S, N) = a (S, K) b[e] (N, K)^T. */
void int8_grouped_nt(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K, int64_t block,
                     int64_t tiles, Faults *faults) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_nt(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, K, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K, block, tiles, faults);
}

/* c (S, N) = a (S, K) b[e] (K, N). */
void int8_grouped_nn(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K, int64_t block,
                     int64_t tiles, Faults *faults) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_nn(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, N, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K, block, tiles, faults);
}

/* c[e] (M, N) = a[group] (., M)^T b[group] (., N). */
void int8_grouped_tn(const bf16 *a, const bf16 *b, char *c, int64_t kind, const int64_t *ends, int64_t E, int64_t M, int64_t N, int64_t block,
                     int64_t tiles, Faults *faults) {
    int64_t size = M * N * (kind == TO_BF16 ? 2 : 4);
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_tn(a + row * M, M, b + row * N, N, c + e * size, N, kind, M, N, ends[e] - row, block, tiles, faults);
        else
            memset(c + e * size, 0, size);
}

/* Seconds of the three products of a linear for so many rows, outputs and inputs by the matrix unit if `on`, the best of a few. */
static double probe(int64_t rows, int64_t outputs, int64_t inputs, int on) {
    bf16 *x = calloc(rows * inputs, 2), *grad = calloc(rows * outputs, 2);
    float *weight = calloc(outputs * inputs, 4);
    void *out = calloc(rows * (outputs + inputs) + outputs * inputs, 4);
    double best = 1.0;
    Faults faults = {0};
    for (int i = 0; i < 6; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        int8_nt(x, inputs, weight, 1, inputs, out, outputs, TO_BF16, 0, 0, rows, outputs, inputs, LONGEST, on, &faults);
        int8_nn(grad, outputs, weight, 1, inputs, out, inputs, TO_BF16, 0, 0, rows, inputs, outputs, LONGEST, on, &faults);
        int8_tn(grad, outputs, x, inputs, out, inputs, TO_F32, outputs, inputs, rows, LONGEST, on, &faults);
        clock_gettime(CLOCK_MONOTONIC, &to);
        double took = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        best = took < best ? took : best;
    }
    free(x), free(grad), free(weight), free(out);
    return best;
}

/* Switch the matrix unit on where it is faster, which takes milliseconds to find out: at a small model's layer and an expert's share
 * (MEASURED of kernels/products.py). */
void choose_tiles(void) {
    if (use_tiles(1)) use_tiles(probe(2048, 128, 128, 1) * probe(320, 128, 64, 1) < probe(2048, 128, 128, 0) * probe(320, 128, 64, 0));
}

/* x (M, N) through a floating-point format in blocks (rows x columns) whose scales are powers of two, and back: `out` (M, N) bfloat16, in
 * which the result is exact. mantissa: its bits; normal: the format's smallest normal number; most: its largest. */
void float8_round(const void *x, int64_t f32, int64_t stride, bf16 *out, int64_t M, int64_t N, int64_t rows, int64_t columns,
                  int64_t mantissa, float normal, float most, Faults *faults) {
    int64_t size = f32 ? 4 : 2, wide = up(N, columns) / columns;
    float *amax = scratch(13, wide * 4), *scale = scratch(14, wide * 4), *inverse = scratch(15, wide * 4);
    const int shift = 23 - (int)mantissa;
    const __m512i half = _mm512_set1_epi32((1 << (shift - 1)) - 1), one = _mm512_set1_epi32(1), keep = _mm512_set1_epi32(-(1 << shift));
    const __m512 small = _mm512_set1_ps(normal), magic = _mm512_set1_ps(ldexpf(normal, -(int)mantissa) * 12582912.0f); /* 1.5 * 2^23 steps */
    for (int64_t m = 0; m < M; m += rows) {
        int64_t high = M - m < rows ? M - m : rows;
        for (int64_t w = 0; w < wide; w++) amax[w] = 0.0f;
        for (int64_t r = 0; r < high; r++) {
            const char *from = (const char *)x + (m + r) * stride * size;
            if (columns == 1)
                for (int64_t n = 0; n < N; n += 16) {
                    __mmask16 mask = first(N - n);
                    __m512i v = _mm512_and_si512((__m512i)load16(from + n * size, f32, mask), _mm512_set1_epi32(0x7fffffff));
                    _mm512_mask_storeu_epi32(amax + n, mask, _mm512_max_epi32(v, _mm512_maskz_loadu_epi32(mask, amax + n)));
                }
            else
                for (int64_t w = 0; w < wide; w++) {
                    float here = amax_of(from + w * columns * size, f32, N - w * columns < columns ? N - w * columns : columns);
                    if (!(here <= amax[w]) && amax[w] == amax[w]) amax[w] = here; /* NaN comes and stays */
                }
        }
        for (int64_t w = 0; w < wide; w++) {
            uint32_t bits, back;
            float ratio = amax[w] / most;
            memcpy(&bits, &ratio, 4);
            scale[w] = inverse[w] = 0.0f;
            if (!(amax[w] <= 3.4028234663852886e38f)) {
                scale[w] = NAN;
                faults->overflow++;
            } else if (amax[w] > 0.0f && ratio < 1.1754943508222875e-38f)
                faults->dead++;
            else if (amax[w] > 0.0f) {
                uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
                bits = exponent << 23, back = (254 - exponent) << 23;
                memcpy(scale + w, &bits, 4);
                memcpy(inverse + w, &back, 4);
            }
        }
        for (int64_t r = 0; r < high; r++) {
            const char *from = (const char *)x + (m + r) * stride * size;
            bf16 *to = out + (m + r) * N;
            for (int64_t n = 0; n < N;) {
                int64_t stop = columns == 1 || n + 16 <= (n / columns + 1) * columns ? 16 : (n / columns + 1) * columns - n;
                if (N - n < stop) stop = N - n;
                __mmask16 mask = first(stop);
                __m512 s = columns == 1 ? _mm512_maskz_loadu_ps(mask, scale + n) : _mm512_set1_ps(scale[n / columns]);
                __m512 i = columns == 1 ? _mm512_maskz_loadu_ps(mask, inverse + n) : _mm512_set1_ps(inverse[n / columns]);
                __mmask16 scaled = mask & _mm512_cmp_ps_mask(i, _mm512_setzero_ps(), _CMP_NEQ_OQ); /* others: infinity times 0 is not 0 */
                __m512 v = _mm512_mul_ps(load16(from + n * size, f32, scaled), i);
                __m512i u = (__m512i)v;
                u = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(u, half), _mm512_and_si512(_mm512_srli_epi32(u, shift), one)), keep);
                __mmask16 denormal = _mm512_cmp_ps_mask(_mm512_abs_ps(v), small, _CMP_LT_OQ);
                __m512 low = _mm512_sub_ps(_mm512_add_ps(v, magic), magic);
                v = _mm512_mul_ps(_mm512_mask_mov_ps((__m512)u, denormal, low), s);
                _mm256_mask_storeu_epi16(to + n, mask, narrow(v));
                n += stop;
            }
        }
    }
}
#endif
