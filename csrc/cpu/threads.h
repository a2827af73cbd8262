// Work spread over PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mxfp8moe::cpu {

// Calls f(item) for every item below `items`, each thread taking the next one when it is free; on this thread alone if
// `threads` is 1. What an item computes must not depend on who computes it.
template <class F>
void for_each_item(int64_t items, int64_t threads, const F& f) {
  threads = std::min(threads, items);
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) f(item);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t item = next++; item < items; item = next++) f(item);
  });
}

}  // namespace mxfp8moe::cpu
