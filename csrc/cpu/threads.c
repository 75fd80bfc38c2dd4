/* threads.c: one pool, one region at a time.
 *
 * A region opens by a change of epoch. A worker that sees it enters under the mutex while the region is
 * open, so a core that wakes late finds it closed and nobody waited for it; at decode the caller often
 * has finished a stage before a sleeping core would have started. Workers spin for a moment after a
 * region, because the next stage follows within microseconds, then sleep. */
#define _GNU_SOURCE
#include "threads.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 1024,
    SPIN_NS =
        60 * 1000, /* longer than the pause between two stages, far below a scheduler's tick */
    STACK_BYTES = 1 << 20
};

static struct {
    pthread_mutex_t owner; /* held for a region by the thread that opened it */
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t wake;   /* workers: epoch has changed */
    pthread_cond_t done;   /* owner: num_running has reached 0 */
    moe_region region;
    void *context;
    bool open;
    int max_entered;
    int num_entered;
    int num_sleeping;
    int num_workers;
    atomic_uint epoch;
    atomic_int num_running;
} pool = {
    .owner = PTHREAD_MUTEX_INITIALIZER,
    .mutex = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

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

/* In a forked child only the forking thread is left: forget the workers and whatever they held. */
static void after_fork(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.open = false;
    pool.num_sleeping = 0;
    pool.num_workers = 0;
    atomic_store(&pool.num_running, 0);
}

static void register_fork_handler(void)
{
    pthread_atfork(NULL, NULL, after_fork);
}

/* Spins until *value differs from old or the time is up. */
static bool spin_while_equal(atomic_uint *value, unsigned old)
{
    long long end = 0;
    for (unsigned i = 1;; ++i) {
        if (atomic_load_explicit(value, memory_order_acquire) != old) return true;
        pause_core();
        if (i % 64) continue;
        long long now = clock_ns();
        if (!end) end = now + SPIN_NS;
        if (now >= end) return false;
    }
}

static void *worker(void *argument)
{
    unsigned seen = (unsigned)(size_t)argument;
    for (;;) {
        bool changed = spin_while_equal(&pool.epoch, seen);
        pthread_mutex_lock(&pool.mutex);
        if (!changed) {
            ++pool.num_sleeping;
            while (atomic_load(&pool.epoch) == seen)
                pthread_cond_wait(&pool.wake, &pool.mutex);
            --pool.num_sleeping;
        }
        seen = atomic_load(&pool.epoch);
        if (pool.open && pool.num_entered < pool.max_entered) {
            int thread = pool.num_entered++;
            moe_region region = pool.region;
            void *context = pool.context;
            atomic_fetch_add(&pool.num_running, 1);
            pthread_mutex_unlock(&pool.mutex);
            region(context, thread);
            pthread_mutex_lock(&pool.mutex);
            if (atomic_fetch_sub(&pool.num_running, 1) == 1) pthread_cond_signal(&pool.done);
        }
        pthread_mutex_unlock(&pool.mutex);
    }
    return NULL;
}

/* Starts workers until there are count, or as many as the system allows. The mutex is held. */
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
        void *seen = (void *)(size_t)atomic_load(&pool.epoch);
        if (pthread_create(&thread, &attributes, worker, seen)) break;
        ++pool.num_workers;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void moe_parallel(int max_threads, moe_region region, void *context)
{
    pthread_once(&fork_handler, register_fork_handler);
    if (max_threads < 2 || pthread_mutex_trylock(&pool.owner)) {
        region(context, 0);
        return;
    }
    pthread_mutex_lock(&pool.mutex);
    start_workers(max_threads - 1);
    pool.region = region;
    pool.context = context;
    pool.max_entered = max_threads;
    pool.num_entered = 1;
    pool.open = true;
    atomic_fetch_add(&pool.epoch, 1);
    if (pool.num_sleeping) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);

    region(context, 0);

    pthread_mutex_lock(&pool.mutex);
    pool.open = false;
    pthread_mutex_unlock(&pool.mutex);
    long long end = 0;
    for (unsigned i = 1; atomic_load_explicit(&pool.num_running, memory_order_acquire); ++i) {
        pause_core();
        if (i % 64) continue;
        long long now = clock_ns();
        if (!end) end = now + SPIN_NS;
        if (now >= end) break;
    }
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load(&pool.num_running))
        pthread_cond_wait(&pool.done, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
    pthread_mutex_unlock(&pool.owner);
}
