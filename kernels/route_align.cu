/* route_align.cu: route and align of a few tokens in one launch                      (stages 1 and 2 of 5)
 * In, out  those of route.cu and align.cu
 * Grid     one block: a warp per token, then a thread for each slot and each offset
 * Needs    a row of route_variants.def that says so; at most MOE_ROUTE_ALIGN_SLOTS slots and threads
 * Cost     route and 0.5 us. From 4 or 8 tokens on one SM routes so much longer that a second launch is sooner done,
 *          sooner than a cluster of blocks too */
#include "align.cuh"
#include "route.cuh"

static constexpr int kWarps = MOE_ROUTE_ALIGN_THREADS / 32;

template <int kHeld, bool kPacked>
static __device__ __forceinline__ void route_align(const moe_route_align_args &args,
                                                   const moe_route_args &route)
{
    __shared__ warp_scratch scratch[kWarps];
    __shared__ uint4 keys[MOE_ROUTE_ALIGN_SLOTS / 4];
    __shared__ uint32_t begins[MOE_ROUTE_ALIGN_SLOTS / 32]; // a bit for each row: a tile with it
    const moe_align_args &align = args.align;
    const int32_t num_tokens = static_cast<int32_t>(route.num_tokens), topk = align.topk;
    const slot_keys slots = {keys, num_tokens * topk};
    slots.fill_up();
    if (threadIdx.x < MOE_ROUTE_ALIGN_SLOTS / 32) begins[threadIdx.x] = 0;
    fetch_parameters(args);
    grid_dependency_wait();
    grid_launch_dependents();
    for (int32_t token = threadIdx.x / 32; token < num_tokens; token += blockDim.x / 32)
        route_row<kHeld, kPacked, true>(route, token, scratch[threadIdx.x / 32],
                                        [&](int32_t lane, int64_t id) {
                                            slots.put(token * topk + lane, local_expert(align, id));
                                        });
    __syncthreads();
    for (int32_t which = threadIdx.x; which <= slots.num_slots + align.num_experts;
         which += blockDim.x)
        slots.place<1>(align, which);
    if (!align.tiles) return;

    // A tile's number is how many rows in front of its first one begin a tile.
    const int32_t slot = threadIdx.x; // there is a thread for each
    const uint32_t key = slot < slots.num_slots ? slots.of(slot) : ~0u;
    const int32_t expert = static_cast<int32_t>(key >> 16);
    int32_t row = 0, within = 1, end = 0;
    if (key != ~0u) {
        row = slots.less_than<1>(key);
        within = row - slots.less_than<1>(slot_keys::first_of(expert));
        end = slots.less_than<1>(slot_keys::first_of(expert + 1));
    }
    const uint32_t height = static_cast<uint32_t>(align.tile_rows);
    const bool first = key != ~0u && divide_by_height(height, within) * height == within;
    if (first) atomicOr(&begins[row / 32], 1u << row % 32);
    __syncthreads();
    int32_t tile = 0, tiles = 0; // in front of the row, in all
#pragma unroll
    for (int32_t i = 0; i < MOE_ROUTE_ALIGN_SLOTS / 32; ++i) {
        const uint32_t in_front = i < row / 32 ? ~0u : i == row / 32 ? (1u << row % 32) - 1 : 0;
        tile += __popc(begins[i] & in_front);
        tiles += __popc(begins[i]);
    }
    if (first && tile < align.max_tiles)
        align.tiles[tile] = {expert, row, min(end - row, align.tile_rows), 0};
    if (slot == 0) write_num_tiles(align, tiles);
}

#define MOE_ROUTE_ALIGN_VARIANT(name, held, packed, score, key, groups)                            \
    extern "C" __global__ void __launch_bounds__(MOE_ROUTE_ALIGN_THREADS, 1)                       \
        moe_route_align_##name(const __grid_constant__ moe_route_align_args args)                  \
    {                                                                                              \
        const moe_route_args route =                                                               \
            unpack<held, packed, MOE_SCORE_##score, MOE_KEY_##key, groups>(args.route);            \
        route_align<held, packed>(args, route);                                                    \
    }
#include "route_variants.def"
