/* float32 matrix products for any processor with vectors, by the compiler's vector types: 256 bits and FMA on x86 with AVX2.
 *
 * B is packed into panels of NR columns, so that two registers hold a row of a panel; A is read as it lies, or packed likewise, MR to a panel,
 * where it is transposed and long. An MR x NR block of C stays in registers over up to DEPTH of the inner dimension, for which a panel of B
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
#include "cross_entropy.inc"

#if defined(__AVX512F__)
enum { LANES = 16, MR = 12 };
#elif defined(__AVX__)
enum { LANES = 8, MR = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, MR = 12 };
#else
enum { LANES = 4, MR = 6 };
#endif
enum { NR = 2 * LANES, DEPTH = 256, HEIGHT = 32 * MR, WIDTH = 256 };
enum { TO_F32 = 1, ADD_F32, TO_NUMBER = TO_F32, OWN = FLOAT32, SKEW = 16, TOKENS = HEIGHT };

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* Nothing is switched on and off for these products. */
static inline void begin(void) {}
static inline void end(void) {}

/* The left side of a product: number k of row m lies at[m / MR * block + m % MR * row + k * step]. */
typedef struct { const float *at; int64_t row, step, block; } Left;

static inline Left rows_of(const float *a, int64_t stride) { return (Left){a, stride, 1, MR * stride}; }

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

/* source (K, M) -> the left side of a product, its transpose; out: up(M, MR) * K numbers. Few rows are read as they lie. */
static Left turn(const float *source, int64_t stride, int64_t K, int64_t M, float *out) {
    enum { ROWS = 16, FEW = 64 };
    if (K <= FEW && stride % 64) return (Left){source, 1, stride, MR};
    for (int64_t start = 0; start < K; start += ROWS) { /* as many lines as stay in the first cache, wherever they lie */
        int64_t stop = start + ROWS < K ? start + ROWS : K, m = 0;
        for (; m + MR <= M; m += MR)
            for (int64_t k = start; k < stop; k++) memcpy(out + m * K + k * MR, source + k * stride + m, MR * 4);
        if (m < M)
            for (int64_t k = start; k < stop; k++) memcpy(out + m * K + k * MR, source + k * stride + m, (M - m) * 4);
    }
    return (Left){out, 1, MR, MR * K};
}

/* One tile: rows (<= MR) x NR columns over `depth` of the inner dimension. Number (i, k) of A lies at a[i * row + k * step]. */
static inline __attribute__((always_inline)) void tile(int rows, int64_t depth, const float *a, int64_t row, int64_t step, const float *b,
                                                       float *c, int64_t stride, int add, const float *base, int64_t base_stride,
                                                       int64_t columns) {
    vec sum[MR][2];
    const float *at[(MR + 2) / 3]; /* every third row: what lies between is addressed from there */
    for (int i = 0; i < (rows + 2) / 3; i++) at[i] = a + 3 * i * row;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vec){0};
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
                    const float *left = a.at + m / MR * a.block + m % MR * a.row + k * a.step;
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
static float *left_words(int slot, int64_t K, int64_t M) { return scratch(slot, up(M, MR) * K * 4); }

/* Numbers from a panel to the next. */
static inline int64_t apart(int64_t K) { return K * NR; }

#define LONG DEPTH
#define word float
#define WORDS(numbers) (numbers)
#include "products.inc"
