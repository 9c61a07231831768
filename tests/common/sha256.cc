#include "tests/common/sha256.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace headroom {
namespace {

constexpr int kBlockBytes = 64;

constexpr std::array<uint32_t, 64> kRoundConstants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

using State = std::array<uint32_t, 8>;

void Compress(const unsigned char* block, State& state) {
  std::array<uint32_t, 64> w;
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 |
           uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
    const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRoundConstants[i] + w[i];
    const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const State added = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += added[i];
}

// Pads the last `bytes` (below one block) of a message of `total_bytes`.
void Finish(const unsigned char* rest, int bytes, uint64_t total_bytes, State& state) {
  std::array<unsigned char, 2 * kBlockBytes> tail{};
  std::memcpy(tail.data(), rest, bytes);
  tail[bytes] = 0x80;
  const int tail_bytes = bytes < kBlockBytes - 8 ? kBlockBytes : 2 * kBlockBytes;
  for (int i = 0; i < 8; ++i) {
    tail[tail_bytes - 1 - i] = static_cast<unsigned char>(total_bytes * 8 >> (8 * i));
  }
  for (int i = 0; i < tail_bytes; i += kBlockBytes) Compress(tail.data() + i, state);
}

std::string Hex(const State& state) {
  std::string hex;
  for (const uint32_t word : state) absl::StrAppendFormat(&hex, "%08x", word);
  return hex;
}

constexpr State kInitialState = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

}  // namespace

std::string Sha256Of(std::string_view bytes) {
  State state = kInitialState;
  const auto* const data = reinterpret_cast<const unsigned char*>(bytes.data());
  size_t done = 0;
  for (; done + kBlockBytes <= bytes.size(); done += kBlockBytes) Compress(data + done, state);
  Finish(data + done, static_cast<int>(bytes.size() - done), bytes.size(), state);
  return Hex(state);
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path));
  State state = kInitialState;
  std::vector<unsigned char> buffer(1024 * kBlockBytes);
  uint64_t total_bytes = 0;
  for (;;) {
    file.read(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(buffer.size()));
    if (file.bad()) return absl::InternalError(absl::StrCat("cannot read ", path));
    const int64_t bytes = file.gcount();
    total_bytes += bytes;
    int64_t done = 0;
    for (; done + kBlockBytes <= bytes; done += kBlockBytes) Compress(&buffer[done], state);
    if (bytes < static_cast<int64_t>(buffer.size())) {
      Finish(buffer.data() + done, static_cast<int>(bytes - done), total_bytes, state);
      break;
    }
  }
  return Hex(state);
}

}  // namespace headroom
