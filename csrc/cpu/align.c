/* align.c: rows grouped by expert                                                      (stage 2 of 5)
 * In     topk_ids, expert_map or NULL, expert_start
 * Out    expert_offsets, sorted_token_ids, row_of_slot (and tiles, num_tiles where asked for)
 * Math   a counting sort, stable by slot
 * Cost   two passes over the slots, one thread: 2 ms at a million slots
 *
 * moe_cpu_align_pad: the same rows padded to blocks, for the kernels of other engines.
 *
 * FUSEDMOE_CHECK=1: an id that no expert can have is an error here, before anything is written. */
#include "cpu.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static int64_t load_id(const moe_align_args *args, int64_t token, int32_t slot)
{
    const int64_t at = token * args->ids_stride + slot;
    if (args->ids_dtype == MOE_I64) {
        int64_t id;
        memcpy(&id, (const char *)args->topk_ids + at * 8, sizeof id);
        return id;
    }
    int32_t id;
    memcpy(&id, (const char *)args->topk_ids + at * 4, sizeof id);
    return id;
}

/* The local expert of an id, -1 where the slot is dropped. */
static int32_t local_expert(const moe_align_args *args, int64_t id)
{
    int64_t local;
    if (args->expert_map)
        local = id >= 0 && id < args->expert_map_size ? args->expert_map[id] : -1;
    else if (__builtin_sub_overflow(id, args->expert_start, &local))
        local = -1;
    return local >= 0 && local < args->num_experts ? (int32_t)local : -1;
}

static atomic_bool check_asked;

void moe_read_check(void)
{
    const char *check = getenv("FUSEDMOE_CHECK");
    atomic_store_explicit(&check_asked, check && strcmp(check, "1") == 0, memory_order_relaxed);
}

/* An id is wrong when it is none of any rank's experts: outside expert_map; negative where expert_start
 * says that there are other ranks, whose number is not known here; outside [0, num_experts) else. -1 is
 * the word for a dropped slot and always right. */
int moe_cpu_check_ids(const moe_align_args *args, moe_error *err)
{
    if (!atomic_load_explicit(&check_asked, memory_order_relaxed)) return MOE_OK;
    int64_t end = args->num_experts;
    if (args->expert_map)
        end = args->expert_map_size;
    else if (args->expert_start)
        end = INT64_MAX;
    for (int64_t token = 0; token < args->num_tokens; ++token)
        for (int32_t slot = 0; slot < args->topk; ++slot) {
            const int64_t id = load_id(args, token, slot);
            if (id < -1 || id >= end)
                return moe_fail(err, MOE_ERROR_VALUE,
                                "topk_ids: expected -1 or 0 <= id < %" PRId64 ", got %" PRId64
                                " at [%" PRId64 ", %d]",
                                end, id, token, slot);
        }
    return MOE_OK;
}

static void list_tiles(const moe_align_args *args)
{
    int32_t count = 0;
    for (int32_t e = 0; e < args->num_experts; ++e)
        for (int32_t row = args->expert_offsets[e]; row < args->expert_offsets[e + 1];
             row += args->tile_rows) {
            const int32_t left = args->expert_offsets[e + 1] - row;
            if (args->tiles && count < args->max_tiles)
                args->tiles[count] =
                    (moe_tile){e, row, left < args->tile_rows ? left : args->tile_rows, 0};
            ++count;
        }
    if (args->num_tiles) *args->num_tiles = count;
}

int moe_cpu_align(const moe_align_args *args, moe_error *err)
{
    if (moe_cpu_check_ids(args, err)) return err->status;

    /* offsets[e + 1] counts expert e, then becomes the end of e. row_of_slot holds the expert between
     * the passes, so that each id is looked up once. */
    int32_t *offsets = args->expert_offsets;
    memset(offsets, 0, ((size_t)args->num_experts + 1) * sizeof *offsets);
    int32_t *expert_of_slot = args->row_of_slot;
    for (int64_t token = 0; token < args->num_tokens; ++token)
        for (int32_t slot = 0; slot < args->topk; ++slot) {
            const int32_t expert = local_expert(args, load_id(args, token, slot));
            *expert_of_slot++ = expert;
            if (expert >= 0) ++offsets[expert + 1];
        }
    for (int32_t e = 0; e < args->num_experts; ++e)
        offsets[e + 1] += offsets[e];

    /* Placing moves offsets[e] from the begin to the end of e; shifting by one undoes that. */
    const int64_t num_slots = args->num_tokens * args->topk;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
        const int32_t expert = args->row_of_slot[slot];
        if (expert < 0) continue;
        const int32_t row = offsets[expert]++;
        args->sorted_token_ids[row] = (int32_t)slot;
        args->row_of_slot[slot] = row;
    }
    memmove(offsets + 1, offsets, (size_t)args->num_experts * sizeof *offsets);
    offsets[0] = 0;
    if (args->tiles || args->num_tiles) list_tiles(args);
    return MOE_OK;
}

int moe_cpu_align_pad(const moe_pad_args *args, moe_error *err)
{
    (void)err;
    const int32_t sentinel = (int32_t)args->num_slots;
    int64_t at = 0, block = 0;
    for (int32_t e = 0; e < args->num_experts; ++e) {
        const int32_t first = args->expert_offsets[e], count = args->expert_offsets[e + 1] - first;
        if (args->counts) args->counts[e] = count;
        if (!args->sorted_token_ids) continue;
        memcpy(args->sorted_token_ids + at, args->rows + first, (size_t)count * sizeof(int32_t));
        for (at += count; at % args->block_size; ++at)
            args->sorted_token_ids[at] = sentinel;
        while (block * args->block_size < at)
            args->expert_ids[block++] = e;
    }
    if (!args->sorted_token_ids) return MOE_OK;
    *args->num_tokens_post_padded = (int32_t)at;
    for (; args->fill && at < args->capacity; ++at)
        args->sorted_token_ids[at] = sentinel;
    while (block < args->num_blocks)
        args->expert_ids[block++] = -1;
    return MOE_OK;
}
