/* plan_cache.c: plans by problem and device; making one costs tens of microseconds. */
#include "moe.h"

#include <string.h>

static uint64_t problem_hash(const moe_problem *problem, moe_backend backend, int32_t device)
{
    uint64_t words[sizeof(moe_problem) / 8];
    uint64_t hash = (uint64_t)(uint32_t)device << 1 | (uint64_t)backend;
    _Static_assert(sizeof(moe_problem) % 8 == 0, "moe_problem is hashed in words of 8 bytes");
    memcpy(words, problem, sizeof words);
    for (size_t i = 0; i < sizeof words / 8; ++i) {
        hash = (hash ^ words[i]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return hash;
}

bool moe_plan_find(const moe_plan_cache *cache, const moe_problem *problem, moe_backend backend,
                   int32_t device, moe_plan *plan)
{
    const uint64_t hash = problem_hash(problem, backend, device);
    for (unsigned i = 0; i < MOE_PLAN_PROBES; ++i) {
        const moe_plan_entry *entry = &cache->entries[(hash + i) % MOE_PLAN_SLOTS];
        if (entry->used && entry->backend == backend && entry->device == device &&
            memcmp(&entry->plan.problem, problem, sizeof *problem) == 0) {
            /* a copy: another thread may need the slot afterwards */
            *plan = entry->plan;
            return true;
        }
    }
    return false;
}

void moe_plan_keep(moe_plan_cache *cache, const moe_problem *problem, moe_backend backend,
                   int32_t device, const moe_plan *plan)
{
    if (memcmp(&plan->problem, problem, sizeof *problem) != 0) return;
    const uint64_t hash = problem_hash(problem, backend, device);
    moe_plan_entry *slot = NULL;
    for (unsigned i = 0; slot == NULL && i < MOE_PLAN_PROBES; ++i) {
        moe_plan_entry *entry = &cache->entries[(hash + i) % MOE_PLAN_SLOTS];
        if (!entry->used) slot = entry;
    }
    if (slot == NULL)
        slot = &cache->entries[(hash + cache->evictions++ % MOE_PLAN_PROBES) % MOE_PLAN_SLOTS];
    slot->used = true;
    slot->backend = backend;
    slot->device = device;
    slot->plan = *plan;
}
