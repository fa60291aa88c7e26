/* What kernels/native.py compiles: helpers, then the passes for each number type. */
#include "numbers.inc"
#include "held.inc"

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
#undef number
#undef get
#undef put
#undef NAME

#ifdef __AVX512BF16__
#include "vectors.inc"
#include "products.c"
#endif
