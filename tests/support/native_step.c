// Runs steps of the native engine from files and writes their logits to the standard output, as raw floats.
//
// tests/support/native_step.py writes a file: a header, then the memory of the step. Pointers are stored as their
// distance from the beginning of the file; 0 is null.
#include <stdio.h>
#include <stdlib.h>
#include "engine.c"

typedef struct {
  int64_t bytes, step_offset, instructions, logits_offset, stride, vocabulary; // offsets: bytes in the file
} header;

static char *base;
#define MOVE(p) ((p) = (void *)((p) ? base + (int64_t)(p) : 0))

static int run_file(const char *path) {
  header h;
  FILE *file = fopen(path, "rb");
  if (!file || fread(&h, sizeof h, 1, file) != 1) return 2;
  base = aligned_alloc(4096, (size_t)h.bytes);
  rewind(file);
  if (!base || fread(base, 1, (size_t)h.bytes, file) != (size_t)h.bytes) return 2;
  step *s = (step *)(base + h.step_offset);
  MOVE(s->input_ids), MOVE(s->position_ids), MOVE(s->query_start), MOVE(s->past_lengths), MOVE(s->block_indices);
  MOVE(s->block_begins), MOVE(s->logits_index), MOVE(s->code), MOVE(s->groups), MOVE(s->slot), MOVE(s->next), MOVE(s->done);
  for (int64_t k = 0; k < h.instructions; k++) {
    instruction *i = (instruction *)s->code + k;
    MOVE(i->out), MOVE(i->a), MOVE(i->b), MOVE(i->v), MOVE(i->v2), MOVE(i->w);
    MOVE(i->q), MOVE(i->scales), MOVE(i->sums), MOVE(i->order), MOVE(i->keys), MOVE(i->values);
  }
  llmc_run(s);
  for (int row = 0; row < s->logits; row++)
    fwrite((float *)(base + h.logits_offset) + row * h.stride, sizeof(float), (size_t)h.vocabulary, stdout);
  free(base);
  return fclose(file);
}

int main(int count, char **arguments) {
  int error = llmc_prepare();
  for (int k = 1; k < count && !error; k++) error = run_file(arguments[k]);
  return error || fflush(stdout);
}
