/* threads.c: one pool, one region at a time.
 *
 * One word, the gate, says how many places the region has left and how many workers are in it. A worker
 * enters by taking a place; the region closes by taking all that are left, so a core that wakes late finds
 * none and nobody waited for it: at decode the caller often has finished a stage before a sleeping core
 * would have started. Nothing on the way in or out takes a lock: sixteen workers that queue for one cost
 * more than most stages.
 *
 * Workers spin for a moment after a region, because the next stage follows within microseconds, then
 * sleep. Whoever is in a region wakes two sleepers while there are places, so that the caller starts
 * its own work after two calls to the system, not after one for each core. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 1024,
    WAKES = 2,
    SPIN_NS =
        60 * 1000, /* longer than the pause between two stages, far below a scheduler's tick */
    STACK_BYTES = 1 << 20
};

/* The gate: regions so far << 32 | places left << 16 | workers inside. It is changed as a whole, so a
 * worker that takes a place has taken it in the region it looked at. */
#define INSIDE ((unsigned long long)1)
#define PLACE  ((unsigned long long)1 << 16)
#define REGION ((unsigned long long)1 << 32)

static struct {
    /* Written by the owner while nobody is inside and no place is left; read by who is inside. */
    _Alignas(64) atomic_ullong gate;
    moe_region region;
    void *context;
    int max_entered;

    _Alignas(64) pthread_mutex_t owner; /* held for a region by the thread that opened it */
    int num_workers;                    /* with the mutex */
    sem_t wake, done;                   /* of workers, of the owner */
    atomic_int num_sleeping; /* workers that wait for `wake`, or will, and are owed none yet */
    atomic_int owner_sleeps;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

static void pause_core(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long long clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int num_cores(void)
{
    static atomic_int cached;
    int cores = atomic_load_explicit(&cached, memory_order_relaxed);
    if (cores) return cores;
#if defined(__linux__)
    cpu_set_t *set = CPU_ALLOC(8192);
    size_t bytes = CPU_ALLOC_SIZE(8192);
    if (set) {
        if (sched_getaffinity(0, bytes, set) == 0) cores = CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
    }
#endif
    if (cores < 1) cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (cores < 1) cores = 1;
    atomic_store_explicit(&cached, cores, memory_order_relaxed);
    return cores;
}

static atomic_int asked_threads; /* FUSEDMOE_NUM_THREADS; 0: not given */

void moe_read_num_threads(void)
{
    int threads = 0;
    const char *text = getenv("FUSEDMOE_NUM_THREADS");
    if (text && *text) {
        char *end;
        long value = strtol(text, &end, 10);
        if (*end == 0 && value > 0) threads = value < MAX_THREADS ? (int)value : MAX_THREADS;
    }
    atomic_store_explicit(&asked_threads, threads, memory_order_relaxed);
}

int moe_num_threads(void)
{
    int threads = atomic_load_explicit(&asked_threads, memory_order_relaxed);
    if (!threads) threads = num_cores();
    return threads < MAX_THREADS ? threads : MAX_THREADS;
}

static void reset_pool(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    sem_init(&pool.wake, 0, 0);
    sem_init(&pool.done, 0, 0);
    pool.num_workers = 0;
    atomic_store(&pool.gate, 0);
    atomic_store(&pool.num_sleeping, 0);
    atomic_store(&pool.owner_sleeps, 0);
}

/* In a forked child only the forking thread is left: it forgets the workers and whatever they held. */
static void make_pool(void)
{
    reset_pool();
    pthread_atfork(NULL, NULL, reset_pool);
}

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore)) /* interrupted */
        continue;
}

static int places(unsigned long long gate)
{
    return (int)(gate / PLACE % (REGION / PLACE));
}

/* Wakes up to count workers that sleep. */
static void wake_workers(int count)
{
    int sleeping = atomic_load(&pool.num_sleeping), woken;
    do {
        if (sleeping == 0) return;
        woken = sleeping < count ? sleeping : count;
    } while (!atomic_compare_exchange_weak(&pool.num_sleeping, &sleeping, sleeping - woken));
    while (woken--)
        sem_post(&pool.wake);
}

/* Spins until there is another region than `seen` or the time is up. */
static bool spin_for_region(unsigned long long seen)
{
    long long end = 0;
    for (unsigned i = 1;; ++i) {
        if (atomic_load_explicit(&pool.gate, memory_order_relaxed) / REGION != seen) return true;
        pause_core();
        if (i % 64) continue;
        const long long now = clock_ns();
        if (!end) end = now + SPIN_NS;
        if (now >= end) return false;
    }
}

static void sleep_for_region(unsigned long long seen)
{
    int sleeping = atomic_fetch_add(&pool.num_sleeping, 1) + 1;
    if (atomic_load(&pool.gate) / REGION != seen)
        while (sleeping > 0) /* none: somebody has taken this worker for asleep and wakes it */
            if (atomic_compare_exchange_weak(&pool.num_sleeping, &sleeping, sleeping - 1)) return;
    wait_for(&pool.wake);
}

/* The worker's number in the region that is open; 0: there is none, or it has no place left. */
static int enter_region(unsigned long long *seen)
{
    unsigned long long gate = atomic_load(&pool.gate);
    int left;
    do {
        *seen = gate / REGION;
        left = places(gate);
        if (left == 0) return 0;
    } while (!atomic_compare_exchange_weak(&pool.gate, &gate, gate - PLACE + INSIDE));
    if (left > 1) wake_workers(left - 1 < WAKES ? left - 1 : WAKES);
    return pool.max_entered - left;
}

static void leave_region(void)
{
    if ((atomic_fetch_sub(&pool.gate, INSIDE) - INSIDE) % REGION == 0 &&
        atomic_exchange(&pool.owner_sleeps, 0))
        sem_post(&pool.done);
}

static void *worker(void *argument)
{
    unsigned long long seen = (uintptr_t)argument;
    for (;;) {
        if (!spin_for_region(seen)) sleep_for_region(seen);
        const int thread = enter_region(&seen);
        if (thread == 0) continue;
        pool.region(pool.context, thread);
        leave_region();
    }
    return NULL;
}

/* Starts workers until there are count, or as many as the system allows. */
static void start_workers(int count)
{
    if (pool.num_workers >= count) return;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the threads that Python knows */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (pool.num_workers < count) {
        pthread_t thread;
        void *seen = (void *)(uintptr_t)(atomic_load(&pool.gate) / REGION);
        if (pthread_create(&thread, &attributes, worker, seen)) break;
        ++pool.num_workers;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Until nobody is inside a region that is closed. */
static void wait_for_workers(void)
{
    long long end = 0;
    for (unsigned i = 1; atomic_load(&pool.gate) % REGION; ++i) {
        pause_core();
        if (i % 64) continue;
        const long long now = clock_ns();
        if (!end) end = now + SPIN_NS;
        if (now < end) continue;
        /* Who takes the flag back decides whether a post is owed. A worker that left an earlier region may
         * take it, too: hence the loop. */
        atomic_store(&pool.owner_sleeps, 1);
        if (atomic_load(&pool.gate) % REGION || !atomic_exchange(&pool.owner_sleeps, 0))
            wait_for(&pool.done);
    }
}

void moe_parallel(int max_threads, moe_region region, void *context)
{
    pthread_once(&pool_once, make_pool);
    if (max_threads < 2 || pthread_mutex_trylock(&pool.owner)) {
        region(context, 0);
        return;
    }
    start_workers(max_threads - 1);
    pool.region = region;
    pool.context = context;
    pool.max_entered = max_threads;
    const unsigned long long opened = atomic_load(&pool.gate) / REGION + 1;
    atomic_store(&pool.gate, opened * REGION + (unsigned)(max_threads - 1) * PLACE);
    wake_workers(max_threads - 1 < WAKES ? max_threads - 1 : WAKES);

    region(context, 0);

    atomic_fetch_and(&pool.gate, ~(REGION - PLACE));
    wait_for_workers();
    pthread_mutex_unlock(&pool.owner);
}
