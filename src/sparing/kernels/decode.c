/* A whole step of inference: rows of tokens in, hidden states and logits out, every thread running the same function between barriers.
 *
 * What a row gets depends on its own text alone, bit for bit: products are row by row (decode_products.inc), and attention walks a text's
 * cached tokens in order whatever else is in the step. So texts may be batched, prompts cut into pieces, prefixes shared and drafts
 * verified without changing a bit. The plain reference is infer/network.py; kernels/decode.py compiles this and fills in the structures.
 */
#define _GNU_SOURCE
#include "numbers.inc"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <fcntl.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif
#include "scratch.inc"
#include "decode_products.inc"

enum { BLOCK = CACHE_BLOCK };

typedef struct {
    const float *input_norm, *q_norm, *kv_norm, *post_norm; /* q_norm, kv_norm: MLA, of the compressed; GQA, of each head; 0: none */
    const float *first_bias; /* added to what `first` gives; 0: none */
    Matrix first; /* MLA: query (its compression, if any), then latent and rope; GQA: query, key, value */
    Matrix q_b, k_b, v_b, o; /* k_b (latent out, nope in) and v_b (value out, latent in): a stack of heads */
    Matrix gate_up, down; /* dense or shared experts; outputs 0: none */
    Matrix router, expert_gate_up, expert_down; /* stacks of experts; outputs 0: a dense layer */
    const float *bias; /* of the router's choice; 0: none */
    const float *enorm, *hnorm, *head_norm; /* MTP modules only */
    Matrix join;
} Layer;

enum { FIRST_SITE, OUTPUT_SITE, GATE_UP_SITE, DOWN_SITE, SITES };

typedef struct { /* the low-rank updates of a product: of each of its parts (query, key, value; gate, up), side by side as the outputs are */
    int64_t parts, rank, inner; /* parts 0: none */
    const float *down;          /* (parts, rank, inner) */
    const float *up[3];         /* (rank, outputs), scaled */
    int64_t outputs[3];         /* multiples of 16 */
} Update;

typedef struct {
    atomic_int arrived, phase, job, stop;
    int threads, active;
    pthread_mutex_t lock;
    pthread_cond_t news;
    pthread_t *workers;
    void *model, *batch;
} Pool;

typedef struct { /* room for some of the experts of a mixture that does not fit into memory; the others stay in their file */
    int64_t slots, taken, clock, loads, file;
    char *arena;      /* (slots, an expert's bytes) */
    const char *base; /* where the file begins in memory */
    int64_t *place;   /* (layers, experts) slot + 1; 0: not here */
    int64_t *owner, *used; /* (slots) layer * experts + expert; when last */
} Residency;

typedef struct {
    int64_t hidden, heads, nope, rope, value, latent, q_rank, kv_heads, head_dim, latent_attention;
    int64_t experts, chosen, least, groups, chosen_groups, scoring, normalise, expert_width, digits;
    int64_t layers, all_layers, width, embed_bf16, quantised;
    float eps, scale, routed_scale;
    const void *embed; /* 0: tied, the head's rows */
    const float *final_norm, *rotary;
    float *cache; /* (blocks, all_layers, BLOCK, width) */
    Matrix head, draft_head; /* draft_head: rows of the head among which MTP modules choose; no outputs: all */
    Layer *layer;
    Residency residency;
    const Update *updates; /* (adapters, all_layers, SITES) */
    int64_t narrow;        /* most rows of `down` of any of them */
    Pool *pool;
    int64_t rows, longest; /* what the scratch is for */
    void *scratch[24];
} Model;

typedef struct {
    int64_t rows, wanted, table_stride, mtp; /* mtp: 0, or 1 + which module runs instead of the main layers */
    const int32_t *tokens, *positions, *owners, *tables, *wanted_rows, *first; /* first: the first position a row sees */
    const float *before; /* MTP: (rows, hidden) */
    const float *shares; /* (texts, all_layers) see `thin`; 0: every chosen expert for every row */
    int32_t *used; /* with `shares`: (rows) to which the experts used are added, of all layers */
    int32_t *routes; /* (rows, layers, chosen) gets the experts of each row in each layer of the decoder; 0: not wanted */
    const int32_t *adapters; /* (texts) whose updates a text gets; -1: none; 0 instead of all: no text gets any */
    float *after; /* (rows, hidden) after the last norm */
    float *logits; /* (wanted, up(outputs of the head, 16)) */
} Batch;

/* Threads */

static void barrier(Pool *pool) {
    if (pool->active == 1) return;
    int phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) == pool->active - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->phase, 1);
    } else
        for (int spins = 0; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++)
            if (spins < 4000) PAUSE(); else sched_yield();
}

static void step(Model *m, const Batch *b, int t, int T);

typedef struct { Pool *pool; int t; } Seat;

static void *work(void *argument) {
    Seat seat = *(Seat *)argument;
    free(argument);
    Pool *pool = seat.pool;
    for (int done = 0;;) {
        for (int spins = 0; atomic_load_explicit(&pool->job, memory_order_acquire) == done && spins < 20000; spins++) PAUSE();
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->job) == done) pthread_cond_wait(&pool->news, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
        done = atomic_load(&pool->job);
        if (atomic_load(&pool->stop)) return 0;
        int active = done & 255; /* not pool->active, which may be the next job's by now */
        if (seat.t >= active) continue;
        step(pool->model, pool->batch, seat.t, active);
        barrier(pool);
    }
}

static void announce(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->job, (atomic_load(&pool->job) & ~255) + 256 + pool->active); /* its number, and for how many threads */
    pthread_cond_broadcast(&pool->news);
    pthread_mutex_unlock(&pool->lock);
}

Pool *pool_open(int64_t threads) {
    Pool *pool = calloc(1, sizeof *pool);
    pool->threads = (int)threads;
    pthread_mutex_init(&pool->lock, 0);
    pthread_cond_init(&pool->news, 0);
    pool->workers = calloc(threads, sizeof *pool->workers);
    for (int t = 1; t < pool->threads; t++) {
        Seat *seat = malloc(sizeof *seat);
        *seat = (Seat){pool, t};
        pthread_create(pool->workers + t, 0, work, seat);
    }
    return pool;
}

void pool_close(Pool *pool) {
    atomic_store(&pool->stop, 1);
    announce(pool);
    for (int t = 1; t < pool->threads; t++) pthread_join(pool->workers[t], 0);
    free(pool->workers);
    free(pool);
}

/* Rows */

static void norm(const float *x, const float *gain, float eps, int64_t n, float *out) {
    vec squares = spread(0.0f);
    for (int64_t i = 0; i < n; i += W) squares += LOAD(x + i) * LOAD(x + i);
    float inverse = 1.0f / sqrtf(sum(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += W) STORE(out + i, LOAD(x + i) * inverse * LOAD(gain + i));
}

/* The largest number of a row of n that is rounded to two digits: with weights of up to 127, its sums fit 32 bits. */
static inline int32_t levels(int64_t n) {
    int64_t most = INT32_MAX / (127 * n);
    return most < 32639 ? (int32_t)most : 32639; /* 127 * 256 + 127 */
}

/* n numbers as row i of `in`. */
static void quantise(const Input *in, int64_t i, const float *x, int64_t n) {
    float most = 0.0f;
    MAX(most) for (int64_t k = 0; k < n; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    float top = in->second ? (float)levels(n) : 127.0f, inverse = most > 0.0f ? top / most : 0.0f;
    in->scale[i] = most / top;
    if (in->shorts) {
        int16_t *q = (int16_t *)in->q + i * in->q_stride;
        int32_t total = 0;
        SIMD for (int64_t k = 0; k < n; k++) q[k] = (int16_t)(int32_t)rintf(x[k] * inverse);
        SUM(total) for (int64_t k = 0; k < n; k++) total += q[k];
        in->sums[i * in->sums_stride] = total;
        return;
    }
    int8_t *first = in->q + i * in->q_stride, *second = first + in->second * in->q_stride;
    if (in->second) {
        SIMD for (int64_t k = 0; k < n; k++) { /* through 32 bits: as wide as the floats */
            int32_t whole = (int32_t)rintf(x[k] * inverse), high = (whole + 128) >> 8;
            first[k] = (int8_t)high;
            second[k] = (int8_t)(whole - (high << 8));
        }
    } else {
        SIMD for (int64_t k = 0; k < n; k++) first[k] = (int8_t)(int32_t)rintf(x[k] * inverse);
    }
    for (int digit = 0; digit <= (in->second > 0); digit++) {
        int8_t *q = digit ? second : first;
        int32_t *sums = in->sums + (i + digit * in->second) * in->sums_stride, total = 0;
        memset(q + n, 0, up(n, 64) - n);
        for (int64_t g = 0; g * GROUP < n; g++) {
            int32_t sum = 0;
            int64_t end = (g + 1) * GROUP < n ? (g + 1) * GROUP : n;
            SUM(sum) for (int64_t k = g * GROUP; k < end; k++) sum += q[k];
            sums[1 + g] = sum;
            total += sum;
        }
        sums[0] = total;
    }
}

/* Pairs of numbers of x turned -> out, which is elsewhere. */
static void rotate(const float *restrict x, const float *restrict turns, int64_t n, float *restrict out) {
    SIMD for (int64_t i = 0; i < n / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1], cosine = turns[2 * i], sine = turns[2 * i + 1];
        out[2 * i] = a * cosine - b * sine;
        out[2 * i + 1] = a * sine + b * cosine;
    }
}

static void swiglu(float *h, int64_t width) { /* gate and up side by side -> in place of the gate */
    SIMD for (int64_t i = 0; i < width; i++) h[i] = h[i] * sigmoid_(h[i]) * h[width + i];
}

/* Attention */

static inline float *cached(const Model *m, const Batch *b, int64_t row, int64_t layer, int64_t position) {
    int64_t block = b->tables[b->owners[row] * b->table_stride + position / BLOCK];
    return m->cache + ((block * m->all_layers + layer) * BLOCK + position % BLOCK) * m->width;
}

#define EACH_H _Pragma("GCC unroll 4") for (int h = 0; h < n; h++)
#define EACH_4(i) _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)

enum { TOGETHER = 8 }; /* rows of one text that go over a block of its cache while that is near */

typedef struct { /* up to four heads of a row that have the same keys */
    int64_t first, length; /* positions that it sees: from, to */
    const float *q[4];
    float *out[4], *scores[4], inverse[4];
} Seen;

/* A row's scores of `count` keys, which lie m->width apart, from the position `at` on. */
INLINE void score(int n, const Model *m, const Seen *row, const float *keys, int64_t count, int64_t K, int64_t at) {
    for (int64_t i = 0; i < count; i += 4) { /* past the last key: the last one again, which is overwritten later */
        const float *k[4];
        EACH_4(s) k[s] = keys + (i + s < count ? i + s : count - 1) * m->width;
        vec acc[4][4];
        EACH_H EACH_4(s) acc[h][s] = spread(0.0f);
        for (int64_t d = 0; d < K; d += W) {
            vec x[4]; /* with three heads and one key at a time all is in 16 registers */
            EACH_H {
                x[h] = LOAD(row->q[h] + d);
                KEEP(x[h]);
            }
            EACH_4(s) {
                vec key = LOAD(k[s] + d);
                KEEP(key);
                EACH_H acc[h][s] += x[h] * key;
            }
        }
        EACH_H *(vec4_any *)(row->scores[h] + at - row->first + i) = sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]) * m->scale;
    }
}

/* Scores -> what they weigh, times the sum, whose inverse is kept. */
INLINE void weigh(int n, Seen *row) {
    int64_t seen = row->length - row->first;
    for (int h = 0; h < n; h++) {
        float *s = row->scores[h], most = -INFINITY;
        MAX(most) for (int64_t j = 0; j < seen; j++) most = s[j] > most ? s[j] : most;
        SIMD for (int64_t j = 0; j < up(seen, W); j++) s[j] = exp_(s[j] - most);
        for (int64_t j = seen; j < up(seen, W); j++) s[j] = 0.0f;
        vec total = spread(0.0f);
        for (int64_t j = 0; j < seen; j += W) total += LOAD(s + j);
        row->inverse[h] = 1.0f / sum(total);
    }
}

/* `count` values by a row's weights of them, from the position `at` on, added to what `out` has unless they are the first. */
INLINE void gather(int n, const Model *m, const Seen *row, const float *values, int64_t count, int64_t V, int64_t at) {
    int first = at == row->first, last = at + count == row->length;
    for (int64_t c = 0; c < V; c += 4 * W) {
        int vectors = V - c >= 4 * W ? 4 : (int)(V - c) / W;
        vec acc[4][4];
        EACH_H EACH_4(v) acc[h][v] = first || v >= vectors ? spread(0.0f) : (vec)LOAD(row->out[h] + c + v * W);
#define VALUES(COUNT)                                                            \
    for (int64_t i = 0; i < count; i++)                                          \
        _Pragma("GCC unroll 4") for (int v = 0; v < COUNT; v++) {                \
            vec x = LOAD(values + c + i * m->width + v * W);                     \
            KEEP(x);                                                             \
            EACH_H acc[h][v] += x * row->scores[h][at - row->first + i];         \
        }
        if (vectors == 4) VALUES(4) else if (vectors == 3) VALUES(3) else if (vectors == 2) VALUES(2) else VALUES(1)
        EACH_H EACH_4(v) if (v < vectors) STORE(row->out[h] + c + v * W, last ? acc[h][v] * row->inverse[h] : acc[h][v]);
    }
}

/* n (1 to 4) heads of some rows of one text, of which `any` is one, over the keys (width K, at `key` in a cached token) and values (width V, at
 * `value`). */
INLINE void attend(int n, const Model *m, const Batch *b, int64_t layer, int64_t any, Seen *rows, int count, int64_t key, int64_t K,
                   int64_t value, int64_t V) {
    int64_t first = INT64_MAX, length = 0;
    for (int r = 0; r < count; r++) {
        first = rows[r].first < first ? rows[r].first : first;
        length = rows[r].length > length ? rows[r].length : length;
    }
#define EACH_BLOCK                                                                                                                     \
    for (int64_t j = first / BLOCK * BLOCK; j < length; j += BLOCK)                                                                    \
        for (int r = 0; r < count; r++)                                                                                                \
            for (int64_t from = rows[r].first > j ? rows[r].first : j, to = rows[r].length < j + BLOCK ? rows[r].length : j + BLOCK;   \
                 from < to; from = to)
    EACH_BLOCK score(n, m, rows + r, cached(m, b, any, layer, from) + key, to - from, K, from);
    for (int r = 0; r < count; r++) weigh(n, rows + r);
    EACH_BLOCK gather(n, m, rows + r, cached(m, b, any, layer, from) + value, to - from, V, from);
}

#define ATTEND(N)                                                                                                                       \
    static void attend_##N(const Model *m, const Batch *b, int64_t layer, int64_t any, Seen *rows, int count, int64_t key, int64_t K,   \
                           int64_t value, int64_t V) {                                                                                  \
        attend(N, m, b, layer, any, rows, count, key, K, value, V);                                                                     \
    }
ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4)

/* Pairs of heads `from` to `to` of `count` rows of one text, from `row` on `apart` from each other; two pairs at once where they can be. */
static void attend_pairs(const Model *m, const Batch *b, int64_t layer, int64_t row, int count, int64_t apart, int64_t from, int64_t to,
                         const float *q, int64_t K, int64_t V, float *out, float *scores) {
    int64_t groups = m->latent_attention ? 1 : m->kv_heads, share = m->heads / groups, pairs = (share + 1) / 2, room = m->longest + 16;
    int64_t values = m->latent_attention ? 0 : m->kv_heads * K;
    for (int64_t p = from, took; p < to; p += took) {
        int64_t g = p / pairs, h = g * share + p % pairs * 2, left = (g + 1) * share - h;
        int n = left > 2 && p + 1 < to ? (left > 3 ? 4 : 3) : left >= 2 ? 2 : 1;
        Seen rows[TOGETHER];
        for (int r = 0; r < count; r++) {
            int64_t mine = row + r * apart;
            rows[r].first = b->first ? b->first[mine] : 0;
            rows[r].length = b->positions[mine] + 1;
            for (int i = 0; i < n; i++) {
                rows[r].q[i] = q + (mine * m->heads + h + i) * K;
                rows[r].out[i] = out + (mine * m->heads + h + i) * V;
                rows[r].scores[i] = scores + (r * 4 + i) * room;
            }
        }
        (n == 4 ? attend_4 : n == 3 ? attend_3 : n == 2 ? attend_2 : attend_1)(m, b, layer, row, rows, count, g * K, K, values + g * V, V);
        took = n > 2 ? 2 : 1;
    }
}

/* All heads of all rows: rows are dealt to the threads in turn, as later ones see more; what is left over is divided. q: (rows, heads, K),
 * out: (rows, heads, V), which may be q. */
static void attention(const Model *m, const Batch *b, int64_t layer, const float *q, int64_t K, int64_t V, float *out, float *scores, int t,
                      int T) {
    int64_t groups = m->latent_attention ? 1 : m->kv_heads, pairs = groups * ((m->heads / groups + 1) / 2), whole = b->rows - b->rows % T;
    for (int64_t row = t, count; row < whole; row += count * T) {
        for (count = 1; count < TOGETHER && row + count * T < whole && b->owners[row + count * T] == b->owners[row];) count++;
        attend_pairs(m, b, layer, row, (int)count, T, 0, pairs, q, K, V, out, scores);
    }
    for (int64_t row = whole, left = (b->rows - whole) * pairs; row < b->rows; row++) {
        int64_t before = (row - whole) * pairs, from = left * t / T - before, to = left * (t + 1) / T - before;
        attend_pairs(m, b, layer, row, 1, 0, from > 0 ? from : 0, to < pairs ? to : pairs, q, K, V, out, scores);
    }
}

/* Routing: model/experts.py, Router */

static void route(const Model *m, const Layer *l, const float *logits, float *weights, int32_t *experts) {
    int64_t E = m->experts, K = m->chosen, size = E / m->groups;
    float score[E], choice[E];
    float most = -INFINITY, total = 0.0f;
    for (int64_t e = 0; e < E; e++) most = logits[e] > most ? logits[e] : most;
    for (int64_t e = 0; e < E; e++) {
        float x = logits[e];
        score[e] = m->scoring == 0 ? 1.0f / (1.0f + expf(-x)) : m->scoring == 1 ? expf(x - most) : sqrtf(x > 20.0f ? x : log1pf(expf(x)));
        total += score[e];
    }
    for (int64_t e = 0; e < E; e++) {
        if (m->scoring == 1) score[e] /= total;
        choice[e] = score[e] + (l->bias ? l->bias[e] : 0.0f);
    }
    if (m->groups > 1) { /* only the groups whose two best experts (without biases: whose best one) score highest stay open */
        float best[m->groups];
        for (int64_t g = 0; g < m->groups; g++) {
            float one = -INFINITY, two = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; e++)
                if (choice[e] > one) two = one, one = choice[e];
                else if (choice[e] > two) two = choice[e];
            best[g] = size > 1 && l->bias ? one + two : one;
        }
        for (int64_t g = 0; g < m->groups; g++) {
            int64_t better = 0;
            for (int64_t o = 0; o < m->groups; o++) better += best[o] > best[g] || (best[o] == best[g] && o < g);
            if (better >= m->chosen_groups)
                for (int64_t e = g * size; e < (g + 1) * size; e++) choice[e] = -INFINITY;
        }
    }
    float sum = 0.0f;
    for (int64_t k = 0; k < K; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < E; e++) if (choice[e] > choice[best]) best = e;
        experts[k] = (int32_t)best;
        weights[k] = score[best];
        sum += score[best];
        choice[best] = -INFINITY;
    }
    for (int64_t k = 0; k < K; k++) weights[k] *= m->routed_scale / (m->normalise ? sum + 1e-20f : 1.0f);
}

/* Keep the fewest of a row's K experts, heaviest first, that carry `share` of its gate weight, m->least at the least; the others become
 * -1. The weights stay as they are: giving those kept the weight of the others was measured to lose 2.5 times as much (LAB.md). */
static int32_t thin(const Model *m, const float *weights, int32_t *experts, float share) {
    int64_t K = m->chosen;
    if (share >= 1.0f) return (int32_t)K;
    char kept[K];
    float total = 0.0f, carried = 0.0f;
    int32_t count = 0;
    for (int64_t k = 0; k < K; k++) total += weights[k], kept[k] = 0;
    for (; count < K && (count < m->least || carried < share * total); count++) {
        int64_t best = -1;
        for (int64_t k = 0; k < K; k++) if (!kept[k] && (best < 0 || weights[k] > weights[best])) best = k;
        kept[best] = 1;
        carried += weights[best];
    }
    for (int64_t k = 0; k < K; k++) if (!kept[k]) experts[k] = -1;
    return count;
}

/* Bring those of the experts `wanted` into memory that are not there, the least recently used ones making room. */
static void bring_in(Model *m, int64_t layer, const int32_t *wanted, int64_t count) {
    Residency *r = &m->residency;
    const Matrix *stack = &m->layer[layer].expert_gate_up;
    int64_t *place = r->place + layer * m->experts;
    for (int64_t i = 0; i < count; i++)
        if (place[wanted[i]]) r->used[place[wanted[i]] - 1] = ++r->clock;
        else posix_fadvise((int)r->file, at(stack, wanted[i]).data - r->base, stack->stride, POSIX_FADV_WILLNEED);
    for (int64_t i = 0; i < count; i++) {
        if (place[wanted[i]]) continue;
        int64_t slot = 0;
        if (r->taken < r->slots) slot = r->taken++;
        else {
            for (int64_t s = 1; s < r->slots; s++) if (r->used[s] < r->used[slot]) slot = s;
            r->place[r->owner[slot]] = 0;
        }
        char *to = r->arena + slot * stack->stride;
        for (int64_t done = 0, got; done < stack->stride; done += got) {
            got = pread((int)r->file, to + done, stack->stride - done, at(stack, wanted[i]).data - r->base + done);
            if (got <= 0) abort(); /* the file was cut short under us: as a mapping would do */
        }
        r->owner[slot] = layer * m->experts + wanted[i];
        r->used[slot] = ++r->clock;
        place[wanted[i]] = slot + 1;
        r->loads++;
    }
}

/* Expert e's matrix of a stack, wherever it is. */
static Matrix expert(const Model *m, const Layer *l, int64_t layer, const Matrix *stack, int64_t e) {
    Matrix mine = at(stack, e);
    if (m->residency.slots)
        mine.data = m->residency.arena + (m->residency.place[layer * m->experts + e] - 1) * stack->stride + (stack->data - l->expert_gate_up.data);
    return mine;
}

/* The step. Slots of scratch: */
enum { X, NORMED, FIRST, QUERY, ABSORBED, MIXED, HEADS, SLOTS, PARTS, SCORES, LOGITS, GATES, CHOSEN, ORDER, ENDS, JOINED,
       BYTES, SCALES, SUMS, EXPERT_BYTES, EXPERT_SCALES, EXPERT_SUMS, NARROW };

/* Bytes from a quantised row to the next: whole cache lines, and not a power of two, which would put 16 rows into the same few sets of a cache. */
static inline int64_t apart(int64_t inner) { return up(inner, 64) + 64; }

static void reserve(Model *m, int64_t rows, int64_t longest, int T) {
    if (rows <= m->rows && longest <= m->longest) return;
    rows = rows > m->rows ? rows : m->rows;
    m->rows = rows;
    m->longest = longest > m->longest ? up(longest, 512) : m->longest;
    const Layer *l = m->layer;
    int64_t C = m->latent, H = m->heads;
    int64_t slots = rows * (m->experts ? m->chosen : 0), mtp = m->all_layers > m->layers;
    int64_t wide = up(l[0].first.outputs, PANEL), heads = H * (m->latent_attention ? m->value : m->head_dim);
    int64_t widest = heads > m->hidden << mtp ? heads : m->hidden << mtp; /* of what is rounded */
    for (int64_t i = 0; i < m->all_layers; i++) {
        if (l[i].gate_up.outputs > wide) wide = l[i].gate_up.outputs;
        if (l[i].down.inner > widest) widest = l[i].down.inner;
    }
    int64_t by_head = m->latent_attention ? H * apart(m->nope > C ? m->nope : C) : 0; /* bytes of a row's heads */
    if (m->q_rank > widest) widest = m->q_rank;
    int64_t bytes = apart(widest) * 2 > by_head << SHORTS ? apart(widest) * 2 : by_head << SHORTS; /* two digits, or 16 bits */
    int64_t floats[24] = {0};
    floats[X] = floats[NORMED] = rows * m->hidden;
    floats[FIRST] = rows * wide;
    floats[QUERY] = rows * H * (m->latent_attention ? m->nope + m->rope : m->head_dim);
    floats[ABSORBED] = m->latent_attention ? rows * H * (C + m->rope) : 0;
    floats[MIXED] = m->latent_attention ? rows * H * C : 0;
    floats[HEADS] = m->latent_attention ? rows * heads : 0;
    floats[SLOTS] = slots * 2 * m->expert_width;
    floats[PARTS] = slots * m->hidden;
    floats[SCORES] = TOGETHER * 4 * (m->longest + 16) * T;
    floats[LOGITS] = rows * up(m->experts, PANEL);
    floats[GATES] = floats[CHOSEN] = floats[ORDER] = slots;
    floats[ENDS] = m->experts + 1;
    floats[JOINED] = mtp ? rows * 2 * m->hidden : 0;
    floats[BYTES] = m->quantised ? rows * bytes / 4 : 0;
    floats[SCALES] = rows * (H > 2 ? H : 2);
    floats[SUMS] = m->quantised ? rows * (2 * (2 + widest / GROUP) + H * (2 + (by_head / H) / GROUP)) : 0;
    floats[EXPERT_BYTES] = (slots * apart(m->expert_width) / 4) << SHORTS;
    floats[EXPERT_SCALES] = slots;
    floats[NARROW] = rows * m->narrow;
    floats[EXPERT_SUMS] = slots * (2 + m->expert_width / GROUP);
    for (int i = 0; i < 24; i++) {
        free(m->scratch[i]);
        m->scratch[i] = floats[i] ? aligned_alloc(64, up(floats[i] * 4 + 64, 64)) : 0;
    }
}

void release(Model *m) {
    for (int i = 0; i < 24; i++) free(m->scratch[i]);
    memset(m->scratch, 0, sizeof m->scratch);
    m->rows = m->longest = 0;
}

/* Rows x for products with matrices like `of`. second: how many rows there are if each has two digits, else 0. */
static Input input(const Model *m, float *x, int64_t stride, const Matrix *of, int64_t second) {
    int64_t inner = of->inner;
    return (Input){x, stride, m->scratch[BYTES], m->scratch[SCALES], m->scratch[SUMS], apart(inner), 1 + (inner + GROUP - 1) / GROUP,
                   m->quantised ? second : 0, SHORTS && of->format == INT8};
}

enum { DOWN_TWICE = 1, O_TWICE = 2, FIRST_TWICE = 4, GATE_UP_TWICE = 8, HEAD_TWICE = 16 }; /* m->digits */

#define MINE(i, count) for (int64_t i = (count) * t / T, end_##i = (count) * (t + 1) / T; i < end_##i; i++)
#define WAIT() barrier(m->pool)

static inline const Update *update_of(const Model *m, const Batch *b, int64_t row, int64_t layer, int site) {
    int32_t adapter = b->adapters[b->owners[row]];
    return adapter < 0 ? 0 : m->updates + (adapter * m->all_layers + layer) * SITES + site;
}

/* y += up (down x) for each row whose text has an adapter; x: rows of a product's input, y: of its output. A row's sums are the same whatever
 * other rows there are. Ends with a barrier; y must be whole before the first. */
static void adapt(Model *m, const Batch *b, int64_t layer, int site, const float *x, int64_t x_stride, float *y, int64_t y_stride, int t, int T) {
    if (!b->adapters) return;
    float *narrow = m->scratch[NARROW];
    MINE(j, b->rows * m->narrow) {
        int64_t i = j / m->narrow, r = j % m->narrow;
        const Update *u = update_of(m, b, i, layer, site);
        if (!u || r >= u->parts * u->rank) continue;
        const float *row = x + i * x_stride, *down = u->down + r * u->inner;
        vec total = spread(0.0f);
        for (int64_t k = 0; k < u->inner; k += W) total += LOAD(row + k) * LOAD(down + k);
        narrow[j] = sum(total);
    }
    WAIT();
    int64_t panels = 0;
    for (int64_t i = 0; i < b->rows; i++) {
        const Update *u = update_of(m, b, i, layer, site);
        int64_t wide = 0;
        for (int64_t p = 0; u && p < u->parts; p++) wide += u->outputs[p] / PANEL;
        panels = wide > panels ? wide : panels;
    }
    MINE(j, b->rows * panels) {
        int64_t i = j / panels, panel = j % panels, p = 0;
        const Update *u = update_of(m, b, i, layer, site);
        if (!u) continue;
        float *out = y + i * y_stride + panel * PANEL;
        while (p < u->parts && panel >= u->outputs[p] / PANEL) panel -= u->outputs[p++] / PANEL;
        if (p == u->parts) continue;
        const float *up = u->up[p] + panel * PANEL, *h = narrow + i * m->narrow + p * u->rank;
        for (int64_t v = 0; v < PANEL; v += W) {
            vec total = spread(0.0f);
            for (int64_t r = 0; r < u->rank; r++) total += LOAD(up + r * u->outputs[p] + v) * h[r];
            STORE(out + v, LOAD(out + v) + total);
        }
    }
    WAIT();
}

/* A product of each head with its own matrix: x (rows, heads, inner) at any strides -> out likewise. Quantised rows lie head by head. */
static void by_head(const Model *m, const Matrix *stack, float *x, int64_t x_row, int64_t x_head, int64_t N, float *out, int64_t out_row,
                    int64_t out_head, int t, int T) {
    Input in = input(m, x, x_row, stack, 0);
    if (m->quantised) {
        MINE(i, N * m->heads) quantise(&in, i, x + i % N * x_row + i / N * x_head, stack->inner);
        WAIT();
    }
    for (int64_t h = 0; h < m->heads; h++) {
        Matrix mine = at(stack, h);
        in.x = x + h * x_head;
        product(&mine, &in, 0, m->quantised ? h * N : 0, N, out + h * out_head, out_row, 0, t, T);
    }
}

/* `first` of the rows -> HEADS (rows, heads, value). */
static void latent_attention(Model *m, const Batch *b, const Layer *l, int64_t layer, int t, int T) {
    int64_t N = b->rows, H = m->heads, C = m->latent, R = m->rope, K = C + R, A = m->nope + R, width = up(l->first.outputs, PANEL);
    float *first = m->scratch[FIRST], *q = m->q_rank ? m->scratch[QUERY] : first, *absorbed = m->scratch[ABSORBED];
    float *mixed = m->scratch[MIXED], *heads = m->scratch[HEADS];
    int64_t q_first = m->q_rank ? m->q_rank : H * A, q_row = m->q_rank ? H * A : width;
    Input compressed = input(m, first, width, &l->q_b, 0);
    MINE(i, N) {
        float *row = first + i * width, *to = cached(m, b, i, layer, b->positions[i]);
        norm(row + q_first, l->kv_norm, m->eps, C, to);
        rotate(row + q_first + C, m->rotary + b->positions[i] * R, R, to + C);
        if (!m->q_rank) continue;
        norm(row, l->q_norm, m->eps, m->q_rank, row);
        if (m->quantised) quantise(&compressed, i, row, m->q_rank);
    }
    WAIT();
    if (m->q_rank) {
        product(&l->q_b, &compressed, 0, 0, N, q, q_row, 0, t, T);
        WAIT();
    }
    MINE(j, N * H) {
        int64_t i = j / H, h = j % H;
        rotate(q + i * q_row + h * A + m->nope, m->rotary + b->positions[i] * R, R, absorbed + j * K + C);
    }
    by_head(m, &l->k_b, q, q_row, A, N, absorbed, H * K, K, t, T);
    WAIT();
    attention(m, b, layer, absorbed, K, C, mixed, (float *)m->scratch[SCORES] + TOGETHER * 4 * (m->longest + 16) * t, t, T);
    WAIT();
    by_head(m, &l->v_b, mixed, H * C, C, N, heads, H * m->value, m->value, t, T);
}

/* `first` of the rows -> QUERY (rows, heads, head_dim): each head of a row in the place of its query. */
static void grouped_attention(Model *m, const Batch *b, const Layer *l, int64_t layer, int t, int T) {
    int64_t N = b->rows, H = m->heads, G = m->kv_heads, K = m->head_dim, width = up(l->first.outputs, PANEL);
    float *first = m->scratch[FIRST], *q = m->scratch[QUERY];
    MINE(i, N) {
        float *row = first + i * width, *to = cached(m, b, i, layer, b->positions[i]);
        const float *turns = m->rotary + b->positions[i] * K;
        if (l->first_bias)
            for (int64_t j = 0; j < (H + 2 * G) * K; j += W) STORE(row + j, LOAD(row + j) + LOAD(l->first_bias + j));
        for (int64_t h = 0; h < H + G; h++) {
            const float *gain = h < H ? l->q_norm : l->kv_norm;
            if (gain) norm(row + h * K, gain, m->eps, K, row + h * K);
            rotate(row + h * K, turns, K, h < H ? q + (i * H + h) * K : to + (h - H) * K);
        }
        memcpy(to + G * K, row + (H + G) * K, G * K * 4);
    }
    WAIT();
    attention(m, b, layer, q, K, K, q, (float *)m->scratch[SCORES] + TOGETHER * 4 * (m->longest + 16) * t, t, T);
}

/* x += experts(normed) for the chosen experts of each row, one expert's rows together; `normed` is quantised already. */
static void experts(Model *m, const Batch *b, const Layer *l, int64_t layer, const Input *in, int t, int T) {
    int64_t N = b->rows, E = m->experts, K = m->chosen, F = m->expert_width, width = up(E, PANEL);
    float *logits = m->scratch[LOGITS], *gates = m->scratch[GATES], *slots = m->scratch[SLOTS], *parts = m->scratch[PARTS];
    int32_t *chosen = m->scratch[CHOSEN], *order = m->scratch[ORDER], *ends = m->scratch[ENDS];
    product(&l->router, in, 0, 0, N, logits, width, 0, t, T);
    WAIT();
    MINE(i, N) {
        route(m, l, logits + i * width, gates + i * K, chosen + i * K);
        if (b->routes && layer < m->layers) memcpy(b->routes + (i * m->layers + layer) * K, chosen + i * K, K * 4);
        if (b->shares) b->used[i] += thin(m, gates + i * K, chosen + i * K, b->shares[b->owners[i] * m->all_layers + layer]);
    }
    WAIT();
    if (t == 0) { /* slots (row, choice) in the order of their experts: a counting sort */
        memset(ends, 0, (E + 1) * 4);
        for (int64_t s = 0; s < N * K; s++) if (chosen[s] >= 0) ends[chosen[s] + 1]++;
        for (int64_t e = 0; e < E; e++) ends[e + 1] += ends[e];
        for (int64_t s = 0; s < N * K; s++) if (chosen[s] >= 0) order[ends[chosen[s]]++] = (int32_t)s;
        for (int64_t i = 0; i < ends[E]; i++) chosen[order[i]] = (int32_t)i; /* from here on: where each slot went */
        for (int64_t i = 0; i < ends[E]; i++) order[i] /= (int32_t)K;
    }
    WAIT();
    Input hidden = input(m, slots, 2 * F, &l->expert_down, 0); /* beside `in`, not over it */
    hidden.q = m->scratch[EXPERT_BYTES], hidden.scale = m->scratch[EXPERT_SCALES], hidden.sums = m->scratch[EXPERT_SUMS];
    int64_t room = m->residency.slots ? m->residency.slots : E; /* as many experts at a time as are let in */
    for (int64_t first = 0, low = 0, high; first < E; low = high) {
        int32_t active[E], count = 0;
        for (high = low; first < E && (count < room || !count); high = ends[first++])
            if (ends[first] > high) active[count++] = (int32_t)first;
        if (m->residency.slots) {
            if (t == 0) bring_in(m, layer, active, count);
            WAIT();
        }
        for (int64_t i = 0, from = low; i < count; from = ends[active[i++]]) {
            Matrix mine = expert(m, l, layer, &l->expert_gate_up, active[i]);
            product(&mine, in, order + from, 0, ends[active[i]] - from, slots + from * 2 * F, 2 * F, 0, t, T);
        }
        WAIT();
        MINE(s, high - low) {
            swiglu(slots + (low + s) * 2 * F, F);
            if (m->quantised) quantise(&hidden, low + s, slots + (low + s) * 2 * F, F);
        }
        WAIT();
        for (int64_t i = 0, from = low; i < count; from = ends[active[i++]]) {
            Matrix mine = expert(m, l, layer, &l->expert_down, active[i]);
            product(&mine, &hidden, 0, from, ends[active[i]] - from, parts + from * m->hidden, m->hidden, 0, t, T);
        }
        WAIT();
    }
    float *x = m->scratch[X];
    MINE(i, N) for (int64_t k = 0; k < K; k++) {
        if (chosen[i * K + k] < 0) continue;
        const float *part = parts + chosen[i * K + k] * m->hidden;
        float gate = gates[i * K + k];
        for (int64_t d = 0; d < m->hidden; d++) x[i * m->hidden + d] += gate * part[d];
    }
}

static void block(Model *m, const Batch *b, int64_t layer, int t, int T) {
    const Layer *l = m->layer + layer;
    int64_t N = b->rows, D = m->hidden, H = m->heads;
    float *x = m->scratch[X], *normed = m->scratch[NORMED], *shared = m->scratch[FIRST]; /* not needed any more by then */
    const Matrix *from_post = l->gate_up.outputs ? &l->gate_up : &l->expert_gate_up;
    Input in = input(m, normed, D, &l->first, m->digits & FIRST_TWICE ? N : 0);
    MINE(i, N) {
        norm(x + i * D, l->input_norm, m->eps, D, normed + i * D);
        if (m->quantised) quantise(&in, i, normed + i * D, D);
    }
    WAIT();
    product(&l->first, &in, 0, 0, N, m->scratch[FIRST], up(l->first.outputs, PANEL), 0, t, T);
    WAIT();
    adapt(m, b, layer, FIRST_SITE, normed, D, m->scratch[FIRST], up(l->first.outputs, PANEL), t, T);
    float *heads = m->scratch[m->latent_attention ? HEADS : QUERY];
    int64_t wide = H * (m->latent_attention ? m->value : m->head_dim);
    if (m->latent_attention) latent_attention(m, b, l, layer, t, T); else grouped_attention(m, b, l, layer, t, T);
    WAIT();
    Input mixed = input(m, heads, wide, &l->o, m->digits & O_TWICE ? N : 0);
    if (m->quantised) {
        MINE(i, N) quantise(&mixed, i, heads + i * wide, wide);
        WAIT();
    }
    product(&l->o, &mixed, 0, 0, N, x, D, 1, t, T);
    WAIT();
    adapt(m, b, layer, OUTPUT_SITE, heads, wide, x, D, t, T);
    in = input(m, normed, D, from_post, m->digits & GATE_UP_TWICE ? N : 0);
    MINE(i, N) {
        norm(x + i * D, l->post_norm, m->eps, D, normed + i * D);
        if (m->quantised) quantise(&in, i, normed + i * D, D);
    }
    WAIT();
    int64_t F = l->down.inner;
    if (l->gate_up.outputs) product(&l->gate_up, &in, 0, 0, N, shared, 2 * F, 0, t, T);
    if (l->router.outputs) experts(m, b, l, layer, &in, t, T);
    if (l->gate_up.outputs) {
        WAIT();
        adapt(m, b, layer, GATE_UP_SITE, normed, D, shared, 2 * F, t, T);
        Input hidden = input(m, shared, 2 * F, &l->down, m->digits & DOWN_TWICE ? N : 0);
        MINE(i, N) {
            swiglu(shared + i * 2 * F, F);
            if (m->quantised) quantise(&hidden, i, shared + i * 2 * F, F);
        }
        WAIT();
        product(&l->down, &hidden, 0, 0, N, x, D, 1, t, T);
        WAIT();
        adapt(m, b, layer, DOWN_SITE, shared, 2 * F, x, D, t, T);
    } else
        WAIT();
}

/* Row r of a matrix of any format but int4 as floats. */
static void matrix_row(const Matrix *m, int64_t r, float *out) {
    int64_t K = m->inner, from = r / PANEL * K * PANEL, c = r % PANEL;
    if (m->format == F32)
        for (int64_t k = 0; k < K; k++) out[k] = ((const float *)m->data)[from + k * PANEL + c];
    else if (m->format == BF16)
        for (int64_t k = 0; k < K; k++) out[k] = get_bf16(((const bf16 *)m->data)[from + (k / 2 * PANEL + c) * 2 + k % 2]);
    else {
        float scale = scales_of(m)[r];
        const uint8_t *codes = (const uint8_t *)m->data + from + c * 4;
        for (int64_t k = 0; k < K; k += 4, codes += 4 * PANEL)
            for (int64_t i = 0; i < 4; i++) out[k + i] = (float)(codes[i] - 128) * scale;
    }
}

static void embed(const Model *m, int32_t token, float *out) {
    if (!m->embed)
        matrix_row(&m->head, token, out);
    else if (m->embed_bf16)
        for (int64_t d = 0; d < m->hidden; d++) out[d] = get_bf16(((const bf16 *)m->embed)[token * m->hidden + d]);
    else
        memcpy(out, (const float *)m->embed + token * m->hidden, m->hidden * 4);
}

static void step(Model *m, const Batch *b, int t, int T) {
    int64_t N = b->rows, D = m->hidden;
    float *x = m->scratch[X], *joined = m->scratch[JOINED];
    const float *last = m->final_norm;
    if (b->mtp) { /* model/transformer.py, MTPBlock */
        int64_t layer = m->layers + b->mtp - 1;
        const Layer *l = m->layer + layer;
        Input in = input(m, joined, 2 * D, &l->join, 0);
        MINE(i, N) {
            embed(m, b->tokens[i], joined + i * 2 * D);
            norm(joined + i * 2 * D, l->enorm, m->eps, D, joined + i * 2 * D);
            norm(b->before + i * D, l->hnorm, m->eps, D, joined + i * 2 * D + D);
            if (m->quantised) quantise(&in, i, joined + i * 2 * D, 2 * D);
        }
        WAIT();
        product(&l->join, &in, 0, 0, N, x, D, 0, t, T);
        WAIT();
        block(m, b, layer, t, T);
        last = l->head_norm;
    } else {
        MINE(i, N) embed(m, b->tokens[i], x + i * D);
        WAIT();
        for (int64_t layer = 0; layer < m->layers; layer++) block(m, b, layer, t, T);
    }
    MINE(i, N) norm(x + i * D, last, m->eps, D, b->after + i * D);
    WAIT();
    const Matrix *head = b->mtp && m->draft_head.outputs ? &m->draft_head : &m->head;
    float *wanted = m->scratch[NORMED]; /* a copy: the caller gets what is after the norm */
    Input in = input(m, wanted, D, head, m->digits & HEAD_TWICE ? b->wanted : 0);
    MINE(i, b->wanted) {
        memcpy(wanted + i * D, b->after + b->wanted_rows[i] * D, D * 4);
        if (m->quantised) quantise(&in, i, wanted + i * D, D);
    }
    WAIT();
    product(head, &in, 0, 0, b->wanted, b->logits, up(head->outputs, PANEL), 0, t, T);
}

/* One step on `threads` of the pool's threads. longest: the longest text in it, in tokens. */
void forward(Model *m, Batch *b, int64_t longest, int64_t threads) {
    Pool *pool = m->pool;
    reserve(m, b->rows, longest, pool->threads);
    pool->model = m;
    pool->batch = b;
    pool->active = (int)threads;
    if (threads > 1) announce(pool);
    step(m, b, 0, pool->active);
    barrier(pool);
}

/* Draws: infer/sample.py has the reference. */

static inline uint32_t mix(uint32_t x) { /* github.com/skeeto/hash-prospector, "lowbias32" */
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

static inline float log_(float x) { /* x normal and positive; polynomial: Cephes logf */
    int32_t bits;
    memcpy(&bits, &x, 4);
    int32_t e = ((bits - 0x3f3504f3) >> 23), m = bits - (e << 23); /* m in [sqrt(1/2), sqrt(2)) */
    float f;
    memcpy(&f, &m, 4);
    f -= 1.0f;
    float y = 7.0376836292e-2f, z = f * f;
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    return f + (y * f * z - 2.12194440e-4f * (float)e - 0.5f * z) + 0.693359375f * (float)e;
}

/* The i < n with the largest z[i] * scale + Gumbel noise of (key, i). */
int64_t draw(const float *z, int64_t n, float scale, uint32_t low, uint32_t high) {
    enum { SOME = 1024 };
    float score[SOME], most = -INFINITY;
    int64_t best = 0;
    for (int64_t start = 0; start < n; start += SOME) {
        int count = n - start < SOME ? (int)(n - start) : SOME;
        SIMD for (int i = 0; i < count; i++) {
            float u = ((float)(int32_t)(mix(mix((uint32_t)(start + i) ^ low) + high) >> 9) + 0.5f) * (1.0f / 8388608.0f);
            score[i] = z[start + i] * scale - log_(-log_(u));
        }
        for (int i = 0; i < count; i++) if (score[i] > most) most = score[i], best = start + i;
    }
    return best;
}

/* Seconds that `rows` rows take through a matrix of 1024 x 1024 in a format, the best of a few. */
double probe(int64_t format, int64_t rows) {
    enum { N = 1024 };
    Matrix m = {format, N, N, calloc(N + 1, N * 4), 0};
    Input in = {calloc(rows * N, 4), N, calloc(rows, apart(N) << SHORTS), calloc(rows, 4), calloc(rows * (1 + N / GROUP), 4), apart(N),
                1 + N / GROUP, 0, SHORTS && format == INT8};
    float *out = calloc(rows * N, 4);
    double best = 1.0;
    for (int i = 0; i < 32; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        product(&m, &in, 0, 0, rows, out, N, 0, 0, 1);
        clock_gettime(CLOCK_MONOTONIC, &to);
        double took = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        best = took < best ? took : best;
    }
    free((void *)m.data), free(in.x), free(in.q), free(in.scale), free(in.sums), free(out);
    return best;
}

/* Which of PRODUCTS of kernels/decode.py multiplies int8 here. */
int64_t products(void) {
#if WIDE
    return 3;
#elif defined(__AVX2__) && defined(__AVXVNNI__)
    return 2;
#elif defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}

/* Switch the matrix unit for prompts in int8 on or off; -> whether it is on. The processor must have it (amx_int8). */
int64_t use_tiles(int64_t on) {
#ifdef TILES
    tiles_on = on && tiles_allowed();
#endif
    return tiles_on;
}

/* Switch it on where it is faster, which takes milliseconds to find out. */
void choose_tiles(void) {
    use_tiles(0);
    double before = probe(INT8, 32);
    if (use_tiles(1) && probe(INT8, 32) > before) use_tiles(0);
}
