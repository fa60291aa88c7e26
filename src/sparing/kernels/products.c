/* bfloat16 matrix products with float32 sums, for processors that multiply pairs of bfloat16 (AVX512_BF16) but have no matrix unit.
 *
 * B is packed into panels of 32 columns, pair of rows by pair of rows, so that one 512-bit register holds the pairs of 16 columns; A is
 * read as it lies, or packed likewise where it is transposed. An 8 x 32 tile of C stays in registers over the whole inner dimension.
 * Included by native.c. All sizes in numbers, not bytes. The inner dimension of a product must be even, but for `tn`.
 */
#ifdef __AVX512BF16__
#include <immintrin.h>
#include <stdlib.h>

enum { MR = 8, NR = 32 };
enum { TO_BF16, TO_F32, ADD_F32 };

/* Scratch of this thread that only grows; slot: which of them. */
static void *scratch(int slot, int64_t bytes) {
    static __thread struct { void *at; int64_t bytes; } slots[8];
    if (slots[slot].bytes < bytes) {
        free(slots[slot].at);
        slots[slot].at = aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
        slots[slot].bytes = slots[slot].at ? bytes : 0;
        if (!slots[slot].at) abort();
    }
    return slots[slot].at;
}

static inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static inline __m512i widen(const bf16 *x, __mmask16 mask) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)); }

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* 16 columns of a pair of rows; `low` may be there without `high`. */
static inline __m512i pair(const void *low, const void *high, int f32, __mmask16 mask) {
    __m512i a, b = _mm512_setzero_si512();
    if (f32) {
        a = _mm512_cvtepu16_epi32(narrow(_mm512_maskz_loadu_ps(mask, low)));
        if (high) b = _mm512_cvtepu16_epi32(narrow(_mm512_maskz_loadu_ps(mask, high)));
    } else {
        a = widen(low, mask);
        if (high) b = widen(high, mask);
    }
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

/* source (K, N) -> panels (N / 32, K / 2, 32) of pairs; width: 32 for B, or 8 for a transposed A. */
static void pack_rows(const void *source, int f32, int64_t stride, int64_t K, int64_t N, int64_t width, int32_t *out) {
    int64_t pairs = (K + 1) / 2, size = f32 ? 4 : 2;
    const char *s = source;
    for (int64_t p = 0; p < pairs; p++) {
        const char *low = s + 2 * p * stride * size, *high = 2 * p + 1 < K ? low + stride * size : 0;
        for (int64_t n = 0; n < up(N, width); n += 16) {
            __m512i words = pair(low + n * size, high ? high + n * size : 0, f32, first(N - n));
            if (width == NR)
                _mm512_storeu_si512(out + (n / NR * pairs + p) * NR + n % NR, words);
            else {
                _mm256_storeu_si256((__m256i *)(out + (n / MR * pairs + p) * MR), _mm512_castsi512_si256(words));
                if (n + MR < up(N, width))
                    _mm256_storeu_si256((__m256i *)(out + ((n + MR) / MR * pairs + p) * MR), _mm512_extracti64x4_epi64(words, 1));
            }
        }
    }
}

static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* source (N, K), K even -> the same panels of its transpose. */
static void pack_columns(const void *source, int f32, int64_t stride, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = K / 2, size = f32 ? 4 : 2;
    for (int64_t n = 0; n < up(N, NR); n += 16)
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512i r[16];
            __mmask16 mask = first(pairs - p);
            for (int i = 0; i < 16; i++) {
                const char *s = (const char *)source + ((n + i) * stride + 2 * p) * size;
                if (n + i >= N)
                    r[i] = _mm512_setzero_si512();
                else if (f32) {
                    __m512 a = _mm512_maskz_loadu_ps(first(K - 2 * p), s), b = _mm512_maskz_loadu_ps(first(K - 2 * p - 16), s + 64);
                    r[i] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
                } else
                    r[i] = _mm512_maskz_loadu_epi32(mask, s);
            }
            transpose16(r);
            int64_t stop = pairs - p < 16 ? pairs - p : 16;
            for (int64_t i = 0; i < stop; i++) _mm512_storeu_si512(out + (n / NR * pairs + p + i) * NR + n % NR, r[i]);
        }
}

/* One tile: rows (<= 8) x 32 columns over all pairs. Word (i, p) of A lies at a[i * a_row + p * a_pair]. */
static inline __attribute__((always_inline)) void tile(int rows, int halves, int64_t pairs, const int32_t *a, int64_t a_row, int64_t a_pair,
                                                       const int32_t *b, void *c, int64_t stride, int kind, const bf16 *base,
                                                       int64_t base_stride, int64_t columns) {
    __m512 sum[MR][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh b0 = (__m512bh)_mm512_load_si512(b + p * NR), b1 = b0;
        if (halves == 2) b1 = (__m512bh)_mm512_load_si512(b + p * NR + 16);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[i * a_row + p * a_pair]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
            if (halves == 2) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            __mmask16 mask = first(columns - 16 * h);
            __m512 value = sum[i][h];
            if (base) value = _mm512_add_ps(value, (__m512)_mm512_slli_epi32(widen(base + i * base_stride + 16 * h, mask), 16));
            if (kind == TO_BF16)
                _mm256_mask_storeu_epi16((bf16 *)c + i * stride + 16 * h, mask, narrow(value));
            else {
                float *to = (float *)c + i * stride + 16 * h;
                if (kind == ADD_F32) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
                _mm512_mask_storeu_ps(to, mask, value);
            }
        }
}

/* C (M, N) from A's words and packed B. */
static void multiply(int64_t M, int64_t N, int64_t pairs, const int32_t *a, int64_t a_row, int64_t a_pair, int64_t a_block, const int32_t *b,
                     void *c, int64_t stride, int kind, const bf16 *base, int64_t base_stride) {
    int64_t size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0; m < M; m += MR) {
            const int32_t *block = a + m / MR * a_block, *panel = b + n / NR * pairs * NR;
            void *to = (char *)c + (m * stride + n) * size;
            const bf16 *from = base ? base + m * base_stride + n : 0;
            int64_t rows = M - m < MR ? M - m : MR, columns = N - n < NR ? N - n : NR;
#define TILE(R, H) tile(R, H, pairs, block, a_row, a_pair, panel, to, stride, kind, from, base_stride, columns)
            if (columns > 16) {
                if (rows == MR) TILE(MR, 2);
                else for (int64_t i = 0; i < rows; i++) {
                    TILE(1, 2);
                    block += a_row, to = (char *)to + stride * size, from = from ? from + base_stride : 0;
                }
            } else {
                if (rows == MR) TILE(MR, 1);
                else for (int64_t i = 0; i < rows; i++) {
                    TILE(1, 1);
                    block += a_row, to = (char *)to + stride * size, from = from ? from + base_stride : 0;
                }
            }
        }
}

static int32_t *panels(int slot, int64_t K, int64_t N) { return scratch(slot, up(N, NR) * ((K + 1) / 2) * 4); }

/* c (M, N) = a (M, K) b (N, K)^T (+ base). */
void nt(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_columns(b, f32, s_b, K, N, packed);
    multiply(M, N, K / 2, (const int32_t *)a, s_a / 2, 1, MR * s_a / 2, packed, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (M, K) b (K, N) (+ base). */
void nn(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_rows(b, f32, s_b, K, N, NR, packed);
    multiply(M, N, K / 2, (const int32_t *)a, s_a / 2, 1, MR * s_a / 2, packed, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (K, M)^T b (K, N). */
void tn(const bf16 *a, int64_t s_a, const bf16 *b, int64_t s_b, void *c, int64_t s_c, int64_t kind, int64_t M, int64_t N, int64_t K) {
    int64_t pairs = (K + 1) / 2;
    int32_t *packed = panels(0, K, N), *turned = scratch(1, up(M, 16) * pairs * 4);
    pack_rows(b, 0, s_b, K, N, NR, packed);
    pack_rows(a, 0, s_a, K, M, MR, turned);
    multiply(M, N, pairs, turned, 1, MR, pairs * MR, packed, c, s_c, kind, 0, 0);
}
#endif
