/* 8-bit integer matrix products, int32 sums of u8 x s8 (AVX512_VNNI's vpdpbusd), quantised on the way in; rounding to small floats.
 *
 * The inner dimension is cut into blocks (a multiple of 4 long, at most 32768: the sums fit). In each block every row of A and every column
 * of B has its own scale, amax / 127; blocks add up in float32. A's numbers are stored with 128 added, which the start of each column's sum
 * takes off again. B lies in panels of 32 columns, four rows to a word; A in rows of words, or in panels of 8 where it is transposed.
 * A block with an infinity or NaN makes its row or column NaN, one too small to scale counts as zeros; both are counted.
 * precision/products.py is the plain form.
 */
#include "numbers.inc"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "vectors.inc"

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

/* 64 numbers, of which n are there, to bytes in order. */
static inline __m512i bytes64(const char *x, int f32, int64_t n, __m512 inverse) {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i q[4];
    for (int i = 0; i < 4; i++) q[i] = quantise16(load16(x + 16 * i * (f32 ? 4 : 2), f32, first(n - 16 * i)), inverse);
    __m512i low = _mm512_packs_epi32(q[0], q[1]), high = _mm512_packs_epi32(q[2], q[3]); /* within quarters of a register: put in order after */
    return _mm512_permutexvar_epi32(lanes, _mm512_packs_epi16(low, high));
}

/* The largest magnitude of n numbers; NaN and infinities win, because as integers their bits are the largest. */
static inline float amax_of(const void *x, int f32, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    if (f32)
        for (int64_t i = 0; i < n; i += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(first(n - i), (const float *)x + i), _mm512_set1_epi32(0x7fffffff)));
    else {
        for (int64_t i = 0; i < n; i += 32) {
            __mmask32 mask = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
            most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, (const bf16 *)x + i), _mm512_set1_epi16(0x7fff)));
        }
        most = _mm512_max_epi32(_mm512_slli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0x7fff0000)));
    }
    uint32_t bits = (uint32_t)_mm512_reduce_max_epi32(most);
    float amax;
    memcpy(&amax, &bits, 4);
    return amax;
}

typedef struct {
    uint8_t *words;
    float *scale;  /* A: (M, blocks); B: (blocks, N up to 32) */
    int32_t *start; /* B: (blocks, N up to 32): what the sums start at */
} Side;

static Side side(int slot, int64_t K, int64_t N, int64_t block) {
    int64_t blocks = (K + block - 1) / block, wide = up(N, NR), words = wide * up(K, 4);
    uint8_t *at = scratch(slot, up(words, 64) + blocks * wide * 8);
    return (Side){at, (float *)(at + up(words, 64)), (int32_t *)(at + up(words, 64) + blocks * wide * 4)};
}

/* A (M, K) as it lies -> rows of words with 128 added. */
static void rows8(const bf16 *a, int64_t stride, int64_t M, int64_t K, int64_t block, Side out, Faults *faults) {
    int64_t blocks = (K + block - 1) / block, wide = up(K, 4);
    for (int64_t m = 0; m < M; m++)
        for (int64_t b = 0; b < blocks; b++) {
            const bf16 *from = a + m * stride + b * block;
            int64_t n = K - b * block < block ? K - b * block : block;
            uint8_t *to = out.words + m * wide + b * block;
            float inverse;
            scale_of(amax_of(from, 0, n), out.scale + m * blocks + b, &inverse, faults);
            if (inverse == 0.0f) {
                memset(to, 128, up(n, 4));
                continue;
            }
            __m512 factor = _mm512_set1_ps(inverse);
            for (int64_t i = 0; i < n; i += 64) { /* the exclusive or adds 128 to each byte; past the end zeros, up to the end of the word */
                __m512i bytes = _mm512_xor_si512(bytes64((const char *)(from + i), 0, n - i, factor), _mm512_set1_epi8((char)0x80));
                int64_t stay = up(n, 4) - i;
                if (stay >= 64)
                    _mm512_storeu_si512(to + i, bytes);
                else
                    _mm512_mask_storeu_epi8(to + i, ((__mmask64)1 << stay) - 1, bytes);
            }
        }
}

static inline __m512i minus_128_times(__m512i sums) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7)); }

/* B (N, K) -> panels of its transpose. */
static void columns8(const void *b, int f32, int64_t stride, int64_t K, int64_t N, int64_t block, Side out, Faults *faults) {
    int64_t blocks = (K + block - 1) / block, words = up(K, 4) / 4, wide = up(N, NR), size = f32 ? 4 : 2;
    for (int64_t n = 0; n < wide; n += 16)
        for (int64_t k = 0, at = 0; at < blocks; at++, k += block) {
            int64_t length = K - k < block ? K - k : block;
            float inverse[16];
            __m512i sums = _mm512_setzero_si512();
            for (int i = 0; i < 16; i++) {
                float *scale = out.scale + at * wide + n + i;
                if (n + i < N)
                    scale_of(amax_of((const char *)b + ((n + i) * stride + k) * size, f32, length), scale, inverse + i, faults);
                else
                    *scale = inverse[i] = 0.0f;
            }
            for (int64_t j = 0; j < length; j += 64) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) {
                    r[i] = _mm512_setzero_si512();
                    if (inverse[i] == 0.0f) continue;
                    r[i] = bytes64((const char *)b + ((n + i) * stride + k + j) * size, f32, length - j, _mm512_set1_ps(inverse[i]));
                }
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
}

/* source (K, N), scales of columns -> panels of B (width 32), or of a transposed A (width 8; 128 added, and scales (N, blocks)). */
static void turned8(const void *source, int f32, int64_t stride, int64_t K, int64_t N, int64_t block, int64_t width, Side out, Faults *faults) {
    int64_t blocks = (K + block - 1) / block, words = up(K, 4) / 4, wide = up(N, NR), size = f32 ? 4 : 2;
    const __m512i byte = _mm512_set1_epi32(0xff), magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t k = 0, at = 0; at < blocks; at++, k += block) {
        int64_t length = K - k < block ? K - k : block;
        for (int64_t n = 0; n < up(N, width); n += NR) { /* a cache line of columns at a time, down the block's rows twice */
            __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, sums[2] = {most[0], most[0]};
            __mmask16 mask[2] = {first(N - n), first(N - n - 16)};
            const char *from = (const char *)source + (k * stride + n) * size;
            for (int64_t r = 0; r < length; r++)
                for (int h = 0; h < 2; h++)
                    most[h] = _mm512_max_epi32(
                        most[h], _mm512_and_si512((__m512i)load16(from + (r * stride + 16 * h) * size, f32, mask[h]), magnitude));
            float amax[NR], inverse[NR], scale[NR];
            _mm512_storeu_si512(amax, most[0]);
            _mm512_storeu_si512(amax + 16, most[1]);
            for (int64_t i = 0; i < NR; i++) {
                scale_of(i < N - n ? amax[i] : 0.0f, scale + i, inverse + i, faults);
                if (width == NR)
                    out.scale[at * wide + n + i] = scale[i];
                else if (i < N - n)
                    out.scale[(n + i) * blocks + at] = scale[i];
            }
            __m512 factor[2] = {_mm512_loadu_ps(inverse), _mm512_loadu_ps(inverse + 16)};
            /* numbers whose scale is no number are left out: infinity times 0 would not be 0 */
            for (int h = 0; h < 2; h++) mask[h] &= _mm512_cmp_ps_mask(factor[h], _mm512_setzero_ps(), _CMP_NEQ_OQ);
            for (int64_t r = 0; r < length; r += 4)
                for (int h = 0; h < 2; h++) {
                    __m512i word = _mm512_setzero_si512();
                    for (int64_t q = 0; q < 4 && r + q < length; q++) {
                        __m512i x = quantise16(load16(from + ((r + q) * stride + 16 * h) * size, f32, mask[h]), factor[h]);
                        word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(x, byte), _mm512_set1_epi32(8 * (int)q)));
                    }
                    int64_t p = (k + r) / 4, place = n + 16 * h;
                    if (width == NR) {
                        _mm512_storeu_si512(out.words + ((n / NR * words + p) * NR + 16 * h) * 4, word);
                        sums[h] = _mm512_dpbusd_epi32(sums[h], _mm512_set1_epi8(1), word);
                    } else {
                        word = _mm512_xor_si512(word, _mm512_set1_epi8((char)0x80)); /* adds 128 to each byte */
                        if (place < up(N, MR))
                            _mm256_storeu_si256((__m256i *)(out.words + (place / MR * words + p) * MR * 4), _mm512_castsi512_si256(word));
                        if (place + MR < up(N, MR))
                            _mm256_storeu_si256((__m256i *)(out.words + ((place + MR) / MR * words + p) * MR * 4), _mm512_extracti64x4_epi64(word, 1));
                    }
                }
            if (width == NR)
                for (int h = 0; h < 2; h++) _mm512_storeu_si512(out.start + at * wide + n + 16 * h, minus_128_times(sums[h]));
        }
    }
}

typedef struct {
    int64_t words, block, blocks, wide; /* words of the inner dimension, words of a block, blocks, columns of B's tables */
} Inner;

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
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][h]), scale);
                float *part = partial + i * NR + 16 * h; /* in memory: registers hold the integer sums */
                if (block) value = _mm512_add_ps(value, _mm512_load_ps(part));
                if (block + 1 < inner.blocks) {
                    _mm512_store_ps(part, value);
                    continue;
                }
                __mmask16 mask = first(columns - 16 * h);
                if (base) value = _mm512_add_ps(value, (__m512)_mm512_slli_epi32(widen(base + i * base_stride + 16 * h, mask), 16));
                if (kind == TO_BF16)
                    _mm256_mask_storeu_epi16((bf16 *)c + i * stride + 16 * h, mask, narrow(value));
                else
                    _mm512_mask_storeu_ps((float *)c + i * stride + 16 * h, mask, value);
            }
    }
}

static void multiply8(int64_t M, int64_t N, int64_t K, int64_t length, Side left, int64_t a_row, int64_t a_word, int64_t a_block, Side right,
                      void *c, int64_t stride, int kind, const bf16 *base, int64_t base_stride) {
    Inner inner = {up(K, 4) / 4, length / 4, (K + length - 1) / length, up(N, NR)};
    float partial[MR * NR] __attribute__((aligned(64))) = {0};
    int64_t size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0; m < M; m += MR) {
            const int32_t *a = (const int32_t *)left.words + m / MR * a_block, *b = (const int32_t *)right.words + n * inner.words;
            void *to = (char *)c + (m * stride + n) * size;
            const bf16 *from = base ? base + m * base_stride + n : 0;
            int64_t columns = N - n < NR ? N - n : NR;
#define TILE8(R, H) tile8(R, H, inner, a, a_row, a_word, left.scale + m * inner.blocks, b, right.scale + n, right.start + n, to, stride, kind, from, base_stride, columns, partial)
#define ROWS8(R) case R: if (columns > 16) TILE8(R, 2); else TILE8(R, 1); break
            switch (M - m) {
                ROWS8(1); ROWS8(2); ROWS8(3); ROWS8(4); ROWS8(5); ROWS8(6); ROWS8(7);
                default: if (columns > 16) TILE8(8, 2); else TILE8(8, 1);
            }
        }
}

/* c (M, N) = a (M, K) b (N, K)^T (+ base); faults (2,) is added to. Inner blocks of `block`. */
void int8_nt(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
             int64_t s_base, int64_t M, int64_t N, int64_t K, int64_t block, Faults *faults) {
    Side left = side(11, K, M, block), right = side(12, K, N, block);
    rows8(a, s_a, M, K, block, left, faults);
    columns8(b, f32, s_b, K, N, block, right, faults);
    multiply8(M, N, K, block, left, up(K, 4) / 4, 1, MR * up(K, 4) / 4, right, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (M, K) b (K, N) (+ base). */
void int8_nn(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
             int64_t s_base, int64_t M, int64_t N, int64_t K, int64_t block, Faults *faults) {
    Side left = side(11, K, M, block), right = side(12, K, N, block);
    rows8(a, s_a, M, K, block, left, faults);
    turned8(b, f32, s_b, K, N, block, NR, right, faults);
    multiply8(M, N, K, block, left, up(K, 4) / 4, 1, MR * up(K, 4) / 4, right, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (K, M)^T b (K, N). */
void int8_tn(const bf16 *a, int64_t s_a, const bf16 *b, int64_t s_b, void *c, int64_t s_c, int64_t kind, int64_t M, int64_t N, int64_t K,
             int64_t block, Faults *faults) {
    Side left = side(11, K, M, block), right = side(12, K, N, block);
    turned8(a, 0, s_a, K, M, block, MR, left, faults);
    turned8(b, 0, s_b, K, N, block, NR, right, faults);
    multiply8(M, N, K, block, left, 1, MR, up(K, 4) / 4 * MR, right, c, s_c, kind, 0, 0);
}

/* Group e is rows ends[e - 1] to ends[e]. c (S, N) = a (S, K) b[e] (N, K)^T. */
void int8_grouped_nt(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K, int64_t block,
                     Faults *faults) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_nt(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, K, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K, block, faults);
}

/* c (S, N) = a (S, K) b[e] (K, N). */
void int8_grouped_nn(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K, int64_t block,
                     Faults *faults) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_nn(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, N, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K, block, faults);
}

/* c[e] (M, N) float32 = a[group] (., M)^T b[group] (., N). */
void int8_grouped_tn(const bf16 *a, const bf16 *b, float *c, const int64_t *ends, int64_t E, int64_t M, int64_t N, int64_t block, Faults *faults) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        if (ends[e] > row)
            int8_tn(a + row * M, M, b + row * N, N, c + e * M * N, N, TO_F32, M, N, ends[e] - row, block, faults);
        else
            memset(c + e * M * N, 0, M * N * sizeof(float));
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
