// Collectives of the ranks of one machine, through memory that their processes share.
//
// An array is exchanged in pieces that fit a slot. For each piece, the threads of a rank copy its numbers to the
// rank's slot, one of them sends a message, one waits for the messages of all ranks, and the threads read all
// slots. A message is a number that counts up, beside a description of the collective. A rank has two slots, which
// it uses in turn. It writes to a slot again two messages later. The others have read it by then: they send their
// next message after that.
//
// The order of memory accesses: a rank writes its slot before it counts its message up, and other ranks read the
// slot after they saw that number. Between threads of a rank, the counter of finished items does the same.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"
#include "../../cpu/wait.c"

enum { CHUNK = 4096 }; // numbers of an item

typedef struct {
  int rows, columns; // of a piece
  int across;        // pieces beside each other
  int chunks;        // items that write the slot of a piece, and items that read its slots
  int items;         // of all pieces
} collective_work;

static collective_work collective_items(const instruction *i, const step *s, int rows) {
  const int64_t capacity = s->exchange->capacity, width = i->n[0] > 0 ? i->n[0] : 1;
  const int64_t columns = width < capacity ? width : capacity, across = (width + columns - 1) / columns;
  int64_t high = capacity / columns;
  if (high > rows) high = rows > 0 ? rows : 1;
  const int64_t chunks = (high * columns + CHUNK - 1) / CHUNK, down = rows > 0 ? (rows + high - 1) / high : 1;
  return (collective_work){(int)high, (int)columns, (int)across, (int)chunks, (int)(down * across * (2 * chunks + 2))};
}

static float *slot_of(const exchange *x, uint32_t message, int rank) {
  return x->slots + ((message & 1) * (int64_t)x->ranks + rank) * x->capacity;
}

INLINE void copy_floats(float *to, const float *from, int64_t n) {
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) storef(to + k, loadf(from + k));
  for (; k < n; k++) to[k] = from[k];
}
// out = the sum of the numbers of all ranks from `first` on, in the order of the ranks
INLINE void add_floats(float *out, const exchange *x, uint32_t message, int64_t first, int64_t n) {
  const float *from = slot_of(x, message, 0) + first;
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    vf total = loadf(from + k);
    for (int rank = 1; rank < x->ranks; rank++) total += loadf(from + rank * x->capacity + k);
    storef(out + k, total);
  }
  for (; k < n; k++) {
    float total = from[k];
    for (int rank = 1; rank < x->ranks; rank++) total += from[rank * x->capacity + k];
    out[k] = total;
  }
}

// Copies a chunk of a piece to this rank's slot, or from all slots.
static void exchange_chunk(const instruction *i, const exchange *x, int rows, const collective_work *w, int piece, int chunk, int reads) {
  const int row = piece / w->across * w->rows, column = piece % w->across * w->columns;
  const int high = rows - row < w->rows ? rows - row : w->rows;
  const int wide = i->n[0] - column < w->columns ? i->n[0] - column : w->columns;
  const int64_t all = (int64_t)high * wide, first = (int64_t)chunk * CHUNK, last = first + CHUNK < all ? first + CHUNK : all;
  const uint32_t message = x->posts[x->rank].sent + !reads;
  for (int64_t k = first, n; k < last; k += n) {
    const int64_t r = row + k / wide, c = column + k % wide;
    n = last - k < wide - k % wide ? last - k : wide - k % wide;
    if (!reads) copy_floats(slot_of(x, message, x->rank) + k, i->a + r * i->a_stride + c, n);
    else if (i->op == OP_ALL_REDUCE) add_floats(i->out + r * i->out_stride + c, x, message, k, n);
    else
      for (int rank = 0; rank < x->ranks; rank++)
        copy_floats(i->out + r * i->out_stride + rank * (int64_t)i->n[0] + c, slot_of(x, message, rank) + k, n);
  }
}

// Tells the other ranks that this rank's slot has the next piece.
static void send_message(const instruction *i, exchange *x, int rows, int piece) {
  post *mine = x->posts + x->rank;
  const uint32_t message = mine->sent + 1;
  if (!piece) x->number++;
  mine->calls[message & 1] = (call){(uint32_t)i->op, x->number, x->step, (uint32_t)rows, (uint32_t)i->n[0]};
  __atomic_store_n(&mine->sent, message, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&mine->sleepers, __ATOMIC_SEQ_CST)) futex(&mine->sent, WAKE_SHARED, EVERYBODY, 0);
}

// Waits for a message of another rank. Returns an outcome.
static int wait_for_message(post *p, uint32_t message, const waiter *w) {
#define IS_BEHIND(sent) ((int32_t)((sent) - message) < 0) // the numbers may wrap
  for (int turns = w->x->turns; turns > 0; turns--) {
    if (!IS_BEHIND(__atomic_load_n(&p->sent, __ATOMIC_ACQUIRE))) return FINISHED;
    rest();
  }
  int outcome = FINISHED;
  __atomic_add_fetch(&p->sleepers, 1, __ATOMIC_SEQ_CST);
  for (uint32_t seen; !outcome && IS_BEHIND(seen = __atomic_load_n(&p->sent, __ATOMIC_SEQ_CST));)
    outcome = go_on(w, futex(&p->sent, SLEEP_SHARED, (long)seen, w->x->slice));
  __atomic_sub_fetch(&p->sleepers, 1, __ATOMIC_SEQ_CST);
  return outcome;
}

static int same_call(const call *a, const call *b) {
  return a->operation == b->operation && a->number == b->number && a->step == b->step && a->rows == b->rows && a->width == b->width;
}
// Waits until all ranks have sent the message that this rank has sent. Returns an outcome.
static int receive_messages(exchange *x, const waiter *w) {
  const post *mine = x->posts + x->rank;
  const uint32_t message = mine->sent;
  for (int rank = 0; rank < x->ranks; rank++) {
    post *other = x->posts + rank;
    const int outcome = rank == x->rank ? FINISHED : wait_for_message(other, message, w);
    if (outcome) return outcome;
    if (!same_call(&mine->calls[message & 1], &other->calls[message & 1])) {
      __atomic_store_n(&x->stop, DISAGREED, __ATOMIC_RELEASE);
      return DISAGREED;
    }
  }
  return FINISHED;
}

// Runs an item, after those that must be finished before it. Returns an outcome; the item is still to run unless
// it is FINISHED.
static int collective(const instruction *i, const step *s, int rows, const collective_work *work, int item, int32_t *done, waiter *w) {
  exchange *x = s->exchange;
  // The items of a piece: chunks that write, the sender, the receiver, chunks that read.
  const int each = 2 * work->chunks + 2, piece = item / each, k = item % each, sender = work->chunks;
  const int before = k < sender ? 0 : k <= sender + 1 ? k : sender + 2; // items of the piece that come before
  const int after = k < sender ? sender : k <= sender + 1 ? k + 1 : each;
  int outcome = wait_for(done, piece * each + before, w);
  if (!outcome && k == sender + 1) outcome = receive_messages(x, w);
  if (outcome) return outcome;
  if (k == sender) send_message(i, x, rows, piece);
  else if (k < sender) exchange_chunk(i, x, rows, work, piece, k, 0);
  else if (k > sender + 1) exchange_chunk(i, x, rows, work, piece, k - sender - 2, 1);
  finish(done, piece * each + after);
  return FINISHED;
}
