#include "cpu/parallel.h"

namespace fastprune::cpu {
namespace {
ParallelFor borrowed = nullptr;
}

void set_parallel_for(ParallelFor function) { borrowed = function; }
ParallelFor parallel_for() { return borrowed; }

}  // namespace fastprune::cpu
