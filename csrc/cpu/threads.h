/* threads.h: a small pool of threads for the CPU stages. */
#ifndef MOE_THREADS_H
#define MOE_THREADS_H

/* Threads a region may use: FUSEDMOE_NUM_THREADS, else the cores this process may run on. */
int moe_num_threads(void);
void moe_read_num_threads(void); /* the variable; with the GIL, see moe_cpu_read_environment */

/* Work of one region. thread is 0 (the caller) .. max_threads - 1 and unique within the region. Work has
 * to be taken from a shared counter: a region ends when the threads that entered have returned, and how
 * many enter is not known beforehand (a sleeping core is not waited for, a busy pool not at all). */
typedef void (*moe_region)(void *context, int thread);

/* Runs region on the caller and on up to max_threads - 1 threads of the pool; returns when all are done.
 * Any thread may call, also several at once (one gets the pool, the others run alone), also in a forked
 * child (which builds its own pool). Not from within a region. */
void moe_parallel(int max_threads, moe_region region, void *context);

#endif
