// The input of the engine: instructions over rows of float buffers, and the arrays of a step. library.py declares the
// same structures. Python validates every pointer and size before C uses it, and check.c the numbers of a step.
#pragma once
#include <stdint.h>

enum op {
  // Row-wise operations. Consecutive ones run row by row, without waiting for other rows.
  OP_EMBED = 0,    // out = row input_ids[row] of w, whose first row is that of another id than 0: n[3]; rows that w
                   // lacks are 0. n: width, element type, by position_ids instead, first id, rows of w
  OP_GATHER = 1,   // out (a row of logits) = row logits_index[row] of a; n: width
  OP_COPY = 2,     // out = a; n: width
  OP_UNARY = 3,    // out = f(a); n: width, function; x: its parameter
  OP_BINARY = 4,   // out = f(a, b); n: width, function, whether b is one number
  OP_VECTOR = 5,   // out = f(a, v), v a vector of weights; n: width, function
  OP_SCALAR = 6,   // out = f(a, x); n: width, function
  OP_RMSNORM = 7,  // out = a / rms(a) * v, in groups; n: groups, width of a group; x: epsilon
  OP_LAYERNORM = 8, // out = (a - mean) / std * v + v2, in groups; n: width of a group, has v2, groups, weights
                    // from one group to the next; x: epsilon
  OP_ROPE = 9,     // out = a rotated; v, v2: cos and sin tables; n: heads, head width, rotated width, interleaved
  OP_WRITE_KV = 10, // a: keys, b: values, into the cache; n: kv heads, key width, value width, cache
  OP_GLU = 11,     // out = f(a) x b; n: width, function
  OP_ROUND = 12,   // out = a rounded to a format times the scale v[0]; n: width, format
  OP_SLICE = 13,   // out = columns of every group of a; n: groups, width of a group of a, first column, width
  OP_SOFTMAX = 14, // out = exp(a) / its sum; n: width
  OP_SUM = 15,     // out = the sum of a, one number; n: width
  OP_TOP_K = 16,   // out = the largest k of a in falling order, then their columns; n: width, k
  OP_SORTED_ROWS = 17, // out (a row of a choice, sorted by expert) = the token's row of a; n: width, choices, experts
  OP_SUM_CHOICES = 18, // out = the sum of the token's rows of a, times b; n: width, choices, experts
  OP_EXPERT_BIAS = 19, // out (a row of a choice) = a + the row of v of its expert; n: width, choices, experts
  OP_CLAMPED_SWIGLU = 20, // out = (clamp(u, -limit, limit) + 1) g sigmoid(alpha g), g = min(gate, limit), for pairs
                       // (gate, u) of a; n: pairs; x: limit, alpha
  OP_JOIN = 21, // out = of each group, columns of a, then of b; n: groups, width of a group of a, of b
  OP_GROUPED_TOP_K = 22, // out = k columns of a, then their places, by the numbers of b in the best groups; n: width,
                       // groups, groups that are chosen from, numbers that make up the score of one, k
  OP_QUANTIZE = 23, // q, scales, sums = a in int8 digits; n: width, group, digits; v: null or their scale
  // Operations on many rows at once.
  OP_LINEAR_INT = 24,   // out = q x w; n: rows of w, columns, codes, block, group, digits, fp16 scales
  OP_LINEAR_FLOAT = 25, // out = a x w; n: rows of w, columns, element type, groups of columns of a, one for each part of w
  OP_EXPERTS_INT = 26,   // as OP_LINEAR_INT with w of the row's expert, whose rows of w n has; n[7]: experts
  OP_EXPERTS_FLOAT = 27, // as OP_LINEAR_FLOAT, likewise
  OP_SORT_ROWS = 28,    // order = the choices of all tokens, a, sorted by expert; n: choices, experts
  OP_ATTENTION = 29,    // out = attention of a (queries); v: null or the sinks; n: heads, kv heads, key width, value
                        // width, window, digits of queries (of a cache of 8 bits), cache, chunk; x: scale, softcap
  // Operations of all ranks of a machine together.
  OP_ALL_REDUCE = 30, // out = the sum of a of all ranks; n: width
  OP_ALL_GATHER = 31, // out = the columns of a of all ranks; n: width of a
};
enum kind { F32 = 0, F16 = 1, BF16 = 2, E4M3 = 3 }; // element types
enum codes { I8 = 0, I4 = 1, E2M1 = 2 };          // element types with integer products
enum cache { FP32_CACHE = 0, FP16_CACHE = 1, INT8_CACHE = 2 };

typedef struct {
  int32_t op, per_logit; // per_logit: the rows are those of logits_index, not those of the tokens
  int32_t choices;       // 0, or the number of experts of a token: the rows are those of all choices, sorted by expert
  float *out;
  const float *a, *b, *v, *v2;
  const uint8_t *w;
  int64_t out_stride, a_stride, b_stride; // floats from one row to the next
  int8_t *q;                              // [rows][digits][width], or in tiles: see tiled
  float *scales;                          // [rows][width / group]
  int32_t *sums;                          // [rows][digits][width / group]
  int32_t *order;                         // of choices: see plugins/experts/cpu/experts.c
  uint8_t *keys, *values;                 // the cache of a layer; a block has
                                          //   floats: [kv heads][key width][32], [kv heads][32][value width, padded]
                                          //   8 bits, code + 128, and fp32 scales:
                                          //     [kv heads][key width / 4][32][4], [kv heads][32];
                                          //     [kv heads][32 / 4][value width, padded][4], [kv heads][32]
                                          //   latent keys, floats, at both addresses: [kv heads][32][key width];
                                          //     OP_WRITE_KV has them as values, and keys of no numbers
  int64_t block_stride;                   // bytes from one block to the next
  int32_t n[8];
  float x[2];
} instruction;

// Instructions first .. last - 1 run together: row-wise instructions, or a single other instruction.
typedef struct {
  int32_t first, last;
} group;

// A collective that a rank calls.
typedef struct {
  uint32_t operation, number; // its place among the collectives of the step, from 1
  uint64_t step;
  uint32_t rows, width; // of a
} call;

// What a rank shows to the others, in memory that all share, in cache lines of its own.
typedef struct {
  uint32_t sent;     // the number of its last message
  int32_t sleepers;  // the number of ranks that may sleep until `sent` changes
  call calls[2];     // of its last message with an even number, and of that with an odd one
  uint8_t room[72];
} post;

// The other ranks of this machine, and this rank among them.
typedef struct {
  int32_t rank, ranks;
  post *posts;       // [ranks]
  float *slots;      // [2][ranks][capacity]: for messages with even and with odd numbers
  int64_t capacity;  // numbers in a slot
  int64_t slice[2];  // seconds and nanoseconds after which a thread that sleeps looks around
  uint64_t step;     // of the calls
  uint32_t number;   // of the last call in this step
  int32_t turns;     // of a loop before a thread sleeps that waits for another rank
  int32_t stop;      // an outcome: threads that wait leave the step with it; otherwise 0
} exchange;

// What a step ends with. PAUSED: `llmc_resume` goes on. STOPPED: by Python. DISAGREED: the ranks call different collectives.
enum outcome { FINISHED = 0, PAUSED = 1, STOPPED = 2, DISAGREED = 3 };

// Where the thread is that starts a step: in a group, with an item that is not finished or NO_ITEM.
typedef struct {
  int32_t group, item;
} position;
enum { NO_ITEM = -1 };

typedef struct {
  int32_t tokens, sequences, logits, threads, num_groups;
  const int32_t *input_ids, *position_ids, *query_start, *past_lengths, *block_indices, *block_begins, *logits_index;
  const instruction *code;
  const group *groups;
  int32_t *slot;  // [tokens] the slot of each token in the cache: block * 32 + position in the block
  int32_t *next;  // [groups * 16] the next item of each group; counters are a cache line apart and 0 before a step
  int32_t *done;  // [groups * 16] the number of finished items of each group
  int32_t *merged; // [threads * 16] finished items of each head whose context is split; 0 between instructions
  float *parts;    // [part_floats] results of parts of the context
  int64_t part_floats;
  int64_t *times; // [groups] null, or where the first thread writes the clock after each group
  exchange *exchange; // null if the step has no operations of all ranks
} step;

// With AMX, the digits of several rows are in tiles: [width / group][rows / 16][digits][group / step][16 rows][step].
// Scales are [width / group][rows], and sums are left out. Rows are rounded up to a multiple of 16.
enum { DIGIT_ROWS = 16, TILED_FROM = 3 }; // fewer rows are faster without AMX
// The rounded number of rows; 0 if the digits are not in tiles.
static inline int tiled(int rows) {
#if defined(__AMX_INT8__)
  return rows >= TILED_FROM ? (rows + DIGIT_ROWS - 1) / DIGIT_ROWS * DIGIT_ROWS : 0;
#else
  return (void)rows, 0;
#endif
}
// Numbers of a group that a tile holds: a multiple of 16, up to 64, that divides the group.
static inline int digit_step(int group) {
  int step = 64;
  while (group % step) step -= 16;
  return step;
}
