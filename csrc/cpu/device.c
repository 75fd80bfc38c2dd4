/* device.c: the machine the CPU backend runs on. */
#define _GNU_SOURCE
#include "cpu.h"
#include "simd.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if MOE_SIMD_X86
#include <cpuid.h>
#endif

void moe_cpu_read_environment(void)
{
    moe_read_num_threads();
    moe_read_simd();
    moe_read_check();
}

const char *moe_cpu_isa(void)
{
    return moe_get_simd()->name;
}

int moe_cpu_threads(void)
{
    return moe_num_threads();
}

/* The processor's own name, without its padding. */
static void processor_name(char *name, size_t size)
{
    snprintf(name, size, "CPU");
#if MOE_SIMD_X86
    unsigned words[13] = {0};
    if (__get_cpuid_max(0x80000000u, NULL) < 0x80000004u) return;
    for (unsigned i = 0; i < 3; ++i)
        __get_cpuid(0x80000002u + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2],
                    &words[4 * i + 3]);
    const char *text = (const char *)words;
    while (*text == ' ')
        ++text;
    snprintf(name, size, "%s", text);
    for (size_t n = strlen(name); n && name[n - 1] == ' '; --n)
        name[n - 1] = 0;
#endif
}

static int64_t cache_bytes(void)
{
    long bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : (int64_t)1 << 20;
}

/* What does not change while the process lives; asking takes CPUID, which leaves a virtual machine. */
static pthread_once_t machine_once = PTHREAD_ONCE_INIT;
static struct {
    int64_t cache_bytes;
    char name[64];
} machine;

static void ask_machine(void)
{
    machine.cache_bytes = cache_bytes();
    processor_name(machine.name, sizeof machine.name);
}

int moe_cpu_device_info(moe_device_info *info, moe_error *err)
{
    /* Estimates for the plan's cost model, which must not wait for a measurement: a core streams some
     * 20 GB/s, two dozen of them fill a socket; products per clock by vector length at 3 GHz. */
    static const double FLOPS_PER_US[MOE_SIMD_COUNT] = {12e3, 60e3, 90e3, 180e3};
    const moe_simd *simd = moe_get_simd();
    (void)err;
    pthread_once(&machine_once, ask_machine);
    memset(info, 0, sizeof *info);
    info->backend = MOE_CPU;
    info->num_sms = moe_num_threads();
    info->capability = simd->level;
    info->l2_bytes = machine.cache_bytes;
    info->read_bytes_per_us = 20e3 * (info->num_sms < 20 ? info->num_sms : 20);
    info->flops_per_us = FLOPS_PER_US[simd->level] * info->num_sms;
    memcpy(info->name, machine.name, sizeof machine.name);
    return MOE_OK;
}

enum { READ_BLOCK = 1 << 20, READ_PASSES = 6 };

typedef struct read_run {
    const moe_simd *simd;
    const char *data;
    int64_t bytes;
    bool fill;
    atomic_llong next;
    atomic_uint sink;
} read_run;

static void read_region(void *context, int thread)
{
    read_run *run = context;
    uint32_t sink = 0;
    (void)thread;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&run->next, READ_BLOCK, memory_order_relaxed);
        if (at >= run->bytes) break;
        if (run->fill)
            memset((char *)run->data + at, 1, READ_BLOCK);
        else
            sink |= run->simd->read(run->data + at, READ_BLOCK);
    }
    atomic_fetch_or(&run->sink, sink);
}

double moe_cpu_read_bandwidth(void)
{
    read_run run = {.simd = moe_get_simd(), .bytes = 256 << 20};
    while (run.bytes < 3 * cache_bytes() && run.bytes < (int64_t)1 << 30)
        run.bytes *= 2;
    void *data =
        mmap(NULL, (size_t)run.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return 0;
#ifdef MADV_HUGEPAGE
    madvise(data, (size_t)run.bytes, MADV_HUGEPAGE);
#endif
    run.data = data;
    run.fill = true;
    moe_parallel(moe_num_threads(), read_region, &run);
    run.fill = false;
    double best = 0;
    for (int pass = 0; pass < READ_PASSES; ++pass) {
        struct timespec begin, end;
        atomic_store(&run.next, 0);
        clock_gettime(CLOCK_MONOTONIC, &begin);
        moe_parallel(moe_num_threads(), read_region, &run);
        clock_gettime(CLOCK_MONOTONIC, &end);
        double us = (double)(end.tv_sec - begin.tv_sec) * 1e6 +
                    (double)(end.tv_nsec - begin.tv_nsec) * 1e-3;
        if (us > 0 && (double)run.bytes / us > best) best = (double)run.bytes / us;
    }
    munmap(data, (size_t)run.bytes);
    return best;
}
