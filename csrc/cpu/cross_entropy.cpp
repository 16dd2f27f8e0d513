// One task per row. The logits are read from memory once; the gradient rereads its row while it is
// still in a cache.
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "cpu/level.h"
#include "cpu/parallel.h"

namespace fastprune::cpu {

void cross_entropy(const CrossEntropyParams& p) {
  check(p);
  const std::int64_t rows = p.logits.rows(), vocabulary = p.logits.cols();
  const int item = item_size(p.logits.dtype);
  const std::int64_t* targets = p.targets.as<std::int64_t>();
  for (std::int64_t r = 0; r < rows; ++r)
    require(targets[r] == kIgnored || (targets[r] >= 0 && targets[r] < vocabulary),
            "cross_entropy: the target of row ", r, " is ", targets[r],
            ", neither a word of a vocabulary of ", vocabulary, " nor ", kIgnored);

  const Level& loops = level();
  for_each_task(rows, rows * vocabulary * item, [&](std::int64_t r) {
    char* x = p.logits.as<char>() + r * p.logits.row_stride() * item;
    const ExpSum of = loops.exp_sum(p.logits.dtype, x, vocabulary);
    const double log_sum = std::log(of.sum);
    p.log_normaliser.as<float>()[r] = float(double(of.shift) + log_sum);
    if (targets[r] == kIgnored) {
      p.loss.as<float>()[r] = 0;
      if (p.scale) std::memset(x, 0, std::size_t(vocabulary * item));
      return;
    }
    const double logit = loops.value(p.logits.dtype, x, targets[r]);
    // Not from the rounded normaliser: it may be far larger than the loss.
    p.loss.as<float>()[r] = float((double(of.shift) - logit) + log_sum);
    if (p.scale)
      loops.softmax_minus_onehot(p.logits.dtype, x, vocabulary, of, *p.scale, targets[r]);
  });
}

}  // namespace fastprune::cpu
