/* What kernels/native.py compiles: helpers, then the passes for each number type. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SIMD _Pragma("omp simd")
#define SUM(x) _Pragma(SUM_(omp simd reduction(+:x)))
#define MAX(x) _Pragma(SUM_(omp simd reduction(max:x)))
#define SUM_(x) #x

typedef uint16_t bf16;

static inline float get_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 put_bf16(float f) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* exp by 2^n * polynomial on [-ln2/2, ln2/2] (coefficients: Cephes expf); relative error 2e-7; x <= 0 underflows to 0 at -87. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    n -= 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t e = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &e, 4);
    return p * scale;
}

static inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

#define number bf16
#define get get_bf16
#define put put_bf16
#define NAME(name) name##_bf16
#include "passes.inc"
#undef number
#undef get
#undef put
#undef NAME

#define number float
#define get(x) (x)
#define put(x) (x)
#define NAME(name) name##_f32
#include "passes.inc"

#include "storage.c"
#include "products.c"

#include "int8.c"
