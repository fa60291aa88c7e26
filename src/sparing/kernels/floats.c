/* float32 matrix products for any processor with vectors, by the compiler's vector types: 256 bits and FMA on x86 with AVX2.
 *
 * B is packed into panels of NR columns, so that two registers hold a row of a panel; A is read as it lies, or packed likewise, HIGH to a
 * panel, where it is transposed and long. An MR x NR block of C stays in registers over up to DEPTH of the inner dimension, for which a panel of B
 * stays in the first cache; HEIGHT rows of A and WIDTH columns of B stay in the second one meanwhile. All sizes in numbers, not bytes. What is done with these
 * products is in products.inc.
 */
#include "numbers.inc"
#include "held.inc"
#include "scratch.inc"
#ifdef __AVX__
#include <immintrin.h>
#endif

#define number float
#define get(x) (x)
#define put(x) (x)
#define NAME(name) name
#include "norm.inc"
#include "heads.inc"
#include "cross_entropy.inc"
#include "swiglu.inc"

#if defined(__AVX512F__)
enum { LANES = 16, MR = 12 };
#elif defined(__AVX__)
enum { LANES = 8, MR = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, MR = 12 };
#else
enum { LANES = 4, MR = 6 };
#endif
enum { NR = 2 * LANES, HIGH = 2 * MR, DEPTH = 256, HEIGHT = 32 * MR, WIDTH = 256 };
enum { TO_F32 = 1, ADD_F32, TO_NUMBER = TO_F32, OWN = FLOAT32, SKEW = 16, TOKENS = FLOAT_HEAD_TOKENS, SUMMED = HEIGHT, QUERIES = 24, SLICE = 24, KEYS = 96 };

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* Nothing is switched on and off for these products. */
static inline void begin(void) {}
static inline void end(void) {}

/* The left side of a product: number k of row m lies at[m / HIGH * block + m % HIGH * row + k * step]. */
typedef struct { const float *at; int64_t row, step, block; } Left;

static inline Left rows_of(const float *a, int64_t stride) { return (Left){a, stride, 1, HIGH * stride}; }

/* Numbers of our own type. */
static inline Held own(const float *at, int64_t stride) { return (Held){at, FLOAT32, stride, 0}; }

/* `count` numbers of a row from column `from`, as they lie or, where they are held in fewer bits, in `room`. */
static inline const float *numbers_of(Held w, int64_t row, int64_t from, int64_t count, float *room) {
    if (w.held == FLOAT32) return (const float *)w.at + row * w.stride + from;
    floats_of(w, row, from, count, room);
    return room;
}

/* w (K, N) -> panels (N / NR, K, NR). */
static void pack_rows(Held w, int64_t K, int64_t N, float *out) {
    float room[WIDTH] __attribute__((aligned(64)));
    int64_t wide = w.held == FLOAT32 ? NR : WIDTH; /* others become floats some groups at a time */
    for (int64_t start = 0; start < N; start += wide)
        for (int64_t k = 0; k < K; k++) {
            int64_t count = N - start < wide ? N - start : wide;
            const float *from = numbers_of(w, k, start, count, room);
            for (int64_t n = 0; n < count; n += NR) {
                float *to = out + (start + n) * K + k * NR;
                if (count - n >= NR)
                    memcpy(to, from + n, NR * 4);
                else {
                    memset(to, 0, NR * 4);
                    memcpy(to, from + n, (count - n) * 4);
                }
            }
        }
}

#ifdef __AVX__
/* 8 x 8 numbers, rows `stride` apart, to rows of a panel. */
static inline void transpose8(const float *from, int64_t stride, float *to) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * stride);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_store_ps(to + i * NR, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_store_ps(to + (i + 4) * NR, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#endif

/* w (N, K) -> the same panels of its transpose. */
static void pack_columns(Held w, int64_t K, int64_t N, float *out) {
    float room[8 * DEPTH] __attribute__((aligned(64)));
    int64_t deep = w.held == FLOAT32 ? K : DEPTH; /* as in `pack_rows` */
    for (int64_t n = 0; n < N; n += 8)
        for (int64_t start = 0; start < K; start += deep) {
            int64_t count = K - start < deep ? K - start : deep, k = 0, columns = N - n < 8 ? N - n : 8;
            int64_t stride = w.held == FLOAT32 ? w.stride : DEPTH;
            const float *from = numbers_of(w, n, start, count, room);
            for (int64_t i = 1; i < columns; i++) numbers_of(w, n + i, start, count, room + i * DEPTH);
            float *to = out + n / NR * NR * K + n % NR + start * NR;
#ifdef __AVX__
            if (columns == 8)
                for (; k + 8 <= count; k += 8) transpose8(from + k, stride, to + k * NR);
#endif
            for (; k < count; k++)
                for (int64_t i = 0; i < 8; i++) to[k * NR + i] = i < columns ? from[i * stride + k] : 0.0f;
        }
    if (N % NR && N % NR <= NR - 8) /* the rest of the last panel */
        for (int64_t k = 0; k < K; k++) memset(out + N / NR * NR * K + k * NR + up(N % NR, 8), 0, (NR - up(N % NR, 8)) * 4);
}

/* source (K, M) -> the left side of a product, its transpose; out: up(M, HIGH) * K numbers. Few rows are read as they lie. */
static Left turn(const float *source, int64_t stride, int64_t K, int64_t M, float *out) {
    enum { ROWS = 16, FEW = KEYS };
    if (K <= FEW && stride % 64) return (Left){source, 1, stride, HIGH};
    for (int64_t start = 0; start < K; start += ROWS) { /* as many lines as stay in the first cache, wherever they lie */
        int64_t stop = start + ROWS < K ? start + ROWS : K, m = 0;
        for (; m + HIGH <= M; m += HIGH)
            for (int64_t k = start; k < stop; k++) memcpy(out + m * K + k * HIGH, source + k * stride + m, HIGH * 4);
        if (m < M)
            for (int64_t k = start; k < stop; k++) memcpy(out + m * K + k * HIGH, source + k * stride + m, (M - m) * 4);
    }
    return (Left){out, 1, HIGH, HIGH * K};
}

/* One tile: rows (<= MR) x NR columns over `depth` of the inner dimension. Number (i, k) of A lies at a[i * row + k * step]. */
static inline __attribute__((always_inline)) void tile(int rows, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,
                                                       float *c, int64_t stride, int add, const float *base, int64_t base_stride,
                                                       int64_t columns) {
    vec sum[MR][2];
    const float *at[(MR + 2) / 3]; /* every third row: what lies between is addressed from there */
    for (int i = 0; i < (rows + 2) / 3; i++) at[i] = a + 3 * i * row;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        __builtin_prefetch(c + i * stride, 1); /* it may lie far off, and is wanted only at the end */
        sum[i][0] = sum[i][1] = (vec){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        vec left = *(const vec *)(b + k * NR), right = *(const vec *)(b + k * NR + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float x = at[i / 3][i % 3 * row];
            sum[i][0] += x * left;
            sum[i][1] += x * right;
        }
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++) at[i] += step;
    }
    if (columns >= NR) {
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            for (int h = 0; h < 2; h++) {
                loose_vec *to = (loose_vec *)(c + i * stride + h * LANES);
                if (base) sum[i][h] += *(const loose_vec *)(base + i * base_stride + h * LANES);
                *to = add ? *to + sum[i][h] : sum[i][h];
            }
        return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        vec line[2] = {sum[i][0], sum[i][1]}, more[2] = {{0}, {0}};
        if (base) memcpy(more, base + i * base_stride, columns * 4);
        line[0] += more[0], line[1] += more[1];
        if (add) memcpy(more, c + i * stride, columns * 4);
        if (add) line[0] += more[0], line[1] += more[1];
        memcpy(c + i * stride, line, columns * 4);
    }
}

/* C (M, N) from A and packed B, whose panels are `panel` numbers apart. */
static void multiply(int64_t M, int64_t N, int64_t K, Left a, const float *b, int64_t panel, void *out, int64_t stride, int kind,
                     const float *base, int64_t base_stride) {
    float *c = out;
    int64_t parts = (K + DEPTH - 1) / DEPTH + !K, depth = (K + parts - 1) / parts + !K;
    int64_t high = (M + HEIGHT - 1) / HEIGHT, blocks = high * ((N + WIDTH - 1) / WIDTH);
    for (int64_t k = 0; !k || k < K; k += depth) {
        int add = k || kind == ADD_F32;
        int64_t deep = K - k < depth ? K - k : depth;
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t n = block / high * WIDTH, end = n + WIDTH < N ? n + WIDTH : N; n < end; n += NR) {
                int64_t start = block % high * HEIGHT;
                const float *right = b + n / NR * panel + k * NR;
                for (int64_t m = start, stop = M - start < HEIGHT ? M : start + HEIGHT; m < stop;) {
                    const float *left = a.at + m / HIGH * a.block + m % HIGH * a.row + k * a.step;
                    const float *more = base && !k ? base + m * base_stride + n : 0;
                    float *to = c + m * stride + n;
#define TILE(R) (tile(R, deep, left, a.row, a.step, right, to, stride, add, more, base_stride, N - n), m += R)
                    if (stop - m >= MR) TILE(MR);
                    else if (MR > 8 && stop - m >= 8) TILE(8);
                    else if (stop - m >= 4) TILE(4);
                    else if (stop - m >= 2) TILE(2);
                    else TILE(1);
                }
            }
    }
}

static float *panels(int slot, int64_t K, int64_t N) { return scratch(slot, up(N, NR) * K * 4); }

/* Of what `turn` makes. */
static float *left_words(int slot, int64_t K, int64_t M) { return scratch(slot, up(M, HIGH) * K * 4); }

/* Numbers from a panel to the next. */
static inline int64_t apart(int64_t K) { return K * NR; }

#define LONG DEPTH
#define word float
#define WORDS(numbers) (numbers)
#include "products.inc"

/* The way back through one head: T queries q, from a row to the next s_q, and their gradients of `out`, s_out -> sum_q (T, K), grad_k (T, K) and
 * grad_v (T, V), whose rows are s_v apart; `kind` says whether the last two are added to. first_key: of this sequence, or NULL; log_sum: s_log
 * from a query to the next.
 *
 * Scores are transposed, those of SLICE keys with all queries that see them: so sums over queries, which the gradients of k and v are, are
 * long, and their left sides are rows as they lie. The gradient of q is summed over KEYS keys at a time. The probabilities are computed
 * again from log_sum. */
static void head_backward(const float *q, int64_t s_q, const float *k, const float *v, const int32_t *first, float scale, const float *out,
                          const float *grad, int64_t s_out, const float *log_sum, int64_t s_log, float *sum_q, float *grad_k, float *grad_v,
                          int64_t s_v, int64_t kind, int64_t T, int64_t K, int64_t V) {
    int64_t width = up(T, NR) + SKEW;
    float *q_columns = panels(0, K, T), *q_rows = panels(1, T, K), *g_columns = panels(4, V, T), *g_rows = panels(10, T, V);
    float *k_rows = panels(11, KEYS, K), *turned = left_words(9, KEYS, T);
    float *weights = scratch(2, SLICE * width * 4), *slopes = scratch(6, KEYS * width * 4);
    float *logs = scratch(13, 3 * T * 4), *dots = logs + T;
    int32_t *ends = (int32_t *)(dots + T); /* of the document of each key */
    pack_columns(own(q, s_q), K, T, q_columns);
    pack_rows(own(q, s_q), T, K, q_rows);
    pack_columns(own(grad, s_out), V, T, g_columns);
    pack_rows(own(grad, s_out), T, V, g_rows);
    memset(sum_q, 0, T * K * 4);
    for (int64_t t = T - 1; t >= 0; t--) {
        float dot = 0.0f;
        SUM(dot) for (int64_t i = 0; i < V; i++) dot += out[t * s_out + i] * grad[t * s_out + i];
        dots[t] = dot;
        logs[t] = log_sum[t * s_log];
        ends[t] = t + 1 == T ? T : first && first[t + 1] > t ? t + 1 : ends[t + 1];
    }
    for (int64_t start = 0; start < T; start += KEYS) {
        int64_t keys = T - start < KEYS ? T - start : KEYS, queries = ends[start + keys - 1] - start;
        for (int64_t slice = 0; slice < keys; slice += SLICE) { /* in here keys and queries count from `start` */
            int64_t at = start + slice, R = keys - slice < SLICE ? keys - slice : SLICE;
            int64_t low = slice / NR * NR, S = ends[at + R - 1] - start - low; /* queries of the slice: S from low */
            float *d = slopes + slice * width + low;
            multiply(R, S, K, rows_of(k + at * K, K), q_columns + (start + low) * K, apart(K), weights, width, TO_F32, 0, 0);
            multiply(R, S, V, rows_of(v + at * V, V), g_columns + (start + low) * V, apart(V), d, width, TO_F32, 0, 0);
            for (int64_t r = 0; r < R; r++) {
                const float *log = logs + start + low, *dot = dots + start + low;
                float *w = weights + r * width, *slope = d + r * width;
                int64_t from = slice + r - low, to = ends[at + r] - start - low;
                memset(w, 0, from * 4);
                memset(slope - low, 0, (low + from) * 4);
                SIMD for (int64_t j = from; j < to; j++) {
                    float p = exp_(w[j] * scale - log[j]);
                    w[j] = p;
                    slope[j] = p * (slope[j] - dot[j]) * scale;
                }
                memset(w + to, 0, (S - to) * 4);
                memset(slope + to, 0, (queries - low - to) * 4);
            }
            multiply(R, V, S, rows_of(weights, width), g_rows + (start + low) * NR, apart(T), grad_v + at * s_v, s_v, kind, 0, 0);
            multiply(R, K, S, rows_of(d, width), q_rows + (start + low) * NR, apart(T), grad_k + at * K, K, kind, 0, 0);
        }
        pack_rows(own(k + start * K, K), keys, K, k_rows);
        Left left = turn(slopes, width, keys, queries, turned);
        int64_t early = keys < KEYS ? 0 : KEYS / 2; /* queries that see no more than as many keys */
        multiply(early, K, early, left, k_rows, apart(keys), sum_q + start * K, K, ADD_F32, 0, 0);
        left.at += early / HIGH * left.block;
        multiply(queries - early, K, keys, left, k_rows, apart(keys), sum_q + (start + early) * K, K, ADD_F32, 0, 0);
    }
}

/* Gradients of q, k, v from that of out (B, T, H, G, V). Shapes as in attention_forward. */
void attention_backward(const float *q, const float *k, const float *v, const int32_t *first_key, float scale, const float *out,
                        const float *log_sum, const float *grad, float *grad_q, float *grad_k, float *grad_v, int64_t B, int64_t H, int64_t T,
                        int64_t G, int64_t K, int64_t V) {
    int64_t s_q = G * K, s_out = H * G * V;
    float *sum_q = scratch(7, T * K * 4);
    for (int64_t part = 0; part < B * H * G; part++) {
        int64_t bh = part / G, g = part % G, place = ((bh / H * T * H + bh % H) * G + g) * V, from = (bh * T * G + g) * K;
        head_backward(q + from, s_q, k + bh * T * K, v + bh * T * V, first_key ? first_key + bh / H * T : 0, scale, out + place, grad + place,
                      s_out, log_sum + bh * T * G + g, G, sum_q, grad_k + bh * T * K, grad_v + bh * T * V, V, g ? ADD_F32 : TO_F32, T, K, V);
        for (int64_t t = 0; t < T; t++) memcpy(grad_q + from + t * s_q, sum_q + t * K, K * 4);
    }
}

/* Rows start to start + R of x (., D), or of the list of its rows that `tokens` is; these are copied to `out`. */
static const float *rows_at(const float *x, const int64_t *tokens, int64_t start, int64_t R, int64_t D, float *out) {
    if (!tokens) return x + start * D;
    for (int64_t r = 0; r < R; r++) memcpy(out + r * D, x + tokens[start + r] * D, D * 4);
    return out;
}

/* The same rows -> panels, as `pack_rows` makes them. */
static void pack_rows_at(const float *x, const int64_t *tokens, int64_t start, int64_t R, int64_t D, float *out) {
    if (!tokens || D % NR) {
        pack_rows(own(rows_at(x, tokens, start, R, D, scratch(3, R * D * 4)), D), R, D, out);
        return;
    }
    for (int64_t r = 0; r < R; r++) {
        const float *from = x + tokens[start + r] * D;
        for (int64_t n = 0; n < D; n += NR) memcpy(out + n * R + r * NR, from + n, NR * 4);
    }
}

/* down(silu(gate x) * up x), LONG rows at a time, so that they are in cache from one step to the next. Group e is rows ends[e - 1] to ends[e] of x,
 * as `rows_at` finds them: of experts, or all rows where E is 1. gate is (E, 2F, D) with up's half behind its own, and up NULL, or they
 * are (F, D) and E is 1; down (E, D, F) -> h (S, 2F), both halves before the activation; out (S, D), times gates (S,) where given, plus base (S, D). */
void feed_forward(const float *x, const int64_t *tokens, const float *gate, const float *up_, const float *down, const float *gates,
                  const float *base, float *h, float *out, const int64_t *ends, int64_t E, int64_t D, int64_t F) {
    float *first = panels(0, D, F), *second = panels(1, D, F), *last = panels(2, F, D);
    float *copied = scratch(3, LONG * D * 4), *hidden = scratch(4, LONG * F * 4);
    for (int64_t e = 0, row = 0, R; e < E; row = ends[e++]) {
        if (ends[e] == row) continue;
        pack_columns(own(gate + e * 2 * F * D, D), D, F, first);
        pack_columns(own(up_ ? up_ : gate + (e * 2 + 1) * F * D, D), D, F, second);
        pack_columns(own(down + e * D * F, F), F, D, last);
        for (int64_t start = row; start < ends[e]; start += R) {
            R = ends[e] - start < LONG ? ends[e] - start : LONG;
            const float *rows = rows_at(x, tokens, start, R, D, copied);
            float *both = h + start * 2 * F;
            multiply(R, F, D, rows_of(rows, D), first, apart(D), both, 2 * F, TO_F32, 0, 0);
            multiply(R, F, D, rows_of(rows, D), second, apart(D), both + F, 2 * F, TO_F32, 0, 0);
            swiglu_forward(both, gates ? gates + start : 0, hidden, R, F);
            multiply(R, D, F, rows_of(hidden, F), last, apart(F), out + start * D, D, TO_F32, base ? base + start * D : 0, D);
        }
    }
}

/* c (M, N) = a (K, M)^T b, b packed; c NULL: nothing. */
static void turned_product(const float *a, int64_t s_a, const float *b, float *c, int64_t kind, int64_t M, int64_t N, int64_t K) {
    if (c) multiply(M, N, K, turn(a, s_a, K, M, left_words(9, K, M)), b, apart(K), c, N, kind, 0, 0);
}

/* The way back: grad (., D), whose rows are found as those of x -> grad_rows (S, D), grad_gates (S,) where there are gates, and the gradients of
 * the weights, NULL where they are frozen. */
void feed_forward_backward(const float *x, const int64_t *tokens, const float *gate, const float *up_, const float *down, const float *gates,
                           const float *h, const float *grad, float *grad_rows, float *grad_gates, float *grad_gate, float *grad_up,
                           float *grad_down, const int64_t *ends, int64_t E, int64_t D, int64_t F) {
    int64_t side = up_ ? F : 2 * F; /* one matrix: one product */
    float *last = panels(0, D, F), *first = panels(1, side, D), *second = panels(2, F, D), *right = panels(8, LONG, D > F ? D : F);
    float *copied_grad = scratch(4, LONG * D * 4);
    float *grad_hidden = scratch(5, LONG * F * 4), *hidden = scratch(6, LONG * F * 4), *grad_h = scratch(7, LONG * 2 * F * 4);
    for (int64_t e = 0, row = 0, R; e < E; row = ends[e++]) {
        int64_t matrix = e * D * F, start = row;
        pack_rows(own(down + matrix, F), D, F, last);
        pack_rows(own(gate + 2 * matrix, D), side, D, first);
        if (up_) pack_rows(own(up_, D), F, D, second);
        do { /* once for a group without rows, whose gradients are zero */
            R = ends[e] - start < LONG ? ends[e] - start : LONG;
            const float *g = rows_at(grad, tokens, start, R, D, copied_grad);
            float *to = grad_rows + start * D;
            int64_t kind = start > row ? ADD_F32 : TO_F32;
            multiply(R, F, D, rows_of(g, D), last, apart(D), grad_hidden, F, TO_F32, 0, 0);
            swiglu_backward(h + start * 2 * F, gates ? gates + start : 0, grad_hidden, grad_h, hidden, gates ? grad_gates + start : 0, R, F);
            multiply(R, D, side, rows_of(grad_h, 2 * F), first, apart(side), to, D, TO_F32, 0, 0);
            if (up_) multiply(R, D, F, rows_of(grad_h + F, 2 * F), second, apart(F), to, D, ADD_F32, 0, 0);
            pack_rows_at(x, tokens, start, R, D, right);
            turned_product(grad_h, 2 * F, right, grad_gate ? grad_gate + 2 * matrix : 0, kind, side, D, R);
            if (up_) turned_product(grad_h + F, 2 * F, right, grad_up, kind, F, D, R);
            pack_rows(own(hidden, F), R, F, right);
            turned_product(g, D, right, grad_down ? grad_down + matrix : 0, kind, D, F, R);
            start += R;
        } while (start < ends[e]);
    }
}

#include "latent.inc"
