/* bfloat16 matrix products with float32 sums, for processors that multiply pairs of bfloat16 (AVX512_BF16) but have no matrix unit.
 *
 * B is packed into panels of 32 columns, pair of rows by pair of rows, so that one 512-bit register holds the pairs of 16 columns; A is
 * read as it lies, or packed likewise where it is transposed. An 8 x 32 tile of C stays in registers over the whole inner dimension.
 * Included by native.c after vectors.inc. All sizes in numbers, not bytes. The inner dimension of a product must be even, but for `tn`.
 */

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
    for (int64_t block = 0; block < up(N, width); block += NR) /* a cache line of columns at a time, down all rows */
        for (int64_t p = 0; p < pairs; p++) {
            const char *low = (const char *)source + 2 * p * stride * size, *high = 2 * p + 1 < K ? low + stride * size : 0;
            for (int64_t n = block; n < block + NR && n < up(N, width); n += 16) {
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

/* C (M, N) from A's words and packed B, whose panels are `panel` words apart; size: bytes of C's numbers. */
static void multiply(int64_t M, int64_t N, int64_t pairs, const int32_t *a, int64_t a_row, int64_t a_pair, int64_t a_block, const int32_t *b,
                     int64_t panel, void *c, int64_t stride, int kind, const bf16 *base, int64_t base_stride) {
    int64_t size = kind == TO_BF16 ? 2 : 4;
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0, rows; m < M; m += rows) {
            const int32_t *block = a + m / MR * a_block + m % MR * a_row, *right = b + n / NR * panel;
            void *to = (char *)c + (m * stride + n) * size;
            const bf16 *from = base ? base + m * base_stride + n : 0;
            int64_t columns = N - n < NR ? N - n : NR;
#define TILE(R, H) tile(R, H, pairs, block, a_row, a_pair, right, to, stride, kind, from, base_stride, columns)
#define ROWS(R) case R: if (columns > 16) TILE(R, 2); else TILE(R, 1); break
            switch (rows = tile_rows(M - m)) {
                ROWS(1); ROWS(2); ROWS(4); ROWS(8);
            }
        }
}

static int32_t *panels(int slot, int64_t K, int64_t N) { return scratch(slot, up(N, NR) * ((K + 1) / 2) * 4); }

/* c (M, N) = a (M, K) b (N, K)^T (+ base). */
void nt(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_columns(b, f32, s_b, K, N, packed);
    multiply(M, N, K / 2, (const int32_t *)a, s_a / 2, 1, MR * s_a / 2, packed, K / 2 * NR, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (M, K) b (K, N) (+ base). */
void nn(const bf16 *a, int64_t s_a, const void *b, int64_t f32, int64_t s_b, void *c, int64_t s_c, int64_t kind, const bf16 *base,
        int64_t s_base, int64_t M, int64_t N, int64_t K) {
    int32_t *packed = panels(0, K, N);
    pack_rows(b, f32, s_b, K, N, NR, packed);
    multiply(M, N, K / 2, (const int32_t *)a, s_a / 2, 1, MR * s_a / 2, packed, K / 2 * NR, c, s_c, kind, base, s_base);
}

/* c (M, N) = a (K, M)^T b (K, N). */
void tn(const bf16 *a, int64_t s_a, const bf16 *b, int64_t s_b, void *c, int64_t s_c, int64_t kind, int64_t M, int64_t N, int64_t K) {
    int64_t pairs = (K + 1) / 2;
    int32_t *packed = panels(0, K, N), *turned = scratch(1, up(M, 16) * pairs * 4);
    pack_rows(b, 0, s_b, K, N, NR, packed);
    pack_rows(a, 0, s_a, K, M, MR, turned);
    multiply(M, N, pairs, turned, 1, MR, pairs * MR, packed, pairs * NR, c, s_c, kind, 0, 0);
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
    int64_t width = up(T, NR), pairs = (T + 1) / 2;
    int32_t *keys = panels(0, K, T), *values = panels(1, T, V);
    float *scores = scratch(2, QUERIES * width * 4);
    bf16 *weights = scratch(3, QUERIES * width * 2);
    for (int64_t bh = 0; bh < B * H; bh++) {
        pack_columns(k + bh * T * K, 0, K, K, T, keys);
        pack_rows(v + bh * T * V, 0, V, T, V, NR, values);
        for (int64_t part = 0; part < up(T, QUERIES) / QUERIES * G; part++) {
            int64_t start = part / G * QUERIES, g = part % G, R = T - start < QUERIES ? T - start : QUERIES, S = start + R;
            const bf16 *qs = q + ((bh * T + start) * G + g) * K;
            multiply(R, S, K / 2, (const int32_t *)qs, G * K / 2, 1, MR * G * K / 2, keys, K / 2 * NR, scores, width, TO_F32, 0, 0);
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
            multiply(R, V, (S + 1) / 2, (const int32_t *)weights, width / 2, 1, MR * width / 2, values, pairs * NR,
                     out + (((bh / H * T + start) * H + bh % H) * G + g) * V, H * G * V, TO_BF16, 0, 0);
        }
    }
}

/* Gradients of q, k, v from that of out (B, T, H, G, V); the probabilities are computed again from log_sum. */
void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *first_key, float scale, const bf16 *out,
                        const float *log_sum, const bf16 *grad, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, int64_t B, int64_t H, int64_t T,
                        int64_t G, int64_t K, int64_t V) {
    int64_t width = up(T, NR), pairs = (T + 1) / 2, s_q = G * K, s_out = H * G * V;
    int32_t *keys = panels(0, K, T), *values = panels(1, V, T), *key_rows = panels(4, T, K);
    float *scores = scratch(2, QUERIES * width * 4), *upper = scratch(5, QUERIES * width * 4);
    bf16 *weights = scratch(3, QUERIES * width * 2), *slopes = scratch(6, QUERIES * width * 2);
    float *sum_k = scratch(7, T * K * 4), *sum_v = scratch(8, T * V * 4);
    int32_t *turned = scratch(9, up(T, 16) * QUERIES * 2), *right = panels(10, QUERIES, K > V ? K : V);
    for (int64_t bh = 0; bh < B * H; bh++) {
        pack_columns(k + bh * T * K, 0, K, K, T, keys);
        pack_columns(v + bh * T * V, 0, V, V, T, values);
        pack_rows(k + bh * T * K, 0, K, T, K, NR, key_rows);
        memset(sum_k, 0, T * K * 4);
        memset(sum_v, 0, T * V * 4);
        for (int64_t part = 0; part < up(T, QUERIES) / QUERIES * G; part++) {
            int64_t start = part / G * QUERIES, R = T - start < QUERIES ? T - start : QUERIES, S = start + R, some = (R + 1) / 2;
            int64_t place = (bh * T + start) * G + part % G;
            const bf16 *qs = q + place * K, *o = out + (((bh / H * T + start) * H + bh % H) * G + part % G) * V, *g = grad + (o - out);
            multiply(R, S, K / 2, (const int32_t *)qs, s_q / 2, 1, MR * s_q / 2, keys, K / 2 * NR, scores, width, TO_F32, 0, 0);
            multiply(R, S, V / 2, (const int32_t *)g, s_out / 2, 1, MR * s_out / 2, values, V / 2 * NR, upper, width, TO_F32, 0, 0);
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
            multiply(R, K, (S + 1) / 2, (const int32_t *)slopes, width / 2, 1, MR * width / 2, key_rows, pairs * NR,
                     grad_q + place * K, s_q, TO_BF16, 0, 0);
            pack_rows(slopes, 0, width, R, S, MR, turned);
            pack_rows(qs, 0, s_q, R, K, NR, right);
            multiply(S, K, some, turned, 1, MR, some * MR, right, some * NR, sum_k, K, ADD_F32, 0, 0);
            pack_rows(weights, 0, width, R, S, MR, turned);
            pack_rows(g, 0, s_out, R, V, NR, right);
            multiply(S, V, some, turned, 1, MR, some * MR, right, some * NR, sum_v, V, ADD_F32, 0, 0);
        }
        SIMD for (int64_t i = 0; i < T * K; i++) grad_k[bh * T * K + i] = put_bf16(sum_k[i]);
        SIMD for (int64_t i = 0; i < T * V; i++) grad_v[bh * T * V + i] = put_bf16(sum_v[i]);
    }
}

enum { TOKENS = 256 };

/* Head and cross-entropy in chunks of tokens. x (N, D), w (W, D), D and W even -> nll (N,), each times its weight (NULL: 1); the gradients of
 * scale * sum(nll): grad_x (N, D), grad_w (W, D) float32, or NULL where w is frozen. */
void head_loss(const bf16 *x, const void *w, int64_t f32, const int64_t *target, const float *weight, float scale, float *nll, bf16 *grad_x, float *grad_w, int64_t N,
               int64_t D, int64_t W) {
    int32_t *words = panels(0, D, W), *back = panels(1, W, D), *turned = scratch(3, up(W, 16) * TOKENS * 2), *right = panels(4, TOKENS, D);
    bf16 *logits = scratch(2, TOKENS * W * 2);
    pack_columns(w, f32, D, D, W, words);
    pack_rows(w, f32, D, W, D, NR, back);
    for (int64_t n = 0; n < N; n += TOKENS) {
        int64_t R = N - n < TOKENS ? N - n : TOKENS, some = (R + 1) / 2;
        const bf16 *rows = x + n * D;
        multiply(R, W, D / 2, (const int32_t *)rows, D / 2, 1, MR * D / 2, words, D / 2 * NR, logits, W, TO_BF16, 0, 0);
        cross_entropy_bf16(logits, target + n, weight ? weight + n : 0, scale, nll + n, R, W);
        multiply(R, D, W / 2, (const int32_t *)logits, W / 2, 1, MR * W / 2, back, W / 2 * NR, grad_x + n * D, D, TO_BF16, 0, 0);
        if (!grad_w) continue;
        pack_rows(logits, 0, W, R, W, MR, turned);
        pack_rows(rows, 0, D, R, D, NR, right);
        multiply(W, D, some, turned, 1, MR, some * MR, right, some * NR, grad_w, D, n ? ADD_F32 : TO_F32, 0, 0);
    }
}

/* c (R, R) = a (R, C) a^T, contiguous: half of it multiplied, the other half its mirror image, to the bit. */
static void own_product(const bf16 *a, int64_t R, int64_t C, void *c, int kind) {
    int32_t *packed = panels(0, C, R);
    pack_columns(a, 0, C, C, R, packed);
    for (int64_t n = 0; n < R; n += NR) {
        int64_t last = n + NR < R ? n + NR : R;
        multiply(last, last - n, C / 2, (const int32_t *)a, C / 2, 1, MR * C / 2, packed + n / NR * (C / 2 * NR), 0,
                 (char *)c + n * (kind == TO_BF16 ? 2 : 4), R, kind, 0, 0);
        for (int64_t i = n; i < last; i++) /* to the left of the diagonal: what the panels before have above it */
            for (int64_t j = 0; j < n; j++)
                if (kind == TO_BF16)
                    ((bf16 *)c)[i * R + j] = ((bf16 *)c)[j * R + i];
                else
                    ((float *)c)[i * R + j] = ((float *)c)[j * R + i];
    }
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
