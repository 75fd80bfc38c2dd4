/* slots.cuh: the rule by which an id of topk_ids is an expert held here, for align and for the kernels that read
 * topk_ids themselves. */
#ifndef MOE_SLOTS_CUH
#define MOE_SLOTS_CUH

#include <stdint.h>

// The expert that an id goes to, or -1. args: expert_map, expert_map_size, expert_start, num_experts; load: an entry of
// expert_map.
template <class Args, class Load>
static __device__ __forceinline__ int32_t expert_of_id(const Args &args, int64_t id, Load load)
{
    uint64_t local;
    if (args.expert_map) {
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(args.expert_map_size)) return -1;
        local = static_cast<uint64_t>(static_cast<int64_t>(load(args.expert_map + id)));
    } else {
        // Modulo 2^64: a difference that does not fit wraps to something far outside.
        local = static_cast<uint64_t>(id) - static_cast<uint64_t>(args.expert_start);
    }
    return local < static_cast<uint64_t>(args.num_experts) ? static_cast<int32_t>(local) : -1;
}

#endif
