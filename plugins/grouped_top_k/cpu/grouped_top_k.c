// The choice of a router with groups of experts.
#include "../../cpu/program.h"

enum { MAX_GROUPS = 256, MAX_SCORED = 16 };

// n: width, groups, groups that are kept, numbers that make up a group's score, k. Of equals, the first one wins.
static void grouped_top_k(const int32_t *n, const float *a, const float *choice, float *out) {
  const int groups = n[1], size = n[0] / groups, scored = n[3], k = n[4];
  float scores[MAX_GROUPS];
  uint8_t kept[MAX_GROUPS];
  for (int g = 0; g < groups; g++) {
    float best[2 * MAX_SCORED];
    for (int c = 0; c < 2 * scored; c++) best[c] = 0;
    top_k(size, scored, choice + g * size, best);
    scores[g] = best[0], kept[g] = 0;
    for (int c = 1; c < scored; c++) scores[g] += best[c];
  }
  for (int c = 0; c < n[2]; c++) {
    int best = -1;
    for (int g = 0; g < groups; g++)
      if (!kept[g] && (best < 0 || scores[g] > scores[best])) best = g;
    kept[best] = 1;
  }
  for (int column = 0, found = 0; column < n[0]; column++) {
    if (!kept[column / size]) continue;
    const float x = choice[column];
    if (found == k && !(x > out[k - 1])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x > out[at - 1]; at--) out[at] = out[at - 1], out[k + at] = out[k + at - 1];
    out[at] = x, out[k + at] = (float)column;
  }
  for (int c = 0; c < k; c++) out[c] = a[(int)out[k + c]];
}
