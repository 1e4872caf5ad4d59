// Checks the arrays of a step before anything reads memory with their numbers.
#include "program.h"

// What is wrong with a step. library.py has the same numbers.
enum fault { NO_FAULT = 0, TOKEN_IDS = 1, POSITIONS = 2, BLOCKS = 3, LOGIT_ROWS = 4, CONTRADICTION = 5 };

static int outside(const int32_t *p, int32_t count, int32_t limit) {
  int found = 0;
  for (int32_t k = 0; k < count; k++) found |= p[k] < 0 || p[k] >= limit;
  return found;
}
// Whether p[0..count] does not rise from 0 to end.
static int unordered(const int32_t *p, int32_t count, int32_t end) {
  int found = p[0] != 0 || p[count] != end;
  for (int32_t k = 0; k < count; k++) found |= p[k + 1] < p[k];
  return found;
}

// Returns a fault, or fills s->slot. The arrays have the lengths of s->tokens, s->sequences and s->logits, and
// block_indices that of `tables`. Token ids, positions and blocks are less than the limits.
static int check_step(const step *s, int32_t vocabulary, int32_t positions, int32_t blocks, int32_t tables) {
  if (outside(s->input_ids, s->tokens, vocabulary)) return TOKEN_IDS;
  if (outside(s->position_ids, s->tokens, positions)) return POSITIONS;
  if (outside(s->block_indices, tables, blocks)) return BLOCKS;
  if (outside(s->logits_index, s->logits, s->tokens)) return LOGIT_ROWS;
  if (unordered(s->query_start, s->sequences, s->tokens) || unordered(s->block_begins, s->sequences, tables)) return CONTRADICTION;
  for (int32_t q = 0; q < s->sequences; q++) {
    const int32_t first = s->query_start[q], count = s->query_start[q + 1] - first;
    const int64_t past = s->past_lengths[q], room = (int64_t)(s->block_begins[q + 1] - s->block_begins[q]) * BLOCK;
    if (past < 0 || (count && past + count > room)) return CONTRADICTION;
    const int32_t *table = s->block_indices + s->block_begins[q];
    for (int32_t t = 0; t < count; t++) {
      const int64_t position = past + t;
      if (s->position_ids[first + t] != position) return CONTRADICTION;
      s->slot[first + t] = table[position / BLOCK] * BLOCK + (int32_t)(position % BLOCK);
    }
  }
  return NO_FAULT;
}
