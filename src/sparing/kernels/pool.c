/* Memory of large tensors, handed from one that died to the next of about its size (kernels/native.py). A block is a DLManagedTensor of
 * github.com/dmlc/dlpack, whose deleter gives it back; torch calls that from whichever thread drops the last reference. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { STEP = 1 << 16, LARGE_PAGE = 1 << 21, DIMENSIONS = 8 };

typedef struct managed {
    void *data;
    int32_t device_type, device_id, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
    void *context;
    void (*deleter)(struct managed *);
} managed;

typedef struct block {
    managed tensor; /* first: the deleter gets its address */
    int64_t shape[DIMENSIONS];
    size_t size;
    struct block *next;
} block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block *idle; /* the one that died last is the first */
static size_t live, waiting, most; /* bytes of tensors, of idle blocks, and the most that tensors had */

static void *map_pages(size_t size) {
    size_t extra = size >= LARGE_PAGE ? LARGE_PAGE : 0;
    char *start = mmap(NULL, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    if (extra) {
        char *aligned = (char *)(((uintptr_t)start + extra - 1) & ~(uintptr_t)(extra - 1));
        if (aligned > start) munmap(start, aligned - start);
        if (start + extra > aligned) munmap(aligned + size, start + extra - aligned);
        madvise(start = aligned, size, MADV_HUGEPAGE);
        extra = 0;
    }
#endif
    if (extra) munmap(start + size, extra);
    return start;
}

static void unmap_oldest(void) {
    block **place = &idle;
    while ((*place)->next) place = &(*place)->next;
    block *old = *place;
    *place = NULL;
    waiting -= old->size;
    munmap(old->tensor.data, old->size);
    free(old);
}

static void give_back(managed *tensor) {
    block *b = (block *)tensor;
    pthread_mutex_lock(&lock);
    live -= b->size;
    waiting += b->size;
    b->next = idle;
    idle = b;
    pthread_mutex_unlock(&lock);
}

/* A DLManagedTensor of this shape, uninitialised; NULL where the system has no memory. Idle blocks serve for up to an eighth less than they
 * hold; a new one is made after as many idle ones went to the system as keep all of them below what tensors alone once had. */
void pool_take(managed **out, const int64_t *shape, int64_t dimensions, int64_t code, int64_t bits) {
    int64_t bytes = bits / 8;
    for (int i = 0; i < dimensions; i++) bytes *= shape[i];
    size_t size = ((size_t)bytes + STEP - 1) / STEP * STEP;
    pthread_mutex_lock(&lock);
    block **found = NULL, *b = NULL;
    for (block **place = &idle; *place; place = &(*place)->next)
        if ((*place)->size >= size && (*place)->size <= size + size / 8 && (!found || (*place)->size < (*found)->size)) found = place;
    if (found) {
        b = *found;
        *found = b->next;
        waiting -= b->size;
    } else {
        while (idle && live + waiting + size > most) unmap_oldest();
        b = calloc(1, sizeof *b);
        if (b && !(b->tensor.data = map_pages(b->size = size))) {
            free(b);
            b = NULL;
        }
    }
    if (b) {
        live += b->size;
        if (live > most) most = live;
        b->tensor.device_type = 1; /* CPU */
        b->tensor.dimensions = (int32_t)dimensions;
        b->tensor.code = (uint8_t)code;
        b->tensor.bits = (uint8_t)bits;
        b->tensor.lanes = 1;
        for (int i = 0; i < dimensions; i++) b->shape[i] = shape[i];
        b->tensor.shape = b->shape;
        b->tensor.deleter = give_back;
    }
    pthread_mutex_unlock(&lock);
    *out = b ? &b->tensor : NULL;
}

/* Every idle block to the system, and a new count of the most. */
void pool_trim(void) {
    pthread_mutex_lock(&lock);
    while (idle) unmap_oldest();
    most = live;
    pthread_mutex_unlock(&lock);
}

/* bytes: of live tensors, of idle blocks, and the most that tensors had. */
void pool_bytes(int64_t *bytes) {
    pthread_mutex_lock(&lock);
    bytes[0] = (int64_t)live;
    bytes[1] = (int64_t)waiting;
    bytes[2] = (int64_t)most;
    pthread_mutex_unlock(&lock);
}
