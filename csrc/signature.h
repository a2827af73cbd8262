// Python's _C.signature (see _C.pyi).
#pragma once

#include <Python.h>

namespace mxfp8moe {

// Adds it to `module` if this PyTorch has what it reads tensors with. False, with a Python exception, if that fails.
bool add_signature(PyObject* module);

}  // namespace mxfp8moe
