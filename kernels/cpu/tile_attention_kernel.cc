// Attention in tiles (tiles.h): pieces of keys for all queries of a KV head, of up to 16 in rows of tiles
// (tile_rows.h), of more in passes (tile_passes.h). All along both ask for the lines that come next, as many
// as they read (of more than 128 queries the first 128; the others find the keys in the second cache): their
// speed is the memory's. Nowhere do they go on for long without asking: memory has nothing to do when the few
// lines have come that a core can wait for, some 200 ns of them. (With most of them asked for beside K's
// products, none beside softmax, 32 queries took 8% longer.)
#include "kernels/cpu/tile_attention.h"

#include "kernels/cpu/tile_passes.h"
#include "kernels/cpu/tile_rows.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// Those of the items that have keys and more than 16 queries of a KV head, or those that have not.
template <typename Units>
void AttendItems(const Launch& launch, CpuTeam& team, bool many) {
  UnitPass<Units> pass(launch, team);
  for (int32_t i = 0; i < launch.a.items.count; ++i) {
    const AttendItem& item = launch.a.items.device[i];
    if ((launch.queries(item) > kTile) != many || !launch.has_keys(item)) continue;
    for (int32_t head = item.kv_head_begin; head < item.kv_head_end; ++head) pass.Add(item, head);
  }
  pass.Run();
}

void AttendTiles(const AttendArgs& args, CpuTeam& team) {
  const Launch launch{args, args.num_q_heads / args.num_kv_heads};
  for (int32_t i = 0; i < args.items.count; ++i) {
    const AttendItem& item = args.items.device[i];
    if (launch.has_keys(item)) continue;
    for (int32_t head = item.kv_head_begin; head < item.kv_head_end; ++head) {
      ResetOrFinish(launch, item, head);
    }
  }
  AttendItems<RowUnits>(launch, team, false);
  AttendItems<PassUnits>(launch, team, true);
}

}  // namespace
}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

namespace headroom::kernels::cpu {

#if defined(__AMX_BF16__)
const TileAttention kAmxAttention = {"amx", &amx::AttendTiles};
#else
const TileAttention kPortableTileAttention = {"portable", &portable::AttendTiles};
#endif

}  // namespace headroom::kernels::cpu
