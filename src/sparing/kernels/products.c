/* bfloat16 matrix products with float32 sums, for processors that multiply pairs of bfloat16 (AVX512_BF16), with or without a matrix unit (AMX).
 *
 * B is packed into panels of 32 columns, pair of rows by pair of rows, so that one 512-bit register holds the pairs of 16 columns; A is
 * read as it lies, or packed likewise where it is transposed. An 8 x 32 block of C stays in registers over the whole inner dimension, or a
 * 32 x 32 block in the tiles of the matrix unit, for which the pairs of a panel are filled up with zeros to a multiple of 16.
 * Included by native.c after vectors.inc. All sizes in numbers, not bytes. The inner dimension of a product must be even, but for `tn`.
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

/* source (K, N) -> panels (N / 32, K / 2, 32) of pairs. */
static void pack_rows(const void *source, int f32, int64_t stride, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = (K + 1) / 2, all = filled(pairs), size = f32 ? 4 : 2;
    for (int64_t n = 0; n < up(N, NR); n += NR) { /* a cache line of columns at a time, down all rows */
        int32_t *to = out + n * all;
        for (int64_t p = 0; p < pairs; p++) {
            const char *low = (const char *)source + (2 * p * stride + n) * size, *high = 2 * p + 1 < K ? low + stride * size : 0;
            for (int64_t h = 0; h < NR; h += 16)
                _mm512_storeu_si512(to + p * NR + h, pair(low + h * size, high ? high + h * size : 0, f32, first(N - n - h)));
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
                const bf16 *low = source + 2 * (p + i) * stride + m;
                r[i] = p + i >= pairs ? _mm512_setzero_si512() : pair(low, 2 * (p + i) + 1 < K ? low + stride : 0, 0, mask);
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

/* source (N, K), K even -> the same panels of its transpose. */
static void pack_columns(const void *source, int f32, int64_t stride, int64_t K, int64_t N, int32_t *out) {
    int64_t pairs = K / 2, all = filled(pairs), size = f32 ? 4 : 2;
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

TILES static void multiply_tiles(int64_t M, int64_t N, int64_t pairs, Left a, const int32_t *b, int64_t panel, void *c, int64_t stride,
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

/* c (M, N) = a (M, K) b (N, K)^T (+ base). */
void nt(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_columns(b, f32, s_b, K, N, packed);
    begin();
    multiply(M, N, K / 2, rows_of(a, s_a), packed, apart(K), c, s_c, kind, base, s_base);
    end();
}

/* c (M, N) = a (M, K) b (K, N) (+ base). */
void nn(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_rows(b, f32, s_b, K, N, packed);
    begin();
    multiply(M, N, K / 2, rows_of(a, s_a), packed, apart(K), c, s_c, kind, base, s_base);
    end();
}

/* c (M, N) = a (K, M)^T b (K, N). */
void tn(const bf16 *a, int64_t s_a, const bf16 *b, int64_t s_b, void *c, int64_t s_c, int64_t kind, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_rows(b, 0, s_b, K, N, packed);
    Left turned = turn(a, s_a, K, M, left_words(1, K, M));
    begin();
    multiply(M, N, (K + 1) / 2, turned, packed, apart(K), c, s_c, kind, 0, 0);
    end();
}

/* Group e is rows ends[e - 1] to ends[e]. c (S, N) = a (S, K) b[e] (N, K)^T. */
void grouped_nt(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        nt(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, K, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K);
}

/* c (S, N) = a (S, K) b[e] (K, N). */
void grouped_nn(const bf16 *a, const void *b, int64_t f32, bf16 *c, const int64_t *ends, int64_t E, int64_t N, int64_t K) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        nn(a + row * K, K, (const char *)b + e * N * K * (f32 ? 4 : 2), f32, N, c + row * N, N, TO_BF16, 0, 0, ends[e] - row, N, K);
}

/* c[e] (M, N) float32 = a[group] (., M)^T b[group] (., N). */
void grouped_tn(const bf16 *a, const bf16 *b, void *c, int64_t kind, const int64_t *ends, int64_t E, int64_t M, int64_t N) {
    for (int64_t e = 0, row = 0; e < E; row = ends[e++])
        tn(a + row * M, M, b + row * N, N, (char *)c + e * M * N * (kind == TO_BF16 ? 2 : 4), N, kind, M, N, ends[e] - row);
}

enum { QUERIES = 64 };

/* Causal attention, a block of 64 query rows at a time: their scores stay in cache. q (B, H, T, G, K), k (B, H, T, K), v (B, H, T, V), K and V
 * even: G query heads share keys and values -> out (B, T, H, G, V), log_sum (B, H, T, G) of the exponentials. first: see softmax_forward. */
void attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *first_key, float scale, bf16 *out, float *log_sum, int64_t B,
                       int64_t H, int64_t T, int64_t G, int64_t K, int64_t V) {
    int64_t width = up(T, NR);
    int32_t *keys = panels(0, K, T), *values = panels(1, T, V);
    float *scores = scratch(2, QUERIES * width * 4);
    bf16 *weights = scratch(3, QUERIES * width * 2);
    begin();
    for (int64_t bh = 0; bh < B * H; bh++) {
        pack_columns(k + bh * T * K, 0, K, K, T, keys);
        pack_rows(v + bh * T * V, 0, V, T, V, values);
        for (int64_t part = 0; part < up(T, QUERIES) / QUERIES * G; part++) {
            int64_t start = part / G * QUERIES, g = part % G, R = T - start < QUERIES ? T - start : QUERIES, S = start + R;
            const bf16 *qs = q + ((bh * T + start) * G + g) * K;
            multiply(R, S, K / 2, rows_of(qs, G * K), keys, apart(K), scores, width, TO_F32, 0, 0);
            for (int64_t r = 0; r < R; r++) {
                float *x = scores + r * width, most = -INFINITY, total = 0.0f;
                bf16 *w = weights + r * width;
                int64_t low = first_key ? first_key[bh / H * T + start + r] : 0, high = start + r + 1;
                MAX(most) for (int64_t j = low; j < high; j++) most = x[j] > most ? x[j] : most;
                SUM(total) for (int64_t j = low; j < high; j++) {
                    x[j] = exp_((x[j] - most) * scale);
                    total += x[j];
                }
                log_sum[(bh * T + start + r) * G + g] = logf(total) + most * scale;
                total = 1.0f / total;
                memset(w, 0, low * 2);
                SIMD for (int64_t j = low; j < high; j++) w[j] = put_bf16(x[j] * total);
                memset(w + high, 0, (width - high) * 2);
            }
            multiply(R, V, (S + 1) / 2, rows_of(weights, width), values, apart(T), out + (((bh / H * T + start) * H + bh % H) * G + g) * V,
                     H * G * V, TO_BF16, 0, 0);
        }
    }
    end();
}

/* Gradients of q, k, v from that of out (B, T, H, G, V); the probabilities are computed again from log_sum. */
void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *first_key, float scale, const bf16 *out,
                        const float *log_sum, const bf16 *grad, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, int64_t B, int64_t H, int64_t T,
                        int64_t G, int64_t K, int64_t V) {
    int64_t width = up(T, NR), s_q = G * K, s_out = H * G * V;
    int32_t *keys = panels(0, K, T), *values = panels(1, V, T), *key_rows = panels(4, T, K);
    float *scores = scratch(2, QUERIES * width * 4), *upper = scratch(5, QUERIES * width * 4);
    bf16 *weights = scratch(3, QUERIES * width * 2), *slopes = scratch(6, QUERIES * width * 2);
    float *sum_k = scratch(7, T * K * 4), *sum_v = scratch(8, T * V * 4);
    int32_t *words = left_words(9, QUERIES, T), *right = panels(10, QUERIES, K > V ? K : V);
    begin();
    for (int64_t bh = 0; bh < B * H; bh++) {
        pack_columns(k + bh * T * K, 0, K, K, T, keys);
        pack_columns(v + bh * T * V, 0, V, V, T, values);
        pack_rows(k + bh * T * K, 0, K, T, K, key_rows);
        memset(sum_k, 0, T * K * 4);
        memset(sum_v, 0, T * V * 4);
        for (int64_t part = 0; part < up(T, QUERIES) / QUERIES * G; part++) {
            int64_t start = part / G * QUERIES, R = T - start < QUERIES ? T - start : QUERIES, S = start + R, some = (R + 1) / 2;
            int64_t place = (bh * T + start) * G + part % G;
            const bf16 *qs = q + place * K, *o = out + (((bh / H * T + start) * H + bh % H) * G + part % G) * V, *g = grad + (o - out);
            multiply(R, S, K / 2, rows_of(qs, s_q), keys, apart(K), scores, width, TO_F32, 0, 0);
            multiply(R, S, V / 2, rows_of(g, s_out), values, apart(V), upper, width, TO_F32, 0, 0);
            for (int64_t r = 0; r < R; r++) {
                const float *x = scores + r * width, *y = upper + r * width;
                bf16 *w = weights + r * width, *d = slopes + r * width;
                int64_t low = first_key ? first_key[bh / H * T + start + r] : 0, high = start + r + 1;
                float dot = 0.0f, log_total = log_sum[place + r * G];
                SUM(dot) for (int64_t i = 0; i < V; i++) dot += get_bf16(o[r * s_out + i]) * get_bf16(g[r * s_out + i]);
                memset(w, 0, low * 2);
                memset(d, 0, low * 2);
                SIMD for (int64_t j = low; j < high; j++) {
                    float p = exp_(x[j] * scale - log_total);
                    w[j] = put_bf16(p);
                    d[j] = put_bf16(p * (y[j] - dot) * scale);
                }
                memset(w + high, 0, (width - high) * 2);
                memset(d + high, 0, (width - high) * 2);
            }
            multiply(R, K, (S + 1) / 2, rows_of(slopes, width), key_rows, apart(T), grad_q + place * K, s_q, TO_BF16, 0, 0);
            pack_rows(qs, 0, s_q, R, K, right);
            multiply(S, K, some, turn(slopes, width, R, S, words), right, apart(R), sum_k, K, ADD_F32, 0, 0);
            pack_rows(g, 0, s_out, R, V, right);
            multiply(S, V, some, turn(weights, width, R, S, words), right, apart(R), sum_v, V, ADD_F32, 0, 0);
        }
        SIMD for (int64_t i = 0; i < T * K; i++) grad_k[bh * T * K + i] = put_bf16(sum_k[i]);
        SIMD for (int64_t i = 0; i < T * V; i++) grad_v[bh * T * V + i] = put_bf16(sum_v[i]);
    }
    end();
}

enum { TOKENS = 256 };

/* Head and cross-entropy in chunks of tokens. x (N, D), w (W, D), D and W even -> nll (N,), each times its weight (NULL: 1); the gradients of
 * scale * sum(nll): grad_x (N, D), grad_w (W, D) float32, or NULL where w is frozen. */
void head_loss(const bf16 *x, const void *w, int64_t f32, const int64_t *target, const float *weight, float scale, float *nll, bf16 *grad_x, float *grad_w, int64_t N,
               int64_t D, int64_t W) {
    int32_t *words = panels(0, D, W), *back = panels(1, W, D), *turned = left_words(3, TOKENS, W), *right = panels(4, TOKENS, D);
    bf16 *logits = scratch(2, TOKENS * W * 2);
    pack_columns(w, f32, D, D, W, words);
    pack_rows(w, f32, D, W, D, back);
    begin();
    for (int64_t n = 0; n < N; n += TOKENS) {
        int64_t R = N - n < TOKENS ? N - n : TOKENS, some = (R + 1) / 2;
        const bf16 *rows = x + n * D;
        multiply(R, W, D / 2, rows_of(rows, D), words, apart(D), logits, W, TO_BF16, 0, 0);
        cross_entropy_bf16(logits, target + n, weight ? weight + n : 0, scale, nll + n, R, W);
        multiply(R, D, W / 2, rows_of(logits, W), back, apart(W), grad_x + n * D, D, TO_BF16, 0, 0);
        if (!grad_w) continue;
        pack_rows(rows, 0, D, R, D, right);
        multiply(W, D, some, turn(logits, W, R, W, turned), right, apart(R), grad_w, D, n ? ADD_F32 : TO_F32, 0, 0);
    }
    end();
}

/* c (R, R) = a (R, C) a^T, contiguous: half of it multiplied, the other half its mirror image, to the bit. */
static void own_product(const bf16 *a, int64_t R, int64_t C, void *c, int kind) {
    int32_t *packed = panels(0, C, R);
    pack_columns(a, 0, C, C, R, packed);
    begin();
    for (int64_t n = 0; n < R; n += NR) {
        int64_t last = n + NR < R ? n + NR : R;
        multiply(last, last - n, C / 2, rows_of(a, C), packed + n / NR * apart(C), 0, (char *)c + n * (kind == TO_BF16 ? 2 : 4), R, kind, 0, 0);
        for (int64_t i = n; i < last; i++) /* to the left of the diagonal: what the panels before have above it */
            for (int64_t j = 0; j < n; j++)
                if (kind == TO_BF16)
                    ((bf16 *)c)[i * R + j] = ((bf16 *)c)[j * R + i];
                else
                    ((float *)c)[i * R + j] = ((float *)c)[j * R + i];
    }
    end();
}

/* direction (rows x columns, both even; `square`: the sum of its squares) -> the nearest orthogonal matrix: `steps` quintic Newton-Schulz
 * iterations in bfloat16 on the wide side. See products.py. */
void orthogonalise(float *direction, float square, int64_t rows, int64_t columns, int64_t steps) {
    const float abc[] = {NEWTON_SCHULZ}, a = abc[0], b = abc[1], c = abc[2];
    int64_t size = rows * columns, tall = rows > columns, R = tall ? columns : rows, C = tall ? rows : columns;
    float *sums = scratch(6, (C > R ? C : R) * R * 4);
    bf16 *x = scratch(7, size * 2), *gram = scratch(8, R * R * 2), *polynomial = scratch(9, R * R * 2);
    float inverse = 1.0f / fmaxf(sqrtf(square), 1e-7f);
    if (tall)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < columns; i++) x[i * rows + r] = put_bf16(direction[r * columns + i] * inverse);
    else
        SIMD for (int64_t i = 0; i < size; i++) x[i] = put_bf16(direction[i] * inverse);
    for (int64_t step = 0; step < steps; step++) {
        own_product(x, R, C, gram, TO_BF16);
        own_product(gram, R, R, sums, TO_F32); /* the Gram matrix is its own transpose */
        SIMD for (int64_t i = 0; i < R * R; i++) polynomial[i] = put_bf16(b * get_bf16(gram[i]) + c * sums[i]);
        nn(polynomial, R, x, 0, C, sums, C, TO_F32, 0, 0, R, C, R);
        SIMD for (int64_t i = 0; i < size; i++) x[i] = put_bf16(a * get_bf16(x[i]) + sums[i]);
    }
    if (tall)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < columns; i++) direction[r * columns + i] = get_bf16(x[i * rows + r]);
    else
        SIMD for (int64_t i = 0; i < size; i++) direction[i] = get_bf16(x[i]);
}

/* One Muon update of a matrix (rows x columns, contiguous): the average, its Nesterov direction, cautious decay, the step. */
void muon(float *weight, const float *grad, float *average, int64_t rows, int64_t columns, float momentum, int64_t steps, float lr,
          float decay) {
    int64_t size = rows * columns;
    float *direction = scratch(5, size * 4), square = 0.0f;
    SUM(square) for (int64_t i = 0; i < size; i++) {
        average[i] += (1.0f - momentum) * (grad[i] - average[i]);
        direction[i] = get_bf16(put_bf16(grad[i] + momentum * (average[i] - grad[i])));
        square += direction[i] * direction[i];
    }
    orthogonalise(direction, square, rows, columns, steps);
    SIMD for (int64_t i = 0; i < size; i++) {
        float w = weight[i];
        if (direction[i] * w > 0.0f) w *= decay;
        weight[i] = w - lr * direction[i];
    }
}
