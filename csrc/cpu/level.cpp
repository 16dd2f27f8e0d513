#include "cpu/level.h"

#include "core/check.h"

#if defined(FASTPRUNE_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastprune::cpu {
namespace {

#if defined(FASTPRUNE_WITH_AMX)
// Linux gives a process the state of the tiles, 8 KiB a thread, only if it asks for it.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  constexpr long kTileData = 18;               // number of the state component
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}
#endif

std::vector<const Level*> usable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  std::vector<const Level*> found;
  if (__builtin_cpu_supports("x86-64-v2")) found.push_back(&level_v2);
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&level_v3);
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&level_v4);
#if defined(FASTPRUNE_WITH_AMX)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("amx-bf16") && tiles_permitted())
    found.push_back(&level_amx());
#endif
  require(!found.empty(), "fastprune needs a processor with at least x86-64-v2 (SSE4.2)");
  return found;
#else
  return {&level_generic};
#endif
}

const Level*& chosen() {
  static const Level* current = usable().back();
  return current;
}

}  // namespace

#if defined(__x86_64__)
const Level& level_amx() {
  static const Level amx = [] {
    Level level = level_v4;
    level.name = "amx";
    return level;
  }();
  return amx;
}
#endif

std::vector<std::string> usable_levels() {
  std::vector<std::string> names;
  for (const Level* l : usable()) names.emplace_back(l->name);
  return names;
}

const Level& level() { return *chosen(); }

void choose_level(const std::string& name) {
  std::string known;
  for (const Level* l : usable()) {
    if (name == l->name) {
      chosen() = l;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(l->name);
  }
  require(false, "CPU level '", name, "' is not usable here; choose from ", known);
}

}  // namespace fastprune::cpu
