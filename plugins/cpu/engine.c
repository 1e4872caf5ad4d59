// The CPU engine: threads run the instructions of a step together.
//
// The work of a group is split into items, which threads take from a counter. A group begins when all items of the
// previous group are finished, not when all threads have arrived. So a preempted thread delays the others only while
// it holds an item. Then they sleep, and the system can give it one of their cores. Nothing here needs a C library.
#include "program.h"
#include "vec.h"
#include "wait.c"
#include "rows.c"
#include "../linear/cpu/linear.c"
#include "../experts/cpu/experts.c"
#include "../paged_attention/cpu/cache.c"
#include "../paged_attention/cpu/attention.c"
#include "../collectives/cpu/collective.c"
#include "check.c"
#include "measure.c"

#define EXPORT __attribute__((visibility("default")))
enum { VERSION = 12, PER_THREAD = 6 };

// Asks the system for what this library needs. Returns 0, or the number of a system's error.
EXPORT int32_t llmc_prepare(void) {
#if defined(__AMX_INT8__) && defined(__linux__)
  long result; // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): the process may use AMX tiles
  __asm__ volatile("syscall" : "=a"(result) : "a"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
  return (int32_t)-result;
#else
  return 0;
#endif
}
EXPORT int32_t llmc_version(void) { return VERSION; }
EXPORT int32_t llmc_instruction_bytes(void) { return (int32_t)sizeof(instruction); }
EXPORT int32_t llmc_step_bytes(void) { return (int32_t)sizeof(step); }
EXPORT int32_t llmc_exchange_bytes(void) { return (int32_t)sizeof(exchange); }
EXPORT int32_t llmc_post_bytes(void) { return (int32_t)sizeof(post); }

// memset and memcpy: compilers emit calls of them, and there is no C library
#ifdef LLMC_FREESTANDING
#if defined(__x86_64__)
__attribute__((used)) void *memset(void *to, int byte, unsigned long count) {
  void *p = to;
  __asm__ volatile("rep stosb" : "+D"(p), "+c"(count) : "a"(byte) : "memory");
  return to;
}
__attribute__((used)) void *memcpy(void *restrict to, const void *restrict from, unsigned long count) {
  void *p = to;
  __asm__ volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(count) : : "memory");
  return to;
}
#else
__attribute__((used)) void *memset(void *to, int byte, unsigned long count) {
  for (volatile uint8_t *p = to; count--;) *p++ = (uint8_t)byte;
  return to;
}
__attribute__((used)) void *memcpy(void *restrict to, const void *restrict from, unsigned long count) {
  volatile uint8_t *p = to;
  for (const uint8_t *q = from; count--;) *p++ = *q++;
  return to;
}
#endif
#endif

// Ticks of a clock that runs at a constant rate.
static int64_t ticks(void) {
#if defined(__x86_64__)
  return (int64_t)__rdtsc();
#elif defined(__aarch64__)
  int64_t count;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
#else
  return 0;
#endif
}

EXPORT int64_t llmc_ticks(void) { return ticks(); }
EXPORT int32_t llmc_read(const uint8_t *p, int64_t bytes) { return read_all(p, bytes); }
EXPORT int64_t llmc_float_products(int64_t turns) { return float_products(turns); }
EXPORT int64_t llmc_integer_products(int64_t turns) { return integer_products(turns); }

static int rows_of(const instruction *i, const step *s) {
  return i->choices ? s->tokens * i->choices : i->per_logit ? s->logits : s->tokens;
}

// Runs row-wise instructions, each row after the other. Keys and values of many rows are written together.
static void run_rows(const instruction *first, const instruction *last, const step *s, int begin, int end) {
  for (const instruction *i; first < last; first = i + (i < last)) {
    for (i = first; i < last && i->op != OP_WRITE_KV;) i++;
    for (int row = begin; row < end; row++)
      for (const instruction *one = first; one < i; one++) run_row(one, s, row);
    if (i < last) write_kv(i, s, begin, end);
  }
}

// The tiles of a linear layer in items: a large one for each thread, which reads them in order, then small ones, so that
// threads finish together.
typedef struct {
  int large, small, threads, tiles;
} tile_items;
static tile_items items_of(int tiles, int threads) {
  const int large = tiles * 5 / 8 / threads, rest = tiles - large * threads;
  return (tile_items){large, (rest + threads * PER_THREAD - 1) / (threads * PER_THREAD), threads, tiles};
}
static int first_tile(const tile_items *t, int item) {
  const int first = item < t->threads ? item * t->large : t->threads * t->large + (item - t->threads) * t->small;
  return first < t->tiles ? first : t->tiles;
}

static int run(const step *s, position *at) {
  const int parts = s->threads * PER_THREAD;
  waiter w = {SPINS, s->exchange, at};
  for (int g = at ? at->group : 0; g < s->num_groups; g++) {
    const instruction *first = s->code + s->groups[g].first, *last = s->code + s->groups[g].last;
    const int experts = first->op == OP_EXPERTS_INT || first->op == OP_EXPERTS_FLOAT;
    const int rows = rows_of(first, s), combines = first->op == OP_ALL_REDUCE || first->op == OP_ALL_GATHER;
    int items, each = 1, outcome = FINISHED;
    tile_items tiles = {0, 0, 0, 0};
    attention_work work = {0, 0, 0};
    collective_work pieces = {0, 0, 0, 0, 0};
    if (first->op == OP_ATTENTION) work = attention_items(first, s, parts), items = work.items;
    else if (combines) pieces = collective_items(first, s, rows), items = pieces.items;
    else if (first->op == OP_SORT_ROWS) items = 1;
    else if (experts || first->op == OP_LINEAR_INT || first->op == OP_LINEAR_FLOAT) {
      tiles = items_of(experts ? most_expert_tiles(first, rows) : rows ? linear_tiles(first) : 0, s->threads);
      for (items = 0; first_tile(&tiles, items) < tiles.tiles;) items++;
    } else {
      each = upto(rows / parts, 16);
      items = (rows + each - 1) / each;
    }
    int32_t *next = s->next + (int64_t)g * COUNTER, *done = s->done + (int64_t)g * COUNTER;
    int item = at ? at->item : NO_ITEM;
    while (!outcome) {
      if (item == NO_ITEM) item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (item >= items) break;
      if (combines) {
        outcome = collective(first, s, rows, &pieces, item, done, &w);
        if (outcome) break; // this thread still has the item
        item = NO_ITEM;
        continue;
      }
      const int begin = item * each, end = begin + each;
      if (first->op == OP_ATTENTION) attention(first, s, item, work);
      else if (first->op == OP_SORT_ROWS) sort_rows(first, s->tokens);
      else if (experts) expert_linear(first, first_tile(&tiles, item), first_tile(&tiles, item + 1), tiles.tiles);
      else if (first->op == OP_LINEAR_INT) linear_int(first, first_tile(&tiles, item), first_tile(&tiles, item + 1), rows);
      else if (first->op == OP_LINEAR_FLOAT) linear_float(first, first_tile(&tiles, item), first_tile(&tiles, item + 1), rows);
      else run_rows(first, last, s, begin, end < rows ? end : rows);
      finish(done, items);
      item = NO_ITEM;
    }
    if (!outcome) outcome = wait_for(done, items, &w);
    if (at) at->group = g, at->item = outcome ? item : NO_ITEM;
    if (outcome) return outcome;
    if (s->times) s->times[g] = ticks();
  }
  return FINISHED;
}

// Checks a step and fills its slots: see check_step. Steps that run have passed this.
EXPORT int32_t llmc_check(const step *s, int32_t vocabulary, int32_t positions, int32_t blocks, int32_t tables) {
  return check_step(s, vocabulary, positions, blocks, tables);
}
// Runs a step. Returns an outcome; it is FINISHED without other ranks.
EXPORT int32_t llmc_run(const step *s) { return run(s, 0); }
// Runs a step from `at` on. Returns PAUSED from time to time while it waits, with the place in `at`.
EXPORT int32_t llmc_resume(const step *s, position *at) { return run(s, at); }
