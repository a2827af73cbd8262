#include "fused_moe.h"

#include "threads.h"
#include "values.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mxfp8moe::cpu {
namespace {

constexpr int64_t kScratchBytes = int64_t(160) << 20;  // per part of the tokens; 256 tokens of Qwen3-30B take 50 MiB
constexpr int64_t kSerialWork = 1 << 15;               // multiply-adds or elements below which threads cost more

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// Large blocks ask for huge pages: a part's scratch is written once, and faulting it in by 4 KiB costs more than that.
Floats allocate(int64_t count) {
  constexpr size_t kHuge = size_t(2) << 20;
  const size_t alignment = size_t(count) * sizeof(float) < 2 * kHuge ? size_t(kLine) : kHuge;
  const size_t bytes = (std::max<size_t>(size_t(count) * sizeof(float), 1) + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, bytes);
  if (p == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHuge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Floats(static_cast<float*>(p));
}

// Where the thread that calls works on a tile: about 150 KiB, kept for its next calls.
float* thread_scratch(size_t floats) {
  thread_local Floats scratch = allocate(int64_t(floats));  // the same size every time: there is one set of kernels
  return scratch.get();
}

// The local expert of a route, or -1 if it adds nothing. reference.local_experts in Python defines it.
int64_t local_expert(const FusedMoe& call, int64_t token, int64_t slot) {
  const int64_t index = token * call.topk_ids_stride + slot;
  int64_t id;
  if (call.ids_are_64_bit) {
    std::memcpy(&id, call.topk_ids + 8 * index, 8);
  } else {
    int32_t narrow;
    std::memcpy(&narrow, call.topk_ids + 4 * index, 4);
    id = narrow;
  }
  if (id < 0 || id >= call.global_experts) return -1;
  if (call.expert_map != nullptr) id = call.expert_map[id];
  return id < 0 || id >= call.experts ? -1 : id;
}

// Tokens [begin, end) as a plan: their routes grouped by expert, in the order of tokens.
void group_routes(const FusedMoe& call, int64_t begin, int64_t end, Plan& plan) {
  const int64_t topk = call.topk, routes = (end - begin) * topk;
  plan.slot_used.assign(routes, 0);
  std::vector<int64_t> expert_of(routes), position(call.experts + 1, 0);
  for (int64_t token = begin, route = 0; token < end; ++token) {
    const bool used = !call.num_tokens || token < *call.num_tokens;
    for (int64_t slot = 0; slot < topk; ++slot, ++route) {
      expert_of[route] = used ? local_expert(call, token, slot) : -1;
      if (expert_of[route] < 0) continue;
      plan.slot_used[route] = 1;
      ++position[expert_of[route] + 1];
    }
  }
  plan.groups.clear();
  for (int64_t expert = 0; expert < call.experts; ++expert) {
    const int64_t count = position[expert + 1];
    position[expert + 1] += position[expert];
    if (count > 0) plan.groups.push_back({expert, position[expert], count, nullptr, nullptr});
  }
  plan.routes.resize(position[call.experts]);
  plan.route_weights.resize(plan.routes.size());
  for (int64_t route = 0; route < routes; ++route) {
    if (expert_of[route] < 0) continue;
    const int64_t place = position[expert_of[route]]++;
    plan.routes[place] = route;
    plan.route_weights[place] =
        load_scalar(call.topk_weights, (begin + route / topk) * call.topk_weights.stride + route % topk);
  }
}

}  // namespace

void fused_moe(const FusedMoe& call) {
  const Kernels& k = kernels();
  const int64_t hidden = call.hidden, intermediate = call.intermediate, width = k.width;
  const int64_t threads = torch::stable::get_num_threads();

  Plan plan(call);

  // The tokens are served in parts whose scratch memory is bounded. Where a part ends depends on shapes alone.
  const int64_t token_bytes = call.topk * (2 * hidden + intermediate) * int64_t(sizeof(float));
  const int64_t part = std::max<int64_t>(64, kScratchBytes / token_bytes);
  for (int64_t begin = 0; begin < call.tokens; begin += part) {
    const int64_t end = std::min(begin + part, call.tokens);
    plan.first_token = begin;
    group_routes(call, begin, end, plan);

    // Routes as they are padded in the buffers: panels hold a multiple of the vector width.
    const auto padded = [&](const Group& group) {
      return group.in_rows() ? group.count : (group.count + width - 1) / width * width;
    };
    int64_t padded_routes = 0;
    for (const Group& group : plan.groups) padded_routes += padded(group);
    const Floats x = allocate(padded_routes * hidden), h = allocate(padded_routes * intermediate);
    const Floats terms = allocate((end - begin) * call.topk * hidden);
    plan.terms = terms.get();

    plan.blocks.clear();
    std::vector<TokenBlock> packs;
    int64_t before = 0;
    for (Group& group : plan.groups) {
      group.x = x.get() + before * hidden;
      group.h = h.get() + before * intermediate;
      before += padded(group);
      const int64_t chunks = (group.count + kChunkTokens - 1) / kChunkTokens;
      const int64_t chunk = ((group.count + chunks - 1) / chunks + width - 1) / width * width;
      for (int64_t first = 0; first < group.count; first += chunk)
        plan.blocks.push_back({&group, first, std::min(first + chunk, group.count)});
      for (int64_t first = 0; first < group.count; first += width)
        packs.push_back({&group, first, std::min(first + width, group.count)});
    }

    const int64_t routes = plan.routes.size(), blocks = plan.blocks.size();
    const auto threads_for = [&](int64_t work) { return work < kSerialWork ? 1 : threads; };
    for_each_item(packs.size(), threads_for(routes * hidden), [&](int64_t item) { k.pack(plan, packs[item]); });
    const auto multiply = [&](auto kernel, int64_t tiles, int64_t work) {
      for_each_item(blocks * tiles, threads_for(work), [&](int64_t item) {
        kernel(plan, plan.blocks[item / tiles], item % tiles, thread_scratch(k.scratch_floats));
      });
    };
    multiply(k.gate_up, intermediate / kBlock, routes * 2 * intermediate * hidden);
    multiply(k.down, (hidden + kTileRows - 1) / kTileRows, routes * intermediate * hidden);
    for_each_item(end - begin, threads_for(routes * hidden), [&](int64_t token) { k.reduce(plan, token); });
  }
}

}  // namespace mxfp8moe::cpu
