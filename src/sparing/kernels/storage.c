/* Numbers in few bits: see precision/activations.py, whose definitions these are. */
#include "numbers.inc"

/* x (N, D) -> code, a scale for each row. */
void pack_int8(const bf16 *x, int8_t *code, float *scale, int64_t N, int64_t D) {
    for (int64_t n = 0; n < N; n++) {
        const bf16 *a = x + n * D;
        int8_t *c = code + n * D;
        float most = 0.0f;
        MAX(most) for (int64_t d = 0; d < D; d++) {
            float v = fabsf(get_bf16(a[d]));
            most = v > most ? v : most;
        }
        float inverse = 127.0f / fmaxf(most, 1e-30f);
        scale[n] = most / 127.0f;
        SIMD for (int64_t d = 0; d < D; d++) c[d] = (int8_t)(int32_t)rintf(get_bf16(a[d]) * inverse);
    }
}

void unpack_int8(const int8_t *code, const float *scale, bf16 *x, int64_t N, int64_t D) {
    for (int64_t n = 0; n < N; n++)
        SIMD for (int64_t d = 0; d < D; d++) x[n * D + d] = put_bf16(code[n * D + d] * scale[n]);
}

/* An optimizer's weights and averages: rows of C numbers, of a tensor whose first number counts as position 0 of its random bits. A block is
 * up to BLOCK numbers of a row, brought to float32, updated, and put back. Definitions: precision/compensation.py, precision/moments.py. */

enum { BLOCK = MOMENT_BLOCK };

static inline uint32_t random16(uint32_t key, int64_t position) {
    uint32_t x = (uint32_t)position * 0x9E3779B9u + key;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x >> 16;
}

typedef struct {
    void *at; /* float32, or bfloat16 with 8 bits more in `remainder` or without */
    int64_t wide;
    uint8_t *remainder;
    int64_t key;
} weights;

static inline void get_weights(const weights *w, int64_t from, int64_t n, float *out) {
    if (w->wide) {
        memcpy(out, (float *)w->at + from, n * 4);
        return;
    }
    const bf16 *a = (bf16 *)w->at + from;
    const uint8_t *r = w->remainder + from;
    if (w->remainder)
        SIMD for (int64_t i = 0; i < n; i++) {
            uint32_t bits = ((uint32_t)a[i] - (r[i] >> 7)) << 16 | (uint32_t)r[i] << 8;
            memcpy(out + i, &bits, 4);
        }
    else SIMD for (int64_t i = 0; i < n; i++) out[i] = get_bf16(a[i]);
}

static inline void put_weights(const weights *w, int64_t from, int64_t n, const float *x) {
    if (w->wide) {
        memcpy((float *)w->at + from, x, n * 4);
        return;
    }
    bf16 *a = (bf16 *)w->at + from;
    uint8_t *r = w->remainder + from;
    if (w->remainder)
        SIMD for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
            bits = (bits + finite * (random16((uint32_t)w->key, from + i) >> 8)) & ~255u;
            a[i] = (bf16)((bits + 0x8000u) >> 16);
            r[i] = (uint8_t)(bits >> 8);
        }
    else
        SIMD for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
            a[i] = (bf16)((bits + finite * random16((uint32_t)w->key, from + i)) >> 16);
        }
}

typedef struct {
    void *at; /* float32 without scales, else codes */
    float *scale;
    int64_t key;
} average;

static inline void get_average(const average *m, int64_t from, int64_t block, int64_t n, int is_signed, float *out) {
    if (!m->scale) {
        memcpy(out, (float *)m->at + from, n * 4);
        return;
    }
    float scale = m->scale[block];
    if (is_signed) {
        const int8_t *c = (int8_t *)m->at + from;
        SIMD for (int64_t i = 0; i < n; i++) {
            float x = c[i] * (1.0f / 127.0f);
            out[i] = x * fabsf(x) * scale;
        }
    } else {
        const uint8_t *c = (uint8_t *)m->at + from;
        SIMD for (int64_t i = 0; i < n; i++) {
            float x = c[i] * (1.0f / 255.0f);
            x *= x;
            out[i] = x * x * scale;
        }
    }
}

static inline void put_average(const average *m, int64_t from, int64_t block, int64_t n, int is_signed, const float *x) {
    if (!m->scale) {
        memcpy((float *)m->at + from, x, n * 4);
        return;
    }
    float most = 0.0f;
    MAX(most) for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    m->scale[block] = most;
    float inverse = most > 0.0f ? 1.0f / most : 0.0f;
    if (is_signed) {
        int8_t *c = (int8_t *)m->at + from;
        SIMD for (int64_t i = 0; i < n; i++) {
            float share = fabsf(x[i]) * inverse, code = (float)(int32_t)(sqrtf(share) * 127.0f);
            code = code > 126.0f ? 126.0f : code;
            float low = code * code, chance = random16((uint32_t)m->key, from + i) * (1.0f / 65536.0f);
            code += chance * (2.0f * code + 1.0f) < share * (127.0f * 127.0f) - low ? 1.0f : 0.0f;
            c[i] = (int8_t)(int32_t)copysignf(code, x[i]);
        }
    } else {
        uint8_t *c = (uint8_t *)m->at + from;
        SIMD for (int64_t i = 0; i < n; i++) {
            float share = x[i] * inverse, code = (float)(int32_t)(sqrtf(sqrtf(share)) * 255.0f);
            code = code > 254.0f ? 254.0f : code;
            float low = code * code, high = (code + 1.0f) * (code + 1.0f), chance = random16((uint32_t)m->key, from + i) * (1.0f / 65536.0f);
            low *= low;
            high *= high;
            code += chance * (high - low) < share * (255.0f * 255.0f * 255.0f * 255.0f) - low ? 1.0f : 0.0f;
            c[i] = (uint8_t)(int32_t)(code < 1.0f && x[i] > 0.0f ? 1.0f : code);
        }
    }
}

static inline void get_gradient(const void *grad, int64_t wide, int64_t from, int64_t n, float *out) {
    weights g = {(void *)grad, wide, 0, 0};
    get_weights(&g, from, n, out);
}

static inline int64_t block_of(int64_t C) { return C < BLOCK ? C : BLOCK; }

/* AdamW of rows `first` to `last`: train/stored.py. */
void stored_adamw(void *weight, int64_t wide, uint8_t *remainder, int64_t key, const void *grad, int64_t grad_wide, void *mean, float *mean_scale,
                  int64_t mean_key, void *square, float *square_scale, int64_t square_key, int64_t first, int64_t last, int64_t C, float beta1,
                  float beta2, float root, float eps, float decay, float size) {
    weights w = {weight, wide, remainder, key};
    average mean_ = {mean, mean_scale, mean_key}, square_ = {square, square_scale, square_key};
    int64_t width = block_of(C), blocks = (C + width - 1) / width;
    float x[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    for (int64_t r = first; r < last; r++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t from = r * C + b * width, n = C - b * width < width ? C - b * width : width, block = r * blocks + b;
            get_weights(&w, from, n, x);
            get_gradient(grad, grad_wide, from, n, g);
            get_average(&mean_, from, block, n, 1, m);
            get_average(&square_, from, block, n, 0, v);
            SIMD for (int64_t i = 0; i < n; i++) {
                m[i] += (1.0f - beta1) * (g[i] - m[i]);
                v[i] = beta2 * v[i] + (1.0f - beta2) * g[i] * g[i];
                x[i] = x[i] * decay - size * m[i] / (sqrtf(v[i]) / root + eps);
            }
            put_average(&mean_, from, block, n, 1, m);
            put_average(&square_, from, block, n, 0, v);
            put_weights(&w, from, n, x);
        }
}

/* Muon of rows first to first + rows: the average, and its Nesterov direction (rows, C) with the sum of its squares, which products.c's
 * `orthogonalise` takes; then cautious decay and the step. */
void stored_direction(const void *grad, int64_t grad_wide, void *mean, float *mean_scale, int64_t mean_key, int64_t first, int64_t rows,
                      int64_t C, float momentum, float *direction, float *square) {
    average mean_ = {mean, mean_scale, mean_key};
    int64_t width = block_of(C), blocks = (C + width - 1) / width;
    float g[BLOCK], m[BLOCK], sum = 0.0f;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t from = (first + r) * C + b * width, n = C - b * width < width ? C - b * width : width, block = (first + r) * blocks + b;
            float *d = direction + r * C + b * width;
            get_gradient(grad, grad_wide, from, n, g);
            get_average(&mean_, from, block, n, 1, m);
            SUM(sum) for (int64_t i = 0; i < n; i++) {
                m[i] += (1.0f - momentum) * (g[i] - m[i]);
                d[i] = get_bf16(put_bf16(g[i] + momentum * (m[i] - g[i])));
                sum += d[i] * d[i];
            }
            put_average(&mean_, from, block, n, 1, m);
        }
    *square = sum;
}

void stored_step(void *weight, int64_t wide, uint8_t *remainder, int64_t key, const float *direction, int64_t first, int64_t rows, int64_t C,
                 float lr, float decay) {
    weights w = {weight, wide, remainder, key};
    float x[BLOCK];
    for (int64_t at = 0; at < rows * C; at += BLOCK) {
        int64_t n = rows * C - at < BLOCK ? rows * C - at : BLOCK;
        const float *d = direction + at;
        get_weights(&w, first * C + at, n, x);
        SIMD for (int64_t i = 0; i < n; i++) x[i] = (d[i] * x[i] > 0.0f ? x[i] * decay : x[i]) - lr * d[i];
        put_weights(&w, first * C + at, n, x);
    }
}
