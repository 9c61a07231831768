// Attention over keys in host memory with bfloat16 products, for the speed of the memory.
//
// The same states as cpu::Attend (kernels/attention.h) to within rounding: q * scale and the weights
// exp(score - m) are rounded to bfloat16 before they are multiplied, as a GPU does; sums are float32.
// A query's bits depend on no thread, on no border of runs and on no other item, but on the instruction
// set and on whether its own item brings more than 16 queries of a KV head. Keys are folded by 1,024 rather
// than by a unit, for more than 16 queries by 4,096: where a row's launches are cut inside those shows in
// its bits. Any kernel goes on from the states.
#ifndef HEADROOM_KERNELS_CPU_TILE_ATTENTION_H_
#define HEADROOM_KERNELS_CPU_TILE_ATTENTION_H_

#include "kernels/attention.h"
#include "kernels/cpu/team.h"

namespace headroom::kernels::cpu {

struct TileAttention {
  const char* name;
  void (*attend)(const AttendArgs&, CpuTeam&);
};

extern const TileAttention kAmxAttention;           // HasAmx()
extern const TileAttention kPortableTileAttention;  // any processor; to test the others against

// Asks the kernel for the tiles' state, once a process.
bool HasAmx();

// The best of this processor; null: it multiplies no bfloat16.
const TileAttention* BestTileAttention();

}  // namespace headroom::kernels::cpu

#endif  // HEADROOM_KERNELS_CPU_TILE_ATTENTION_H_
