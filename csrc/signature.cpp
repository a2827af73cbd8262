// What arguments.py checks of tensors, read from the Python objects and numbered.
//
// Before a kernel is chosen, every call of a GPU backend waits for it. LibTorch's stable ABI takes a Python tensor as an
// argument of an op only, and PyTorch's dispatcher would take four times as long to hand the tensors over.

#include "signature.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace mxfp8moe {
namespace {

// As much of DLPack's C exchange API, version 1.3 (https://github.com/dmlc/dlpack), as is called here. Its ABI does not
// change within a major version.
constexpr uint32_t kMajorVersion = 1;
struct DlTensor {
  void* data;
  int32_t device_type, device_index, dim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major_version, minor_version;
  const void* older;
  void (*unused[3])();
  int (*describe)(PyObject* tensor, DlTensor* result);  // if not 0, with a Python exception; it may be null
};

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// PyTorch's; null if it has none of this version.
const DlExchange* find_exchange() {
  const Owned torch(PyImport_ImportModule("torch"));
  const Owned type(torch ? PyObject_GetAttrString(torch.get(), "Tensor") : nullptr);
  const Owned capsule(type ? PyObject_GetAttrString(type.get(), "__dlpack_c_exchange_api__") : nullptr);
  const void* const found = capsule ? PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api") : nullptr;
  PyErr_Clear();
  const auto* const exchange = static_cast<const DlExchange*>(found);
  return exchange && exchange->major_version == kMajorVersion && exchange->describe ? exchange : nullptr;
}

const DlExchange* exchange;

// A number for the dtype, or -1 and a Python exception. DLPack says the bytes that an integer takes and not the bits that
// it has, so that torch.uint4 looks like torch.uint8; PyTorch's dtypes are objects that are made once.
int64_t dtype_of(PyObject* tensor, const DlTensor& x) {
  enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kE4m3fn = 10 };
  const bool wide = x.dtype_code == kInt && x.dtype_bits >= 32;
  if (wide || x.dtype_code == kFloat || x.dtype_code == kBfloat || x.dtype_code == kE4m3fn)
    return x.dtype_code | x.dtype_bits << 8 | x.dtype_lanes << 16;
  static PyObject* const name = PyUnicode_InternFromString("dtype");
  const Owned dtype(PyObject_GetAttr(tensor, name));
  return dtype ? int64_t(reinterpret_cast<uintptr_t>(dtype.get()) | uintptr_t(1) << 62) : -1;
}

// The GIL guards what is kept.
PyObject* signature(PyObject*, PyObject* tensors) {
  constexpr size_t kMost = 1 << 16;
  static std::map<std::vector<int64_t>, int64_t> numbers;
  static int64_t next = 0;
  static std::vector<int64_t> facts;

  if (!PyTuple_Check(tensors)) {
    PyErr_SetString(PyExc_TypeError, "signature takes a tuple of tensors");
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_Size(tensors);
  facts.clear();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const tensor = PyTuple_GetItem(tensors, i);
    if (tensor == Py_None) {
      facts.push_back(-1);
      continue;
    }
    DlTensor x;
    if (exchange->describe(tensor, &x) != 0) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    const int64_t dtype = dtype_of(tensor, x);
    if (dtype < 0) return nullptr;
    const bool aligned = (reinterpret_cast<uintptr_t>(x.data) + x.byte_offset) % 16 == 0;
    facts.insert(facts.end(), {dtype, x.device_type, x.device_index, aligned, x.dim});
    facts.insert(facts.end(), x.sizes, x.sizes + x.dim);
    facts.insert(facts.end(), x.strides, x.strides + x.dim);
  }
  if (numbers.size() >= kMost) numbers.clear();  // and those that were there get new numbers
  const auto [known, added] = numbers.try_emplace(facts, next);
  next += added;
  return PyLong_FromLongLong(known->second);
}

PyMethodDef methods[] = {{"signature", signature, METH_O, "A number for what is checked of a tuple of tensors."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_signature(PyObject* module) {
  exchange = find_exchange();
  return exchange == nullptr || PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace mxfp8moe
