#include "kernel_includes.h"

#define MXFP8MOE_ISA portable
#define MXFP8MOE_TABLE kPortable
#define MXFP8MOE_WIDTH 4
#include "kernels_impl.h"
