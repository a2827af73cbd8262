#include "kernel_includes.h"

#if defined(__x86_64__)
#define MXFP8MOE_ISA avx512
#define MXFP8MOE_TABLE kAvx512
#define MXFP8MOE_WIDTH 16
// The target is set in here, after the standard headers: no inline function of theirs may be compiled for it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
