/* bfloat16 matrix products with float32 sums, for processors that multiply pairs of bfloat16 (AVX512_BF16), with or without a matrix unit (AMX).
 *
 * B is packed into panels of 32 columns, pair of rows by pair of rows, so that one 512-bit register holds the pairs of 16 columns; A is
 * read as it lies, or packed likewise where it is transposed. An 8 x 32 block of C stays in registers over the whole inner dimension, or a
 * 32 x 32 block in the tiles of the matrix unit, for which the pairs of a panel are filled up with zeros to a multiple of 16.
 * Included by native.c after vectors.inc. All sizes in numbers, not bytes. The inner dimension of a product must be even, but for `tn`. What is
 * done with these products is in products.inc.
 */
#include "tiles.inc"

static __thread int tiles_on; /* whether this thread's products are the matrix unit's */

/* Switch the matrix unit on or off for the calling thread; -> whether it is on. The processor must have it (amx_bf16). */
int64_t use_tiles(int64_t on) { return tiles_on = on && tiles_allowed(); }

/* Whether it may be used. The processor must have it. */
int64_t may_use_tiles(void) { return tiles_allowed(); }

/* At the beginning and the end of each function that others call: libraries between them set the tiles up in their own way. */
static inline void begin(void) { if (tiles_on) configure(); }
static inline void end(void) { if (tiles_on) release_tiles(); }

/* Pairs of a panel, filled up. */
static inline int64_t filled(int64_t pairs) { return tiles_on ? up(pairs, 16) : pairs; }

/* The left side of a product. Without tiles word p of row m lies at[m / 8 * block + m % 8 * row + p * step]; with tiles, at[m / 16 * block +
 * m % 16 * row + p / 16 * step + p % 16]. */
typedef struct { const int32_t *at; int64_t row, step, block; } Left;

static inline Left rows_of(const bf16 *a, int64_t stride) {
    return tiles_on ? (Left){(const int32_t *)a, stride / 2, 16, 16 * stride / 2} : (Left){(const int32_t *)a, stride / 2, 1, MR * stride / 2};
}

/* Numbers of our own type. */
static inline Held own(const bf16 *at, int64_t stride) { return (Held){at, BFLOAT16, stride, 0}; }

static inline __m512 codes_as_floats(const void *at, __mmask16 mask, float scale) {
    __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(scale));
}

/* Codes of four bits in the lowest bits of words, times scales, narrowed. */
static inline __m256i narrow_codes(__m512i words, __m512 scale) {
    __m512i codes = _mm512_sub_epi32(_mm512_and_si512(words, _mm512_set1_epi32(15)), _mm512_set1_epi32(8));
    return narrow(_mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale));
}

static inline __m512 block_scales(const uint8_t *block) {
    return (__m512)_mm512_slli_epi32(widen((const bf16 *)(block + PANEL * GROUP / 2), 0xffff), 16);
}

/* 16 columns of a row (not of INT4) from column `from`, each in a word. */
static inline __m512i sixteen(Held w, int64_t row, int64_t from, __mmask16 mask) {
    int64_t place = row * w.stride + from;
    if (w.held == BFLOAT16) return widen((const bf16 *)w.at + place, mask);
    __m512 x = w.held == FLOAT32 ? _mm512_maskz_loadu_ps(mask, (const float *)w.at + place)
                                 : codes_as_floats((const int8_t *)w.at + place, mask, w.scale[row]);
    return _mm512_cvtepu16_epi32(narrow(x));
}

/* 16 columns of row `row` of w (K rows) and the one after it, which need not be there. */
static inline __m512i pair(Held w, int64_t row, int64_t K, int64_t from, __mmask16 mask) {
    __m512i low = sixteen(w, row, from, mask);
    return row + 1 < K ? _mm512_or_si512(low, _mm512_slli_epi32(sixteen(w, row + 1, from, mask), 16)) : low;
}

/* INT4 (K, N) -> the panels of `pack_rows`, block by block: 16 rows are 8 pairs, 32 columns a panel. */
static void pack_rows_of_int4(Held w, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = (K + 1) / 2, all = filled(pairs);
    for (int64_t n = 0; n < N; n += NR) {
        int32_t *to = out + n * all;
        for (int64_t k = 0; k < K; k += PANEL) {
            const uint8_t *block = block_of(w, k, n);
            __m512 scale = block_scales(block);
            __m512i r[16];
            for (int q = 0; q < 4; q++) {
                __m512i words = _mm512_loadu_si512(block + q * PANEL * 4);
                for (int j = 0; j < 4; j++, words = _mm512_srli_epi32(words, 8))
                    r[4 * q + j] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_codes(words, scale)),
                                                      narrow_codes(_mm512_srli_epi32(words, 4), scale), 1);
            }
            transpose16(r);
            for (int64_t p = 0; p < 8 && k / 2 + p < pairs; p++) {
                _mm512_storeu_si512(to + (k / 2 + p) * NR, r[p]);
                _mm512_storeu_si512(to + (k / 2 + p) * NR + 16, r[8 + p]);
            }
        }
        memset(to + pairs * NR, 0, (all - pairs) * NR * 4);
    }
}

enum { AHEAD = 16 }; /* rows */

/* Have NR columns of a row come into cache, where it is there: they lie too far apart for the processor to see that they are next. */
static inline void ask_for(Held w, int64_t row, int64_t K, int64_t from) {
    if (row >= K) return;
    int64_t size = w.held == FLOAT32 ? 4 : w.held == BFLOAT16 ? 2 : 1;
    const char *at = (const char *)w.at + (row * w.stride + from) * size;
    for (int64_t i = 0; i < NR * size; i += 64) _mm_prefetch(at + i, _MM_HINT_T0);
}

/* w (K, N) -> panels (N / 32, K / 2, 32) of pairs. */
static void pack_rows(Held w, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = (K + 1) / 2, all = filled(pairs);
    if (w.held == INT4) {
        pack_rows_of_int4(w, K, N, out);
        return;
    }
    for (int64_t n = 0; n < up(N, NR); n += NR) { /* a cache line of columns at a time, down all rows */
        int32_t *to = out + n * all;
        for (int64_t p = 0; p < pairs; p++) {
            ask_for(w, 2 * p + AHEAD, K, n);
            ask_for(w, 2 * p + AHEAD + 1, K, n);
            for (int64_t h = 0; h < NR; h += 16)
                _mm512_storeu_si512(to + p * NR + h, pair(w, 2 * p, K, n + h, first(N - n - h)));
        }
        memset(to + pairs * NR, 0, (all - pairs) * NR * 4);
    }
}

/* source (K, M) bfloat16 -> the left side of a product, its transpose; out: up(M, 16) * filled((K + 1) / 2) words. */
static Left turn(const bf16 *source, int64_t stride, int64_t K, int64_t M, int32_t *out) {
    int64_t pairs = (K + 1) / 2, all = filled(pairs);
    for (int64_t m = 0; m < M; m += 16)
        for (int64_t p = 0; p < all; p += 16) {
            __m512i r[16];
            __mmask16 mask = first(M - m);
            int64_t count = all - p < 16 ? all - p : 16;
            for (int64_t i = 0; i < count; i++) {
                r[i] = p + i >= pairs ? _mm512_setzero_si512() : pair(own(source, stride), 2 * (p + i), K, m, mask);
            }
            if (tiles_on) {
                transpose16(r);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + m * all + p * 16 + i * 16, r[i]);
            } else
                for (int64_t i = 0; i < count; i++) {
                    _mm256_storeu_si256((__m256i *)(out + (m / MR * pairs + p + i) * MR), _mm512_castsi512_si256(r[i]));
                    _mm256_storeu_si256((__m256i *)(out + ((m / MR + 1) * pairs + p + i) * MR), _mm512_extracti64x4_epi64(r[i], 1));
                }
        }
    return tiles_on ? (Left){out, 16, 256, 16 * all} : (Left){out, 1, MR, MR * pairs};
}

/* INT4 (N, K) -> the panels of `pack_columns`: a block is 16 columns of 16 pairs. */
static void pack_columns_of_int4(Held w, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = K / 2; /* a multiple of 16 */
    for (int64_t n = 0; n < up(N, NR); n += PANEL)
        for (int64_t p = 0; p < pairs; p += 16) {
            int32_t *to = out + (n / NR * pairs + p) * NR + n % NR;
            if (n >= N) {
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * NR, _mm512_setzero_si512());
                continue;
            }
            const uint8_t *block = block_of(w, n, 2 * p);
            __m512 scale = block_scales(block);
            for (int i = 0; i < 16; i++) { /* pairs 0 to 7 have low halves of bytes, the rest high ones */
                __m512i quad = _mm512_loadu_si512(block + i % 8 / 2 * PANEL * 4);
                __m512i words = _mm512_srli_epi32(quad, i % 2 * 16 + i / 8 * 4);
                __m512i low = _mm512_cvtepu16_epi32(narrow_codes(words, scale));
                __m512i high = _mm512_cvtepu16_epi32(narrow_codes(_mm512_srli_epi32(words, 8), scale));
                _mm512_storeu_si512(to + i * NR, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}

/* w (N, K), K even -> the same panels of its transpose. */
static void pack_columns(Held w, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = K / 2, all = filled(pairs);
    if (w.held == INT4) {
        pack_columns_of_int4(w, K, N, out);
        return;
    }
    for (int64_t n = 0; n < up(N, NR); n += 16)
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512i r[16];
            __mmask16 mask = first(pairs - p);
            for (int i = 0; i < 16; i++) {
                int64_t place = (n + i) * w.stride + 2 * p;
                __mmask16 left = first(K - 2 * p), right = first(K - 2 * p - 16);
                if (n + i >= N)
                    r[i] = _mm512_setzero_si512();
                else if (w.held == BFLOAT16)
                    r[i] = _mm512_maskz_loadu_epi32(mask, (const bf16 *)w.at + place);
                else if (w.held == FLOAT32) {
                    const float *x = (const float *)w.at + place;
                    __m512 a = _mm512_maskz_loadu_ps(left, x), b = _mm512_maskz_loadu_ps(right, x + 16);
                    r[i] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
                } else {
                    const int8_t *x = (const int8_t *)w.at + place;
                    float scale = w.scale[n + i];
                    __m512 a = codes_as_floats(x, left, scale), b = codes_as_floats(x + 16, right, scale);
                    r[i] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
                }
            }
            transpose16(r);
            int64_t stop = all - p < 16 ? all - p : 16;
            for (int64_t i = 0; i < stop; i++) _mm512_storeu_si512(out + (n / NR * all + p + i) * NR + n % NR, r[i]);
        }
}

/* Up to 16 sums of a row of C (+ base), to where they belong. */
static inline __attribute__((always_inline)) void put_words(__m512 value, __mmask16 mask, void *to, int kind, const bf16 *base) {
    if (base) value = _mm512_add_ps(value, (__m512)_mm512_slli_epi32(widen(base, mask), 16));
    if (kind == TO_BF16)
        _mm256_mask_storeu_epi16(to, mask, narrow(value));
    else {
        if (kind == ADD_F32) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, value);
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
            void *to = kind == TO_BF16 ? (void *)((bf16 *)c + i * stride + 16 * h) : (float *)c + i * stride + 16 * h;
            put_words(sum[i][h], first(columns - 16 * h), to, kind, base ? base + i * base_stride + 16 * h : 0);
        }
}

#ifdef TILES
/* A's rows from `start` (at most 32) in 2 x filled(pairs) / 16 contiguous tiles, zeros where there are none; rows as `rows_of` gives them. */
static Left copied(Left a, int64_t start, int64_t rows, int64_t pairs) {
    int64_t all = up(pairs, 16);
    int32_t *out = scratch(15, 32 * all * 4);
    for (int64_t m = 0; m < 32; m++)
        for (int64_t p = 0; p < all; p += 16)
            _mm512_storeu_si512(out + m / 16 * 16 * all + m % 16 * 16 + p * 16,
                                m < rows ? _mm512_maskz_loadu_epi32(first(pairs - p), a.at + (start + m) * a.row + p) : _mm512_setzero_si512());
    return (Left){out, 16, 256, 16 * all};
}

/* A block of C: two tiles of A and two of B at most, times 16 pairs at a time. */
TILES static inline __attribute__((always_inline)) void block(int two_rows, int two_columns, int64_t tiles, const int32_t *a, Left left,
                                                              const int32_t *b, float *c, int64_t stride, int add) {
    if (add) {
        _tile_loadd(0, c, stride * 4);
        if (two_columns) _tile_loadd(1, c + 16, stride * 4);
        if (two_rows) _tile_loadd(2, c + 16 * stride, stride * 4);
        if (two_rows && two_columns) _tile_loadd(3, c + 16 * stride + 16, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < tiles; p++, a += left.step, b += 16 * NR) {
        _tile_loadd(6, b, NR * 4);
        _tile_loadd(4, a, left.row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) _tile_loadd(7, b + 16, NR * 4);
        if (two_columns) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_loadd(5, a + left.block, left.row * 4);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, stride * 4);
    if (two_columns) _tile_stored(1, c + 16, stride * 4);
    if (two_rows) _tile_stored(2, c + 16 * stride, stride * 4);
    if (two_rows && two_columns) _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

enum { NEAR = 1 << 20 }; /* bytes of packed B that stay in a core's second-level cache (2 MB wherever there is AMX) while A's rows pass */

/* A product whose packed B is no larger than that. */
TILES static void multiply_near(int64_t M, int64_t N, int64_t pairs, Left a, const int32_t *b, int64_t panel, void *c, int64_t stride,
                                 int kind, const bf16 *base, int64_t base_stride) {
    float sums[32 * NR] __attribute__((aligned(64)));
    int64_t size = kind == TO_BF16 ? 2 : 4;
    int as_it_lies = a.step == 16; /* then tiles must not reach beyond rows or pairs that are there */
    for (int64_t m = 0; m < M; m += 32) {
        int64_t rows = M - m < 32 ? M - m : 32;
        Left left = a;
        left.at += m / 16 * a.block;
        if (as_it_lies && (rows % 16 || pairs % 16)) left = copied(a, m, rows, pairs);
        for (int64_t n = 0; n < N; n += NR) {
            const int32_t *right = b + n / NR * panel;
            int64_t columns = N - n < NR ? N - n : NR, tiles = (pairs + 15) / 16;
            char *to = (char *)c + (m * stride + n) * size;
            int direct = kind != TO_BF16 && !base && rows % 16 == 0 && columns % 16 == 0, add = direct && kind == ADD_F32;
            float *out = direct ? (float *)to : sums;
            int64_t out_stride = direct ? stride : NR;
            if (rows > 16 && columns > 16)
                block(1, 1, tiles, left.at, left, right, out, out_stride, add);
            else if (rows > 16)
                block(1, 0, tiles, left.at, left, right, out, out_stride, add);
            else if (columns > 16)
                block(0, 1, tiles, left.at, left, right, out, out_stride, add);
            else
                block(0, 0, tiles, left.at, left, right, out, out_stride, add);
            if (direct) continue;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t h = 0; h < columns; h += 16) {
                    __mmask16 mask = first(columns - h);
                    __m512 value = _mm512_load_ps(sums + i * NR + h);
                    put_words(value, mask, to + (i * stride + h) * size, kind, base ? base + (m + i) * base_stride + n + h : 0);
                }
        }
    }
}

/* As many columns at a time as are near, in parts of about one size: from the third-level cache tiles come at a tenth of the unit's rate. */
static void multiply_tiles(int64_t M, int64_t N, int64_t pairs, Left a, const int32_t *b, int64_t panel, void *c, int64_t stride,
                           int kind, const bf16 *base, int64_t base_stride) {
    int64_t all = up(N, NR) / NR, bytes = up(pairs, 16) * NR * 4, parts = (all * bytes + NEAR - 1) / NEAR;
    int64_t some = parts > 1 ? (all + parts - 1) / parts * NR : N, size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += some)
        multiply_near(M, N - n < some ? N - n : some, pairs, a, b + n / NR * panel, panel, (char *)c + n * size, stride, kind,
                      base ? base + n : 0, base_stride);
}
#endif

/* C (M, N) from A's words and packed B, whose panels are `panel` words apart; size: bytes of C's numbers. */
static void multiply(int64_t M, int64_t N, int64_t pairs, Left a, const int32_t *b, int64_t panel, void *c, int64_t stride, int kind,
                     const bf16 *base, int64_t base_stride) {
#ifdef TILES
    if (tiles_on) {
        multiply_tiles(M, N, pairs, a, b, panel, c, stride, kind, base, base_stride);
        return;
    }
#endif
    int64_t size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0, rows; m < M; m += rows) {
            const int32_t *words = a.at + m / MR * a.block + m % MR * a.row, *right = b + n / NR * panel;
            void *to = (char *)c + (m * stride + n) * size;
            const bf16 *from = base ? base + m * base_stride + n : 0;
            int64_t columns = N - n < NR ? N - n : NR;
#define TILE(R, H) tile(R, H, pairs, words, a.row, a.step, right, to, stride, kind, from, base_stride, columns)
#define ROWS(R) case R: if (columns > 16) TILE(R, 2); else TILE(R, 1); break
            switch (rows = tile_rows(M - m)) {
                ROWS(1); ROWS(2); ROWS(4); ROWS(8);
            }
        }
}

static int32_t *panels(int slot, int64_t K, int64_t N) { return scratch(slot, up(N, NR) * filled((K + 1) / 2) * 4); }

/* Of what `turn` makes. */
static int32_t *left_words(int slot, int64_t K, int64_t M) { return scratch(slot, up(M, 16) * filled((K + 1) / 2) * 4); }

/* Words from a panel to the next. */
static inline int64_t apart(int64_t K) { return filled((K + 1) / 2) * NR; }

enum { TO_NUMBER = TO_BF16, OWN = BFLOAT16, SKEW = 0, TOKENS = OWN_HEAD_TOKENS, SUMMED = TOKENS, QUERIES = 64 };
#define LONG INT64_MAX

#define number bf16
#define word int32_t
#define get get_bf16
#define put put_bf16
#define NAME(name) name##_bf16
#define WORDS(numbers) (((numbers) + 1) / 2)
#include "products.inc"

/* Gradients of q, k, v from that of out (B, T, H, G, V); the probabilities are computed again from log_sum. */
void attention_backward(const number *q, const number *k, const number *v, const int32_t *first_key, float scale, const number *out,
                        const float *log_sum, const number *grad, number *grad_q, number *grad_k, number *grad_v, int64_t B, int64_t H, int64_t T,
                        int64_t G, int64_t K, int64_t V) {
    int64_t width = up(T, NR) + SKEW, s_q = G * K, s_out = H * G * V;
    word *keys = panels(0, K, T), *values = panels(1, V, T), *key_rows = panels(4, T, K);
    float *scores = scratch(2, QUERIES * width * 4), *upper = scratch(5, QUERIES * width * 4);
    number *weights = scratch(3, QUERIES * width * sizeof(number)), *slopes = scratch(6, QUERIES * width * sizeof(number));
    float *sum_k = scratch(7, T * K * 4), *sum_v = scratch(8, T * V * 4);
    word *words = left_words(9, QUERIES, T), *right = panels(10, QUERIES, K > V ? K : V);
    begin();
    for (int64_t bh = 0; bh < B * H; bh++) {
        pack_columns(own(k + bh * T * K, K), K, T, keys);
        pack_columns(own(v + bh * T * V, V), V, T, values);
        pack_rows(own(k + bh * T * K, K), T, K, key_rows);
        memset(sum_k, 0, T * K * 4);
        memset(sum_v, 0, T * V * 4);
        for (int64_t part = 0; part < up(T, QUERIES) / QUERIES * G; part++) {
            int64_t start = part / G * QUERIES, R = T - start < QUERIES ? T - start : QUERIES, S = start + R, some = WORDS(R);
            int64_t place = (bh * T + start) * G + part % G;
            const number *qs = q + place * K, *o = out + (((bh / H * T + start) * H + bh % H) * G + part % G) * V, *g = grad + (o - out);
            multiply(R, S, WORDS(K), rows_of(qs, s_q), keys, apart(K), scores, width, TO_F32, 0, 0);
            multiply(R, S, WORDS(V), rows_of(g, s_out), values, apart(V), upper, width, TO_F32, 0, 0);
            for (int64_t r = 0; r < R; r++) {
                const float *x = scores + r * width, *y = upper + r * width;
                number *w = weights + r * width, *d = slopes + r * width;
                int64_t low = first_key ? first_key[bh / H * T + start + r] : 0, high = start + r + 1;
                float dot = 0.0f, log_total = log_sum[place + r * G];
                SUM(dot) for (int64_t i = 0; i < V; i++) dot += get(o[r * s_out + i]) * get(g[r * s_out + i]);
                memset(w, 0, low * sizeof(number));
                memset(d, 0, low * sizeof(number));
                SIMD for (int64_t j = low; j < high; j++) {
                    float p = exp_(x[j] * scale - log_total);
                    w[j] = put(p);
                    d[j] = put(p * (y[j] - dot) * scale);
                }
                memset(w + high, 0, (width - high) * sizeof(number));
                memset(d + high, 0, (width - high) * sizeof(number));
            }
            multiply(R, K, WORDS(S), rows_of(slopes, width), key_rows, apart(T), grad_q + place * K, s_q, TO_NUMBER, 0, 0);
            pack_rows(own(qs, s_q), R, K, right);
            multiply(S, K, some, turn(slopes, width, R, S, words), right, apart(R), sum_k, K, ADD_F32, 0, 0);
            pack_rows(own(g, s_out), R, V, right);
            multiply(S, V, some, turn(weights, width, R, S, words), right, apart(R), sum_v, V, ADD_F32, 0, 0);
        }
        SIMD for (int64_t i = 0; i < T * K; i++) grad_k[bh * T * K + i] = put(sum_k[i]);
        SIMD for (int64_t i = 0; i < T * V; i++) grad_v[bh * T * V + i] = put(sum_v[i]);
    }
    end();
}
