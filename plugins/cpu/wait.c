// How threads wait for each other, and ranks for other ranks: for some turns of a loop, then asleep in the system.
#pragma once
#include "program.h"
#include "vec.h"

enum { COUNTER = 16, SLEEPERS = 1 };
// Turns of a loop before a thread sleeps, about 400 microseconds, which is more than threads wait for each other at the end
// of a linear layer: nobody sleeps in a step that is not disturbed, because waking takes long. A thread that slept in this step has a busy
// neighbour and sleeps sooner.
enum { SPINS = 8000, FEW_SPINS = 200 };

// What a thread needs to know to wait.
typedef struct {
  int turns;   // of a loop before it sleeps
  exchange *x; // null: there are no other ranks
  position *at; // null: the thread does not pause
} waiter;

// Linux' futex: threads sleep while a word holds a value, or are woken. A word of memory that processes share has
// operations of its own. Returns a negative error number if the thread was not woken.
enum futex_operation { SLEEP_SHARED = 0, WAKE_SHARED = 1, SLEEP = 128, WAKE = 129 };
enum { EVERYBODY = 0x7fffffff, INTERRUPTED = -4, TIMED_OUT = -110 };
static long futex(void *word, long operation, long value, const int64_t *timeout) {
#if defined(__x86_64__) && defined(__linux__)
  register long limit __asm__("r10") = (long)timeout;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(202L), "D"(word), "S"(operation), "d"(value), "r"(limit)
                   : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__) && defined(__linux__)
  register long number __asm__("x8") = 98, result __asm__("x0") = (long)word, what __asm__("x1") = operation,
                of __asm__("x2") = value, limit __asm__("x3") = (long)timeout;
  __asm__ volatile("svc 0" : "+r"(result) : "r"(number), "r"(what), "r"(of), "r"(limit) : "memory");
  return result;
#else
  (void)word, (void)operation, (void)value, (void)timeout; // the caller waits awake
  return 0;
#endif
}

static void rest(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns whether a thread that slept, with the result `woken` of futex, goes on waiting (FINISHED), or why not.
static int go_on(const waiter *w, long woken) {
  if (!w->x) return FINISHED;
  const int stop = __atomic_load_n(&w->x->stop, __ATOMIC_ACQUIRE);
  if (stop) return stop;
  return w->at && (woken == TIMED_OUT || woken == INTERRUPTED) ? PAUSED : FINISHED;
}

// Waits until `items` items are finished. Returns an outcome.
static int wait_for(int32_t *done, int items, waiter *w) {
  for (int turns = w->turns; turns > 0; turns--) {
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) >= items) return FINISHED;
    rest();
  }
  w->turns = FEW_SPINS;
  __atomic_store_n(done + SLEEPERS, 1, __ATOMIC_SEQ_CST);
  for (int32_t seen; (seen = __atomic_load_n(done, __ATOMIC_SEQ_CST)) < items;) {
    const int outcome = go_on(w, futex(done, SLEEP, seen, w->x ? w->x->slice : 0));
    if (outcome) return outcome;
  }
  return FINISHED;
}
// Counts an item, and wakes the threads that sleep until the last one is finished.
static void finish(int32_t *done, int items) {
  if (__atomic_add_fetch(done, 1, __ATOMIC_SEQ_CST) == items && __atomic_load_n(done + SLEEPERS, __ATOMIC_SEQ_CST))
    futex(done, WAKE, EVERYBODY, 0);
}
