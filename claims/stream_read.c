// RAM read rate in the manner of STREAM (https://www.cs.virginia.edu/stream/), reading alone: every thread
// sums the 64-bit words of an array of its own. A round lasts from the first beginning to the last end, by the
// clocks of the reading threads: one that only watched would itself wait for a core.
//
//   cc -O3 -march=native -pthread stream_read.c -o stream_read && ./stream_read THREADS BYTES
//
// For each line on standard input, a number of seconds, it reads for that long and prints the bytes per second
// of its best round.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { LANES = 32 };  // independent sums, so that no addition waits for the one before it

static pthread_barrier_t gate;
static size_t words;  // of each thread's array
static volatile uint64_t sink;

struct reader {
    double began, ended;
};

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec * 1e-9;
}

static uint64_t *array_of(size_t count) {
    size_t bytes = count * sizeof(uint64_t);
    uint64_t *array = aligned_alloc(2 << 20, bytes);
    if (!array) exit(2);
    madvise(array, bytes, MADV_HUGEPAGE);  // the same kind of pages that numpy asks for
    for (size_t i = 0; i < count; i++) array[i] = i;
    return array;
}

static void *read_rounds(void *given) {
    struct reader *self = given;
    uint64_t *array = array_of(words);
    pthread_barrier_wait(&gate);  // all arrays are written
    for (;;) {
        uint64_t sums[LANES] = {0}, sum = 0;
        pthread_barrier_wait(&gate);
        self->began = now();
        for (size_t i = 0; i < words; i += LANES)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += array[i + lane];
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        sink = sum;
        self->ended = now();
        pthread_barrier_wait(&gate);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc == 3 ? atoi(argv[1]) : 0;
    if (threads < 1) return 2;
    const size_t page_words = (2 << 20) / sizeof(uint64_t);
    words = strtoull(argv[2], NULL, 10) / threads / (page_words * sizeof(uint64_t)) * page_words;
    if (words == 0) return 2;
    struct reader *readers = calloc(threads, sizeof *readers);
    if (!readers) return 2;
    pthread_barrier_init(&gate, NULL, threads + 1);
    for (int i = 0; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, read_rounds, &readers[i])) return 2;
    }
    pthread_barrier_wait(&gate);
    double seconds;
    while (scanf("%lf", &seconds) == 1) {
        double best = 0, until = now() + seconds;
        do {
            pthread_barrier_wait(&gate);
            pthread_barrier_wait(&gate);
            double began = readers[0].began, ended = readers[0].ended;
            for (int i = 1; i < threads; i++) {
                if (readers[i].began < began) began = readers[i].began;
                if (readers[i].ended > ended) ended = readers[i].ended;
            }
            double rate = threads * words * sizeof(uint64_t) / (ended - began);
            if (rate > best) best = rate;
        } while (now() < until);
        printf("%.0f\n", best);
        fflush(stdout);
    }
    return 0;
}
