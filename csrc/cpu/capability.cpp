#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mxfp8moe::cpu {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C, which clang 14 cannot be asked about.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const auto found = supported();
    const char* wanted = std::getenv("MXFP8MOE_CPU_CAPABILITY");
    if (wanted == nullptr || *wanted == '\0') return *found.front();
    std::string names;
    for (const Kernels* candidate : found) {
      if (std::string(wanted) == candidate->name) return *candidate;
      names += std::string(names.empty() ? "" : ", ") + candidate->name;
    }
    throw std::runtime_error(
        "MXFP8MOE_CPU_CAPABILITY is '" + std::string(wanted) + "'; it takes what this processor runs: " + names);
  }();
  return chosen;
}

}  // namespace mxfp8moe::cpu
