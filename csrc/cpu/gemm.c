/* gemm.c: the grouped matrix product, threads over (expert, rows, columns).
 *
 * Weights and token rows both have K contiguous, so an output is a dot product: a tile of 4 weight rows
 * by up to 6 token rows keeps its accumulators in registers and adds up their lanes at the end
 * (simd_vector.h). Around it:
 *
 *   item    one expert, up to MAX_ROWS of its rows, a block of columns
 *   share   consecutive items, what a thread takes at a time: long runs of memory first, single items
 *           at the end of a stage, so that the threads finish together
 *   pack    the item's token rows, gathered into one buffer that stays in L2, in the order of the tile;
 *           kept for as long as the thread's next items have the same rows
 *   tile    4 weight rows; for each block of BLOCK_K elements all token rows, group by group. The weights
 *           of that block stay in L1, the token rows come from L2
 *
 * While a tile is computed, the weights that follow are fetched, also across the end of an item. At decode
 * this makes it a stream of weights; at prefill the loads hide behind the products. */
#include "gemm.h"

#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>

enum {
    BLOCK_K = 2048,            /* elements; fixed, as it sets the order of additions */
    MAX_ROWS = 128,            /* token rows of an item */
    PACKED_BYTES = 512 * 1024, /* aim for one item's packed token rows: half of a common L2 */
    ITEM_BYTES = 1024 * 1024,  /* aim for one item's weights */
    MIN_COLS = MOE_VECTOR_FLOATS,
    ITEMS_PER_THREAD = 16,       /* at least, where MIN_COLS allows: evens out the end of a stage */
    SHARES = 4,                  /* a share is this part of what is left for each thread */
    LOOKAHEAD_BYTES = 16 * 1024, /* from fetching a weight to using it, for more than one group */
    SMALL_WORK = 256 * 1024      /* weight bytes + products / 8 not worth waking a thread for */
};

/* The rows of one expert that has any. */
typedef struct expert_work {
    int64_t first_item;
    int64_t row;
    int32_t expert, num_rows, num_chunks, chunk_rows;
} expert_work;

typedef struct gemm_run {
    const moe_gemm *gemm;
    const expert_work *work;
    int64_t num_work, num_items;
    int32_t block_cols, blocks; /* columns of an item, items per chunk */
    int32_t chunk_rows;         /* largest */
    int32_t lookahead;          /* tiles, for more than one group */
    int32_t threads;
    bool in_turn;      /* moe_rows_in_turn */
    int64_t row_bytes; /* of one packed token row */
    int64_t c_stride, widened_floats;
    char *scratch;
    const char *zeros; /* a token row */
    int64_t thread_bytes;
    atomic_llong next;
} gemm_run;

typedef struct gemm_item {
    const char *w; /* the expert's weights */
    int64_t row;
    int32_t expert, num_rows, col, num_cols;
} gemm_item;

typedef struct gemm_share {
    int64_t next, end; /* items */
} gemm_share;

static int64_t round_up(int64_t value, int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The next item of the thread's share, or of a new share. */
static bool take_item(gemm_run *run, gemm_share *share, gemm_item *item)
{
    const moe_gemm *gemm = run->gemm;
    if (share->next == share->end) {
        long long first = atomic_load_explicit(&run->next, memory_order_relaxed), count;
        do {
            if (first >= run->num_items) return false;
            count = (run->num_items - first) / (SHARES * run->threads);
            if (count < 1) count = 1;
        } while (!atomic_compare_exchange_weak_explicit(
            &run->next, &first, first + count, memory_order_relaxed, memory_order_relaxed));
        share->next = first;
        share->end = first + count;
    }
    int64_t index = share->next++;
    int64_t low = 0, high = run->num_work - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (run->work[middle].first_item <= index)
            low = middle;
        else
            high = middle - 1;
    }
    const expert_work *work = &run->work[low];
    index -= work->first_item;
    int64_t first = index / run->blocks * work->chunk_rows;
    item->expert = work->expert;
    item->row = work->row + first;
    item->num_rows = (int32_t)smaller(work->chunk_rows, work->num_rows - first);
    item->col = (int32_t)(index % run->blocks) * run->block_cols;
    item->num_cols = (int32_t)smaller(run->block_cols, gemm->num_cols - item->col);
    item->w =
        (const char *)gemm->w + item->expert * gemm->w_expert_stride * element_bytes(gemm->dtype);
    return true;
}

/* Weight row of column col of a part, bytes from the start of the expert. */
static int64_t weight_offset(const moe_gemm *gemm, int part, int64_t col)
{
    return (gemm->part_row[part] + col * gemm->part_step) * gemm->w_row_stride *
           element_bytes(gemm->dtype);
}

/* Token rows of group i when num_rows are dealt to num_groups as evenly as possible. */
static int group_begin(int num_rows, int num_groups, int i)
{
    return (int)((int64_t)num_rows * i / num_groups);
}

static void pack_rows(const gemm_run *run, const gemm_item *item, char *packed)
{
    const moe_gemm *gemm = run->gemm;
    const int groups = (item->num_rows + gemm->simd->max_tokens - 1) / gemm->simd->max_tokens;
    for (int g = 0; g < groups; ++g) {
        const void *rows[MOE_DOT_MAX_TOKENS];
        const int begin = group_begin(item->num_rows, groups, g);
        const int end = group_begin(item->num_rows, groups, g + 1);
        for (int i = begin; i < end; ++i) {
            int64_t source = item->row + i;
            if (gemm->sorted_token_ids) {
                const int32_t slot = gemm->sorted_token_ids[source];
                source = slot < 0 ? -1 : slot / gemm->topk;
            }
            rows[i - begin] = run->zeros;
            if (source >= 0 && source < gemm->num_sources)
                rows[i - begin] =
                    (const char *)gemm->a + source * gemm->a_stride * element_bytes(gemm->dtype);
        }
        gemm->simd->pack[gemm->dtype](packed + begin * run->row_bytes, rows, end - begin, gemm->k);
    }
}

/* Address of tile number index of an item (four weight rows from there on), for prefetching. */
static const char *tile_address(const gemm_run *run, const gemm_item *item, int index)
{
    const int tiles = (item->num_cols + MOE_DOT_ROWS - 1) / MOE_DOT_ROWS;
    const int part = index / tiles;
    return item->w +
           weight_offset(run->gemm, part, item->col + (int64_t)(index % tiles) * MOE_DOT_ROWS);
}

/* Says what dot fetches while group group of groups is computed: its part of the four rows at ahead. */
static void set_prefetch(moe_dot *dot, const char *ahead, int64_t row_stride, int64_t block_bytes,
                         int group, int groups)
{
    const int first = group_begin(MOE_DOT_ROWS, groups, group);
    dot->num_prefetch = ahead ? group_begin(MOE_DOT_ROWS, groups, group + 1) - first : 0;
    dot->prefetch = (uintptr_t)ahead + (uintptr_t)(first * row_stride);
    if (row_stride == block_bytes) { /* adjacent rows: in the order of memory */
        dot->prefetch_step = dot->num_prefetch;
        dot->prefetch_stride = 64;
    } else {
        dot->prefetch_step = 1;
        dot->prefetch_stride = row_stride;
    }
}

static void multiply_item(const gemm_run *run, const gemm_item *item, const gemm_item *next,
                          const char *packed, float *c, float *widened)
{
    const moe_gemm *gemm = run->gemm;
    const moe_simd *simd = gemm->simd;
    const int64_t bytes = element_bytes(gemm->dtype);
    const int64_t packed_bytes = simd->packed_element_bytes[gemm->dtype];
    const int64_t row_stride = gemm->w_row_stride * gemm->part_step * bytes;
    const int groups = (item->num_rows + simd->max_tokens - 1) / simd->max_tokens;
    const int tiles = (item->num_cols + MOE_DOT_ROWS - 1) / MOE_DOT_ROWS;
    const int all_tiles = tiles * gemm->num_parts;
    const int lookahead = groups > 1 ? run->lookahead : 1;
    const bool widen = simd->widen && gemm->dtype != MOE_F32 && groups > 1;
    moe_dot dot = {.c_stride = run->c_stride, .in_turn = run->in_turn};

    for (int t = 0; t < all_tiles; ++t) {
        const int part = t / tiles;
        const int32_t col = t % tiles * MOE_DOT_ROWS; /* within the item */
        const char *rows[MOE_DOT_ROWS], *following = NULL;
        for (int i = 0; i < MOE_DOT_ROWS; ++i) { /* the last row stands in for those lacking */
            int64_t existing = smaller(col + i, item->num_cols - 1);
            rows[i] = item->w + weight_offset(gemm, part, item->col + existing);
        }
        if (t + lookahead < all_tiles)
            following = tile_address(run, item, t + lookahead);
        else if (next)
            following = tile_address(run, next, t + lookahead - all_tiles);
        for (int64_t k = 0; k < gemm->k; k += BLOCK_K) {
            const char *ahead = k + BLOCK_K < gemm->k ? rows[0] + (k + BLOCK_K) * bytes : following;
            dot.k = smaller(BLOCK_K, gemm->k - k);
            dot.accumulate = k > 0;
            for (int i = 0; i < MOE_DOT_ROWS; ++i)
                dot.w[i] = rows[i] + k * bytes;
            if (widen)
                for (int i = 0; i < MOE_DOT_ROWS; ++i) {
                    simd->widen(widened + i * BLOCK_K, dot.w[i], dot.k, gemm->dtype);
                    dot.w[i] = widened + i * BLOCK_K;
                }
            for (int g = 0; g < groups; ++g) {
                const int begin = group_begin(item->num_rows, groups, g);
                const int num_tokens = group_begin(item->num_rows, groups, g + 1) - begin;
                dot.fresh = g == 0 && !widen;
                dot.x = packed + begin * run->row_bytes + k * num_tokens * packed_bytes;
                dot.c = c + (part * (int64_t)run->chunk_rows + begin) * run->c_stride + col;
                set_prefetch(&dot, ahead, row_stride, dot.k * bytes, g, groups);
                simd->dot[widen ? MOE_F32 : gemm->dtype](&dot, num_tokens);
            }
        }
    }
}

static void gemm_region(void *context, int thread)
{
    gemm_run *run = context;
    const moe_gemm *gemm = run->gemm;
    char *packed = run->scratch + thread * run->thread_bytes;
    float *widened = (float *)(void *)(packed + run->chunk_rows * run->row_bytes);
    float *c = widened + run->widened_floats;
    gemm_item item, next;
    int64_t packed_row = -1;

    gemm_share share = {0, 0};
    bool more = take_item(run, &share, &next);
    while (more) {
        item = next;
        more = take_item(run, &share, &next);
        if (item.row != packed_row) pack_rows(run, &item, packed);
        packed_row = item.row;
        multiply_item(run, &item, more ? &next : NULL, packed, c, widened);
        moe_gemm_block block = {.row = item.row,
                                .c_stride = run->c_stride,
                                .num_rows = item.num_rows,
                                .col = item.col,
                                .num_cols = item.num_cols,
                                .expert = item.expert,
                                .c = {c, c + run->chunk_rows * run->c_stride}};
        gemm->finish(gemm->args, gemm->simd, &block);
    }
}

/* Lists the experts that have rows; returns how many. Sets chunk_rows, the largest chunk. */
static int64_t list_work(const moe_gemm *gemm, int32_t max_rows, expert_work *work,
                         int32_t *chunk_rows, int64_t *num_chunks)
{
    int64_t count = 0;
    *chunk_rows = 0;
    *num_chunks = 0;
    for (int32_t e = 0; e < gemm->num_experts; ++e) {
        const int64_t begin = gemm->expert_offsets[e] > 0 ? gemm->expert_offsets[e] : 0;
        const int64_t num_rows = smaller(gemm->expert_offsets[e + 1], gemm->num_slots) - begin;
        if (num_rows <= 0) continue;
        expert_work *w = &work[count++];
        w->expert = e;
        w->row = begin;
        w->num_rows = (int32_t)num_rows;
        w->num_chunks = (int32_t)((num_rows + max_rows - 1) / max_rows);
        w->chunk_rows = (int32_t)((num_rows + w->num_chunks - 1) / w->num_chunks);
        *num_chunks += w->num_chunks;
        if (w->chunk_rows > *chunk_rows) *chunk_rows = w->chunk_rows;
    }
    return count;
}

int moe_grouped_gemm(const moe_gemm *gemm, moe_error *err)
{
    const moe_simd *simd = gemm->simd;
    const int64_t bytes = element_bytes(gemm->dtype);
    int threads = moe_num_threads();
    gemm_run run = {.gemm = gemm, .in_turn = moe_rows_in_turn()};
    run.row_bytes =
        round_up(gemm->k, simd->step[gemm->dtype]) * simd->packed_element_bytes[gemm->dtype];

    int64_t max_rows = smaller(PACKED_BYTES / run.row_bytes, MAX_ROWS);
    max_rows = max_rows / simd->max_tokens * simd->max_tokens;
    if (max_rows < simd->max_tokens) max_rows = simd->max_tokens;

    expert_work *work = malloc((size_t)gemm->num_experts * sizeof *work);
    if (!work)
        return moe_fail(err, MOE_ERROR_MEMORY, "no memory for the work list of %d experts",
                        gemm->num_experts);
    int64_t num_chunks;
    run.work = work;
    run.num_work = list_work(gemm, (int32_t)max_rows, work, &run.chunk_rows, &num_chunks);
    if (run.num_work == 0) {
        free(work);
        return MOE_OK;
    }

    const int64_t col_bytes = gemm->k * bytes * gemm->num_parts;
    int64_t cols = ITEM_BYTES / col_bytes / MIN_COLS * MIN_COLS;
    cols = cols < MIN_COLS ? MIN_COLS : smaller(cols, MOE_GEMM_MAX_COLS);
    while (cols > MIN_COLS &&
           num_chunks * ((gemm->num_cols + cols - 1) / cols) < (int64_t)threads * ITEMS_PER_THREAD)
        cols -= MIN_COLS;
    run.block_cols = (int32_t)cols;
    run.blocks = (gemm->num_cols + run.block_cols - 1) / run.block_cols;
    int64_t total_rows = 0;
    for (int64_t i = 0; i < run.num_work; ++i) {
        work[i].first_item = run.num_items;
        run.num_items += (int64_t)work[i].num_chunks * run.blocks;
        total_rows += work[i].num_rows;
    }
    if ((run.num_work * bytes + total_rows / 8) * gemm->num_cols * gemm->num_parts * gemm->k <
        SMALL_WORK)
        threads = 1;
    threads = (int)smaller(threads, run.num_items);
    run.threads = threads;

    /* Not past the end of the next item, which can be the short one at the end of an expert. A row of
     * several blocks of K looks one block ahead. */
    const int64_t tile_bytes = MOE_DOT_ROWS * gemm->k * bytes;
    const int64_t last_cols = gemm->num_cols - (run.blocks - 1) * (int64_t)run.block_cols;
    run.lookahead = (int32_t)smaller((LOOKAHEAD_BYTES + tile_bytes - 1) / tile_bytes,
                                     (last_cols + MOE_DOT_ROWS - 1) / MOE_DOT_ROWS);

    run.c_stride = round_up(cols, MOE_VECTOR_FLOATS);
    run.widened_floats = simd->widen ? MOE_DOT_ROWS * BLOCK_K : 0;
    run.thread_bytes =
        round_up(run.chunk_rows * (run.row_bytes + gemm->num_parts * run.c_stride * 4) +
                     run.widened_floats * 4,
                 4096);
    const int64_t zero_bytes = round_up(gemm->k * bytes, 4096);
    const int64_t scratch_bytes = run.thread_bytes * threads + zero_bytes;
    run.scratch = aligned_alloc(4096, (size_t)scratch_bytes);
    if (!run.scratch) {
        free(work);
        return moe_fail(err, MOE_ERROR_MEMORY, "no memory for %lld bytes of scratch",
                        (long long)scratch_bytes);
    }
    run.zeros = memset(run.scratch + run.thread_bytes * threads, 0, (size_t)zero_bytes);
    moe_parallel(threads, gemm_region, &run);
    free(run.scratch);
    free(work);
    return MOE_OK;
}
