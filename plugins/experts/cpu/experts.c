// The linear layers of experts. The rows of all choices are sorted by expert: rows.c describes `order`.
//
// The matrix of an expert is a part of w, n[0] rows of whole tiles. Only experts that have rows are read.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

// Counting sort. Equal experts keep the order of their choices, so the order does not depend on threads. A number
// that is no expert counts as expert 0.
static void sort_rows(const instruction *i, int tokens) {
  const int choices = i->n[0], experts = i->n[1], rows = tokens * choices;
  int32_t *begins = i->order, *active = begins + experts + 1, *choice = active + experts + 1, *place = choice + rows;
  for (int e = 0; e <= experts; e++) begins[e] = 0;
  for (int row = 0; row < rows; row++) {
    const float id = i->a[row / choices * i->a_stride + row % choices];
    place[row] = id >= 0 && id < (float)experts ? (int32_t)id : 0;
    begins[place[row] + 1]++;
  }
  active[0] = 0;
  for (int e = 0; e < experts; e++) {
    if (begins[e + 1]) active[++active[0]] = e;
    begins[e + 1] += begins[e];
  }
  for (int row = 0; row < rows; row++) {
    const int e = place[row];
    place[row] = begins[e]++; // now the first row that is free
    choice[place[row]] = row;
  }
  for (int e = experts; e > 0; e--) begins[e] = begins[e - 1];
  begins[0] = 0;
}

// The most tiles that experts with rows can have. The number of items must follow from the shapes alone: a thread that
// comes late to a group that is finished finds other numbers in `order`.
static int most_expert_tiles(const instruction *i, int rows) {
  return (rows < i->n[7] ? rows : i->n[7]) * linear_tiles(i);
}

// Computes the part first / most .. last / most of the tiles of the experts that have rows.
static void expert_linear(const instruction *i, int first, int last, int most) {
  const int tiles = linear_tiles(i), columns = i->n[1], integers = i->op == OP_EXPERTS_INT;
  const int32_t *begins = i->order, *active = begins + i->n[7] + 2;
  const int64_t tile_bytes = integers ? integer_tile_bytes(i) : float_tile_bytes(i->n[2], columns), all = active[-1] * tiles;
  first = (int)(first * all / most), last = (int)(last * all / most);
  while (first < last) {
    const int e = active[first / tiles], tile = first % tiles, left = tile + last - first;
    const int end = left < tiles ? left : tiles, begin = begins[e], rows = begins[e + 1] - begin;
    instruction one = *i;
    one.w += e * tiles * tile_bytes, one.out += begin * one.out_stride;
    if (integers) {
      const int groups = columns / i->n[4];
      const int64_t digits = i->n[5];
      one.q += begin * digits * columns, one.scales += (int64_t)begin * groups, one.sums += begin * digits * groups;
      linear_rows(&one, tile, end, rows);
    } else {
      one.a += begin * one.a_stride;
      linear_float(&one, tile, end, rows);
    }
    first += end - tile;
  }
}
