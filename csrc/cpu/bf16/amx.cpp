// Products of blocks by the tile unit: tdpbf16ps multiplies a tile of 16 rows of a by one of 16
// columns of b. Up to 32 rows by 32 columns of sums stay in four tiles, two of a and two of b meet
// them.
#include <immintrin.h>

#include "cpu/bf16/products.h"

namespace fastprune::cpu {
namespace {

constexpr std::int64_t kSide = 16;  // rows and columns of a tile of sums

// What ldtilecfg reads: bytes of a row and rows of each tile.
struct alignas(64) TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the processor's layout");

// Tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 columns of b, `pairs` at a time.
constexpr TileConfig tile_config(std::uint8_t pairs) {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = tile < 6 ? kSide : pairs;
    config.row_bytes[tile] = std::uint16_t(4 * (tile == 4 || tile == 5 ? pairs : kSide));
  }
  return config;
}

template <std::uint8_t kPairs>
void configure() {
  static constexpr TileConfig kConfig = tile_config(kPairs);
  _tile_loadconfig(&kConfig);
}

void release() { _tile_release(); }

// The compiler takes tile loads for instructions that read no memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// 16 rows of c, or 32 where kDown, by 16 columns, or 32 where kAcross.
template <std::int64_t kPairs, bool kDown, bool kAcross>
void multiply_tiles(const bf16* a, std::int64_t a_stride, const Pair* b, std::int64_t columns,
                    std::int64_t pairs, float* c, bool add) {
  const std::int64_t a_bytes = a_stride * 2, bytes = columns * 4;  // from row to row
  float* const below = c + kSide * columns;
  if (add) {
    _tile_loadd(0, c, bytes);
    if (kAcross) _tile_loadd(1, c + kSide, bytes);
    if (kDown) _tile_loadd(2, below, bytes);
    if (kDown && kAcross) _tile_loadd(3, below + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t p = 0; p < pairs; p += kPairs) {
    _tile_loadd(4, a + 2 * p, a_bytes);
    _tile_loadd(6, b + p * columns, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kAcross) {
      _tile_loadd(7, b + p * columns + kSide, bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kDown) {
      _tile_loadd(5, a + kSide * a_stride + 2 * p, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (kDown && kAcross) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  if (kAcross) _tile_stored(1, c + kSide, bytes);
  if (kDown) _tile_stored(2, below, bytes);
  if (kDown && kAcross) _tile_stored(3, below + kSide, bytes);
}

template <std::int64_t kPairs>
void multiply(const bf16* a, std::int64_t a_stride, std::int64_t rows, const Pair* b,
              std::int64_t columns, std::int64_t pairs, float* c, bool add) {
  constexpr decltype(&multiply_tiles<kPairs, true, true>) kTiles[2][2] = {
      {multiply_tiles<kPairs, false, false>, multiply_tiles<kPairs, false, true>},
      {multiply_tiles<kPairs, true, false>, multiply_tiles<kPairs, true, true>}};
  finish_stores();
  for (std::int64_t r = 0; r < rows; r += 2 * kSide)
    for (std::int64_t l = 0; l < columns; l += 2 * kSide)
      kTiles[rows - r > kSide][columns - l > kSide](a + r * a_stride, a_stride, b + l, columns,
                                                    pairs, c + r * columns + l, add);
}

}  // namespace

const BlockProducts amx_products = {configure<8>, release, multiply<8>};
const BlockProducts amx_wide_products = {configure<16>, release, multiply<16>};

}  // namespace fastprune::cpu
