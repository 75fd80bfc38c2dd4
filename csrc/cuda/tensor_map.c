/* tensor_map.c: tensor maps, encoded by the driver and remembered per device.
 *
 * A map holds an address, a shape and a box and nothing else: no memory is owned or read here, and a map found for
 * the same key is the map that encoding again would give. So nothing has to be forgotten when a tensor is freed.
 * The table is a cache without locks: a slot is written by one thread at a time under its version (odd while it
 * is being written), and whoever reads a slot while it changes encodes for itself. */
#include "driver.h"

#include <stdatomic.h>
#include <string.h>

enum {
    KEY_WORDS = sizeof(moe_tensor_key) / 8,
    MAP_WORDS = sizeof(CUtensorMap) / 8,
    SLOTS = 1024, /* two maps for each layer of any model, several times */
    PROBES = 4
};

_Static_assert(sizeof(moe_tensor_key) == 8 * KEY_WORDS, "a key is whole words, without padding");

typedef struct slot {
    atomic_uint version; /* 0: never written */
    _Atomic uint64_t words[KEY_WORDS + MAP_WORDS];
} slot;

static slot tables[MOE_MAX_DEVICES][SLOTS];

static uint32_t hash(const uint64_t *key)
{
    uint64_t h = 0;
    for (int i = 0; i < KEY_WORDS; ++i)
        h = (h ^ key[i]) * 0x9e3779b97f4a7c15u, h ^= h >> 29;
    return (uint32_t)(h >> 32);
}

/* 1: `words` holds the slot's key and map as somebody wrote them; 0: empty or changing. */
static int read_slot(slot *s, uint64_t *words)
{
    unsigned version = atomic_load_explicit(&s->version, memory_order_acquire);
    if (version == 0 || version % 2) return 0;
    for (int i = 0; i < KEY_WORDS + MAP_WORDS; ++i)
        words[i] = atomic_load_explicit(&s->words[i], memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&s->version, memory_order_relaxed) == version;
}

static void write_slot(slot *s, const uint64_t *words)
{
    unsigned version = atomic_load_explicit(&s->version, memory_order_relaxed);
    if (version % 2 ||
        !atomic_compare_exchange_strong_explicit(&s->version, &version, version + 1,
                                                 memory_order_acquire, memory_order_relaxed))
        return; /* another thread's turn */
    atomic_thread_fence(memory_order_release);
    for (int i = 0; i < KEY_WORDS + MAP_WORDS; ++i)
        atomic_store_explicit(&s->words[i], words[i], memory_order_relaxed);
    version += 2;
    atomic_store_explicit(&s->version, version ? version : 2, memory_order_release);
}

static int encode(const moe_driver *driver, const moe_tensor_key *key, CUtensorMap *map,
                  moe_error *err)
{
    const cuuint64_t pieces = key->dims[0] / MOE_MAP_COLS, piece_bytes = MOE_MAP_COLS * 2;
    const cuuint64_t *d = key->dims, *s = key->strides;
    const cuuint64_t dims[4] = {d[0], d[1], d[2], d[3]}, strides[3] = {s[0], s[1], s[2]};
    const cuuint64_t piece_dims[5] = {MOE_MAP_COLS, d[1], d[2], pieces ? pieces : 1, d[3]},
                     piece_strides[4] = {s[0], s[1], piece_bytes, s[2]};
    const cuuint32_t box[4] = {MOE_MAP_COLS, key->box_rows, key->box_halves, 1},
                     piece_box[5] = {MOE_MAP_COLS, key->box_rows, key->box_halves, key->box_chunks,
                                     1},
                     steps[5] = {1, 1, 1, 1, 1};
    const bool in_pieces = key->box_chunks != 0;
    CUresult code = driver->cuTensorMapEncodeTiled(
        map,
        key->dtype == MOE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        in_pieces ? 5 : 4, (void *)(uintptr_t)key->address, in_pieces ? piece_dims : dims,
        in_pieces ? piece_strides : strides, in_pieces ? piece_box : box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        key->fetch_bytes == 256 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                                : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return code == CUDA_SUCCESS ? MOE_OK
                                : moe_cuda_fail(driver, code, "cuTensorMapEncodeTiled", err);
}

int moe_tensor_map_get(const moe_driver *driver, int device, const moe_tensor_key *key,
                       CUtensorMap *map, moe_error *err)
{
    uint64_t wanted[KEY_WORDS + MAP_WORDS], found[KEY_WORDS + MAP_WORDS];
    memcpy(wanted, key, sizeof *key);
    uint32_t first = hash(wanted);
    slot *free_slot = &tables[device][first % SLOTS]; /* the first, where all are taken */
    for (uint32_t i = 0; i < PROBES; ++i) {
        slot *s = &tables[device][(first + i) % SLOTS];
        if (atomic_load_explicit(&s->version, memory_order_relaxed) == 0) {
            free_slot = s;
            break;
        }
        if (read_slot(s, found) && memcmp(found, wanted, sizeof *key) == 0) {
            memcpy(map, found + KEY_WORDS, sizeof *map);
            return MOE_OK;
        }
    }
    if (encode(driver, key, map, err)) return err->status;
    memcpy(wanted + KEY_WORDS, map, sizeof *map);
    write_slot(free_slot, wanted);
    return MOE_OK;
}
