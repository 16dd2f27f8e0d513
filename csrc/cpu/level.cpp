#include "cpu/level.h"

#include "core/check.h"

namespace fastprune::cpu {
namespace {

std::vector<const Level*> usable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  std::vector<const Level*> found;
  if (__builtin_cpu_supports("x86-64-v2")) found.push_back(&level_v2);
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&level_v3);
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&level_v4);
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
