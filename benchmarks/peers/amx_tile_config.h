// Included before every C++ file of llama.cpp by setup_peers.sh.
//
// GCC before 12.4 and 13.3 tells its optimizer that _tile_loadconfig reads 8 of the 64 bytes. It drops the stores
// to the others, and llama.cpp ends with SIGSEGV on CPUs with AMX (https://gcc.gnu.org/PR114098).
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

static inline void llmc_tile_loadconfig(const void *config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])config));
}
#define _tile_loadconfig llmc_tile_loadconfig
#endif
