// Compiled once per instruction-set level; FASTPRUNE_LEVEL is its name.
#include "cpu/level.h"

#include "cpu/level/adamw.h"
#include "cpu/level/cross_entropy.h"
#include "cpu/level/gather.h"
#include "cpu/level/scan.h"
#include "cpu/level/taylor.h"

#define FASTPRUNE_TEXT(x) #x
#define FASTPRUNE_NAME(x) FASTPRUNE_TEXT(x)
#define FASTPRUNE_GLUE(a, b) a##b
#define FASTPRUNE_TABLE(x) FASTPRUNE_GLUE(level_, x)

namespace fastprune::cpu {

extern const Level FASTPRUNE_TABLE(FASTPRUNE_LEVEL);
const Level FASTPRUNE_TABLE(FASTPRUNE_LEVEL) = {
    FASTPRUNE_NAME(FASTPRUNE_LEVEL),
    kVectorBytes,
    taylor_tile,
    sum_rows,
    copy,
    gather_columns,
    settle,
    scan_chunk,
    count_outliers,
    norm_chunk,
    adamw_chunk,
    exp_sum,
    softmax_minus_onehot,
    value,
};

}  // namespace fastprune::cpu
