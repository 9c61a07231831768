// What decode steps cost on a machine: measured by a worker, used by whoever plans. Pure functions of numbers.
#ifndef HEADROOM_COMMON_LANE_COSTS_H_
#define HEADROOM_COMMON_LANE_COSTS_H_

#include <array>

namespace headroom {

using LaneValues = std::array<double, 3>;

// Of steps of one row. Such a step takes base_seconds, each lane's bytes times seconds_per_byte, and
// in_place_seconds if there are bytes in place; if all bytes are resident, resident_base_seconds for the base.
// Copies hide under hidden_base of the base and under in_place_seconds; what is left of them runs beside the
// store's threads, and while both run a byte takes `slowdown` times as long. Arrays are indexed by lane:
// resident, fetched, in place.
struct LaneCosts {
  double base_seconds = 0;  // a step over next to no keys, which are fetched; 0: nothing is known
  // Of no keys outside the device: what each layer does for a tile, however small, is not done. 0: not known.
  double resident_base_seconds = 0;
  double seconds_per_byte[3] = {};
  // Of the time that the lane was busy by itself: what later measurements are compared with.
  double busy_seconds_per_byte[3] = {};
  double hidden_base = 0;  // the share of the base under which copies go unnoticed: 0 to 1
  // What keys in place cost however few they are: a pool's threads begin and end each layer together.
  double in_place_seconds = 0;
  // Of fetched and in place, at least 1. Where one memory feeds both they share it by no fixed rule: an
  // H200's copies went at 43 of 54 GB/s beside 16 threads, which kept 96 of 97. 2 and 2: in turns.
  double fetched_slowdown = 2;
  double in_place_slowdown = 2;

  bool known() const { return base_seconds > 0; }
};

// Of a machine on which everything takes `factor` times as long.
LaneCosts Slower(LaneCosts costs, double factor);

// Of a step that has `bytes` of keys and values in the lanes.
double StepSeconds(const LaneCosts& costs, const LaneValues& bytes);
// How long each lane is busy in it.
LaneValues BusySeconds(const LaneCosts& costs, const LaneValues& bytes);

}  // namespace headroom

#endif  // HEADROOM_COMMON_LANE_COSTS_H_
