// The rows of a mixture of experts. A token has a row for each of its choices. `order` of an instruction holds, for
// E experts and R = tokens x choices rows:
//   [E + 1] the first sorted row of each expert, and R
//   [E + 1] the number of experts with rows, then these experts
//   [R]     the choice (token x choices + its number) of each sorted row
//   [R]     the sorted row of each choice
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

static void sorted_row(const instruction *i, int row, float *out) {
  const int32_t *choice = i->order + 2 * (i->n[2] + 1);
  const float *a = i->a + choice[row] / i->n[1] * i->a_stride;
  LOOP(i->n[0]) storef(out + k, loadf(a + k));
}
// The expert of a sorted row: the last one that begins at the row or before it, of those that have rows.
static int expert_of(const int32_t *begins, int experts, int row) {
  int first = 0, last = experts; // begins[first] <= row < begins[last]
  while (last - first > 1) {
    const int middle = (first + last) / 2;
    if (begins[middle] <= row) first = middle;
    else last = middle;
  }
  return first;
}
static void expert_bias(const instruction *i, int row, const float *a, float *out) {
  const float *v = i->v + (int64_t)expert_of(i->order, i->n[2], row) * i->n[0];
  LOOP(i->n[0]) storef(out + k, loadf(a + k) + loadf(v + k));
}
static void sum_choices(const instruction *i, int tokens, int row, float *out) {
  const int choices = i->n[1];
  const int32_t *place = i->order + 2 * (i->n[2] + 1) + (int64_t)tokens * choices + (int64_t)row * choices;
  const float *weights = i->b + row * i->b_stride;
  LOOP(i->n[0]) {
    vf s = allf(0);
    for (int c = 0; c < choices; c++) s = fma(loadf(i->a + place[c] * i->a_stride + k), allf(weights[c]), s);
    storef(out + k, s);
  }
}
