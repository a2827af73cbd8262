// The CPU kernels behind torch.ops.mxfp8moe, on LibTorch's stable ABI.
//
// Schemas, fake kernels and error messages live in Python. A kernel here decides in nanoseconds whether it takes a call
// as it is. If not, it hands the arguments to the op _refused_<name>, whose Python kernel either finds what is wrong with
// them and returns the text of the error, or lets another backend serve the call.

#include "cpu/fused_moe.h"
#include "cpu/threads.h"
#include "cpu/values.h"
#include "signature.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace mxfp8moe::cpu;

template <class T>
StableIValue box(const T& value) {
  return torch::stable::detail::from(value);
}
template <class T>
T unbox(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("mxfp8moe: a call into PyTorch failed");
}

// PyTorch's own numbers of the dtypes, asked once.
struct Dtypes {
  const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16(),
                f64 = aoti_torch_dtype_float64(), e4m3 = aoti_torch_dtype_float8_e4m3fn(),
                e8m0 = torch_dtype_float8_e8m0fnu(), u8 = aoti_torch_dtype_uint8(), i32 = aoti_torch_dtype_int32(),
                i64 = aoti_torch_dtype_int64();
};
const Dtypes& dtypes() {
  static const Dtypes known;
  return known;
}

// What a kernel reads of a tensor.
struct View {
  AtenTensorHandle handle = nullptr;
  int32_t dtype = -1;
  int64_t dim = 0, numel = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  char* data = nullptr;

  View() = default;
  // None has no shape and no dtype that a kernel takes.
  explicit View(const Tensor& tensor) : View(tensor.defined() ? tensor.get() : nullptr) {}
  explicit View(AtenTensorHandle tensor) : handle(tensor) {
    if (handle == nullptr) return;
    int64_t *sizes_, *strides_;
    void* data_;
    check(aoti_torch_get_dtype(handle, &dtype));
    check(aoti_torch_get_dim(handle, &dim));
    check(aoti_torch_get_numel(handle, &numel));
    check(aoti_torch_get_sizes(handle, &sizes_));
    check(aoti_torch_get_strides(handle, &strides_));
    check(aoti_torch_get_data_ptr(handle, &data_));
    sizes = sizes_;
    strides = strides_;
    data = static_cast<char*>(data_);
  }
  explicit View(const std::optional<Tensor>& tensor) : View(tensor ? View(*tensor) : View()) {}

  explicit operator bool() const { return handle != nullptr; }
  bool is(std::initializer_list<int64_t> shape) const {
    return dim == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), sizes);
  }
  bool has_dtype(std::initializer_list<int32_t> options) const {
    return std::find(options.begin(), options.end(), dtype) != options.end();
  }
  bool rows() const { return dim >= 1 && (sizes[dim - 1] == 1 || strides[dim - 1] == 1); }
  bool contiguous() const {
    bool result;
    check(aoti_torch_is_contiguous(handle, &result));
    return result;
  }
  int64_t columns() const { return sizes[dim - 1]; }
  int64_t item_size() const {
    return dtype == dtypes().f64 || dtype == dtypes().i64 ? 8
        : dtype == dtypes().f32 || dtype == dtypes().i32  ? 4
        : dtype == dtypes().bf16 || dtype == dtypes().f16 ? 2
                                                          : 1;
  }
  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(data); }
};

bool high_precision(const View& v) { return v.has_dtype({dtypes().bf16, dtypes().f16, dtypes().f32}); }
bool weight_like(const View& v) {
  return v.has_dtype({dtypes().f32, dtypes().bf16, dtypes().f16, dtypes().f64});
}
bool scale_like(const View& v) { return v.has_dtype({dtypes().u8, dtypes().e8m0}); }

Kind kind_of(int32_t dtype) {
  const Dtypes& d = dtypes();
  return dtype == d.f32 ? Kind::f32 : dtype == d.bf16 ? Kind::bf16 : dtype == d.f16 ? Kind::f16 : dtype == d.f64 ? Kind::f64 : Kind::e4m3;
}
Rows rows_of(const View& v) { return {v.data, v && v.dim >= 2 ? v.strides[v.dim - 2] : 0, v ? kind_of(v.dtype) : Kind::f32}; }

// Whether a forward_ad.dual_level() is open: then any tensor may carry a tangent. Python's module is the one that knows.
bool in_dual_level() {
  if (!Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  static PyObject* const module = PyImport_ImportModule("torch.autograd.forward_ad");
  PyObject* level = module ? PyObject_GetAttrString(module, "_current_level") : nullptr;
  const bool open = level && PyLong_AsLong(level) >= 0;
  Py_XDECREF(level);
  PyErr_Clear();
  PyGILState_Release(state);
  return open;
}

// Whether grad mode is on and a tensor needs it. The stable ABI does not say whether a tensor requires a gradient, but of
// one that does, an alias is not a leaf. With grad mode off this costs one thread-local read.
bool needs_gradient(std::initializer_list<const View*> views) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  if (in_dual_level()) return true;
  for (const View* view : views) {
    if (!*view || view->has_dtype({dtypes().u8, dtypes().i32, dtypes().i64})) continue;
    AtenTensorHandle copy;
    check(aoti_torch_new_tensor_handle(view->handle, &copy));
    StableIValue stack[1] = {box(copy)};
    check(torch_call_dispatcher("aten::alias", "", stack, TORCH_ABI_VERSION));
    check(torch_call_dispatcher("aten::is_leaf", "", stack, TORCH_ABI_VERSION));
    if (!unbox<bool>(stack[0])) return true;
  }
  return false;
}

// Counts a write to each tensor, as PyTorch's own in-place ops do, so that a backward pass that saved what was there before
// raises. The stable ABI has no name for it; an in-place op that swaps a dimension with itself does nothing else. Tensors
// made in inference mode have no counter.
void written(std::initializer_list<const View*> outputs) {
  for (const View* out : outputs) {
    AtenTensorHandle copy;
    check(aoti_torch_new_tensor_handle(out->handle, &copy));
    StableIValue asked[1] = {box(copy)};
    check(torch_call_dispatcher("aten::is_inference", "", asked, TORCH_ABI_VERSION));
    if (unbox<bool>(asked[0]) || out->dim == 0) continue;
    check(aoti_torch_new_tensor_handle(out->handle, &copy));
    StableIValue stack[3] = {box(copy), box(int64_t(0)), box(int64_t(0))};
    check(torch_call_dispatcher("aten::transpose_", "", stack, TORCH_ABI_VERSION));
    unbox<Tensor>(stack[0]);  // release it
  }
}

// Whether two tensors may share a byte: exact for column slices of one buffer, else by their extents. The same answer
// as arguments.overlap in Python.
bool overlap(const View& a, const View& b) {
  if (a.numel == 0 || b.numel == 0) return false;
  const auto end = [](const View& v) {
    int64_t last = 0;
    for (int64_t i = 0; i < v.dim; ++i) last += (v.sizes[i] - 1) * v.strides[i];
    return v.data + (last + 1) * v.item_size();
  };
  if (end(a) <= b.data || end(b) <= a.data) return false;
  if (a.dim == 2 && b.dim == 2) {
    const int64_t pitch = a.strides[0] * a.item_size();
    const int64_t a_width = a.columns() * a.item_size(), b_width = b.columns() * b.item_size();
    if (pitch == b.strides[0] * b.item_size() && std::max(a_width, b_width) <= pitch) {
      const int64_t distance = ((b.data - a.data) % pitch + pitch) % pitch;
      return distance < a_width || pitch - distance < b_width;
    }
  }
  return true;
}

Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype, int32_t device, int32_t index) {
  int64_t strides[64], stride = 1;
  if (dim > 64) throw std::runtime_error("mxfp8moe: more than 64 dimensions");
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, &handle));
  return Tensor(handle);
}
Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype) {
  return empty(dim, sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

template <size_t N>
void refuse(const char* op, std::array<StableIValue, N>& stack, size_t outputs) {
  check(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  const Tensor text = unbox<Tensor>(stack[outputs]);
  if (text.numel() == 0) return;
  for (size_t i = 0; i < outputs; ++i) unbox<Tensor>(stack[i]);  // release them
  throw std::runtime_error(std::string(static_cast<const char*>(text.data_ptr()), size_t(text.numel())));
}

// Where rows of `v` start, for a tensor of any rank whose last stride is 1.
int64_t row_offset(const View& v, int64_t row) {
  int64_t offset = 0;
  for (int64_t i = v.dim - 2; i >= 0; --i) {
    offset += row % v.sizes[i] * v.strides[i];
    row /= v.sizes[i];
  }
  return offset;
}

template <class F>
void for_each_row(int64_t rows, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
  const int64_t items = (rows + grain - 1) / grain;
  for_each_item(items, items > 1 ? torch::stable::get_num_threads() : 1, [&](int64_t item) {
    for (int64_t row = item * grain; row < std::min(rows, (item + 1) * grain); ++row) f(row);
  });
}

// In the order of ScaleRounding.
const std::string kScaleRoundings[] = {"rceil", "floor", "ceil", "even"};

bool quantizes(const View& x, const std::string& scale_rounding) {
  return high_precision(x) && x.rows() && x.columns() % kBlock == 0 &&
      std::find(std::begin(kScaleRoundings), std::end(kScaleRoundings), scale_rounding) != std::end(kScaleRoundings);
}

void quantize(const View& x, const std::string& scale_rounding, char* data, char* scale) {
  const auto rounding = ScaleRounding(
      std::find(std::begin(kScaleRoundings), std::end(kScaleRoundings), scale_rounding) - std::begin(kScaleRoundings));
  const int64_t columns = x.columns(), rows = columns ? x.numel / columns : 0;
  auto *data_bytes = reinterpret_cast<uint8_t*>(data), *scale_bytes = reinterpret_cast<uint8_t*>(scale);
  const Kernels& k = kernels();
  for_each_row(rows, columns, [&](int64_t row) {
    k.quantize_row(
        x.data + row_offset(x, row) * x.item_size(), kind_of(x.dtype), rounding, columns, data_bytes + row * columns,
        scale_bytes + row * (columns / kBlock));
  });
}

std::tuple<Tensor, Tensor> quantize_refused(
    const Tensor& x, const std::string& scale_rounding, const std::optional<Tensor>& out_data,
    const std::optional<Tensor>& out_scale) {
  std::array<StableIValue, 4> stack{box(x), box(scale_rounding), box(out_data), box(out_scale)};
  refuse("mxfp8moe::_refused_quantize_1x32", stack, 2);
  Tensor data = unbox<Tensor>(stack[0]), scale = unbox<Tensor>(stack[1]);
  return {std::move(data), std::move(scale)};
}

std::tuple<Tensor, Tensor> quantize_1x32(const Tensor& x_, std::string scale_rounding) {
  const View x(x_);
  if (!quantizes(x, scale_rounding) || needs_gradient({&x}))
    return quantize_refused(x_, scale_rounding, std::nullopt, std::nullopt);
  std::vector<int64_t> scale_sizes(x.sizes, x.sizes + x.dim);
  scale_sizes.back() = x.columns() / kBlock;
  Tensor data = empty(x.dim, x.sizes, dtypes().e4m3), scale = empty(x.dim, scale_sizes.data(), dtypes().u8);
  quantize(x, scale_rounding, static_cast<char*>(data.data_ptr()), static_cast<char*>(scale.data_ptr()));
  return {std::move(data), std::move(scale)};
}

void quantize_1x32_out(const Tensor& x_, std::string scale_rounding, const Tensor& out_data, const Tensor& out_scale) {
  const View x(x_), data(out_data), scale(out_scale);
  // As Quantize.check in Python says it; to the op that refuses, a call without outputs is one of the other overload.
  if (!data && !scale) throw std::runtime_error("quantize_1x32: out_data and out_scale are None; they take tensors");
  const bool takes = quantizes(x, scale_rounding) && data.dtype == dtypes().e4m3 && scale_like(scale) &&
      data.dim == x.dim && scale.dim == x.dim && std::equal(x.sizes, x.sizes + x.dim, data.sizes) &&
      std::equal(x.sizes, x.sizes + x.dim - 1, scale.sizes) && scale.columns() == x.columns() / kBlock &&
      data.contiguous() && scale.contiguous() && !overlap(data, x) && !overlap(scale, x) && !overlap(scale, data) &&
      !needs_gradient({&x, &data, &scale});
  if (takes) {
    quantize(x, scale_rounding, data.data, scale.data);
  } else {
    const auto given = [](const Tensor& out) { return out.defined() ? std::optional<Tensor>(out) : std::nullopt; };
    quantize_refused(x_, scale_rounding, given(out_data), given(out_scale));
  }
  written({&data, &scale});
}

Tensor dequantize_1x32(const Tensor& data_, const Tensor& scale_, ScalarType dtype) {
  const View data(data_), scale(scale_);
  const int32_t out_dtype = unbox<int32_t>(box(dtype));
  bool takes = data.dtype == dtypes().e4m3 && scale_like(scale) && data.rows() && scale.rows() &&
      data.dim == scale.dim && data.columns() % kBlock == 0 && data.columns() / kBlock == scale.columns() &&
      std::equal(data.sizes, data.sizes + data.dim - 1, scale.sizes) &&
      (out_dtype == dtypes().bf16 || out_dtype == dtypes().f16 || out_dtype == dtypes().f32);
  if (!takes || needs_gradient({&data, &scale})) {
    std::array<StableIValue, 3> stack{box(data_), box(scale_), box(dtype)};
    refuse("mxfp8moe::_refused_dequantize_1x32", stack, 1);
    return unbox<Tensor>(stack[0]);
  }
  const int64_t columns = data.columns(), rows = columns ? data.numel / columns : 0;
  Tensor out = empty(data.dim, data.sizes, out_dtype);
  const Kind kind = kind_of(out_dtype);
  const int64_t row_bytes = columns * size_of(kind);
  auto* out_bytes = static_cast<char*>(out.data_ptr());
  const Kernels& k = kernels();
  for_each_row(rows, columns, [&](int64_t row) {
    k.dequantize_row(
        data.bytes() + row_offset(data, row), scale.bytes() + row_offset(scale, row), columns,
        out_bytes + row * row_bytes, kind);
  });
  return out;
}

// The arguments of fused_moe that both of its overloads have.
struct Arguments {
  const Tensor &hidden_states, &w1, &w1_scale, &w2, &w2_scale, &topk_weights, &topk_ids;
  const std::optional<Tensor>&hidden_states_scale, &w1_bias, &w2_bias, &expert_map, &num_tokens;
  double swiglu_alpha, swiglu_beta;
  std::optional<double> swiglu_limit;
  bool apply_router_weight_on_input;
  const std::string &layout, &activation_dtype, &backend;
};

// Computes the call into `out` (or into a new tensor of `out_dtype`, which it returns) if it takes it as it is.
std::optional<Tensor> fused_moe_if_taken(
    const Arguments& a, const std::optional<Tensor>& out_, std::optional<ScalarType> out_dtype) {
  const Dtypes& d = dtypes();
  const View x(a.hidden_states), w1(a.w1), w1_scale(a.w1_scale), w2(a.w2), w2_scale(a.w2_scale);
  const View topk_weights(a.topk_weights), topk_ids(a.topk_ids), x_scale(a.hidden_states_scale), w1_bias(a.w1_bias);
  const View w2_bias(a.w2_bias), expert_map(a.expert_map), num_tokens(a.num_tokens), out(out_);
  const View* inputs[] = {&x,        &w1,      &w1_scale, &w2,      &w2_scale,   &topk_weights,
                          &topk_ids, &x_scale, &w1_bias,  &w2_bias, &expert_map, &num_tokens};

  if ((a.backend != "auto" && a.backend != "cpu") || a.layout != "row_major") return {};
  const bool mxfp8 = a.activation_dtype == "mxfp8";
  if (!mxfp8 && a.activation_dtype != "bf16") return {};

  if (x.dim != 2 || w1.dim != 3 || topk_ids.dim != 2) return {};
  const int64_t tokens = x.sizes[0], experts = w1.sizes[0], hidden = w1.sizes[2], intermediate = w1.sizes[1] / 2;
  const int64_t topk = topk_ids.sizes[1];
  if (experts < 1 || hidden < 1 || hidden % kBlock || w1.sizes[1] < 1 || w1.sizes[1] % (2 * kBlock) || topk < 1) return {};
  const bool shapes = x.is({tokens, hidden}) && w2.is({experts, hidden, intermediate}) &&
      w1_scale.is({experts, 2 * intermediate, hidden / kBlock}) &&
      w2_scale.is({experts, hidden, intermediate / kBlock}) && topk_ids.is({tokens, topk}) &&
      topk_weights.is({tokens, topk}) && (!x_scale || x_scale.is({tokens, hidden / kBlock})) &&
      (!w1_bias || w1_bias.is({experts, 2 * intermediate})) && (!w2_bias || w2_bias.is({experts, hidden})) &&
      (!expert_map || expert_map.dim == 1) && (!num_tokens || num_tokens.numel == 1) &&
      (!out || out.is({tokens, hidden}));
  if (!shapes) return {};

  const bool types = (x_scale ? x.dtype == d.e4m3 && scale_like(x_scale) : high_precision(x)) && w1.dtype == d.e4m3 &&
      w2.dtype == d.e4m3 && scale_like(w1_scale) && scale_like(w2_scale) && weight_like(topk_weights) &&
      topk_ids.has_dtype({d.i32, d.i64}) && (!w1_bias || weight_like(w1_bias)) && (!w2_bias || weight_like(w2_bias)) &&
      (!expert_map || expert_map.dtype == d.i32) && (!num_tokens || num_tokens.dtype == d.i32) &&
      (!out || high_precision(out));
  if (!types) return {};

  for (const View* rows : {&x, &x_scale, &topk_weights, &topk_ids, &out})
    if (*rows && !rows->rows()) return {};
  for (const View* whole : {&w1, &w1_scale, &w2, &w2_scale, &w1_bias, &w2_bias, &expert_map})
    if (*whole && !whole->contiguous()) return {};
  if (out && tokens > 1 && out.strides[0] < hidden) return {};
  if (out)
    for (const View* input : inputs)
      if (*input && overlap(out, *input)) return {};

  if (!std::isfinite(a.swiglu_alpha) || !std::isfinite(a.swiglu_beta)) return {};
  if (a.swiglu_limit && !(std::isfinite(*a.swiglu_limit) && *a.swiglu_limit > 0)) return {};
  if (a.apply_router_weight_on_input && topk != 1) return {};
  int32_t result_dtype = out ? out.dtype : x_scale ? d.bf16 : x.dtype;
  if (out_dtype) result_dtype = unbox<int32_t>(box(*out_dtype));
  if (result_dtype != d.bf16 && result_dtype != d.f16 && result_dtype != d.f32) return {};
  if (needs_gradient({&x, &w1, &w2, &w1_scale, &w2_scale, &x_scale, &topk_weights, &w1_bias, &w2_bias, &out})) return {};

  const int64_t sizes[] = {tokens, hidden};
  Tensor result = out_ ? *out_ : empty(2, sizes, result_dtype);
  FusedMoe call;
  call.tokens = tokens;
  call.hidden = hidden;
  call.intermediate = intermediate;
  call.experts = experts;
  call.global_experts = expert_map ? expert_map.sizes[0] : experts;
  call.topk = topk;
  call.hidden_states = rows_of(x);
  call.hidden_states_scale = x_scale.bytes();
  call.hidden_states_scale_stride = x_scale ? x_scale.strides[0] : 0;
  call.w1 = w1.bytes();
  call.w1_scale = w1_scale.bytes();
  call.w2 = w2.bytes();
  call.w2_scale = w2_scale.bytes();
  call.topk_weights = rows_of(topk_weights);
  call.topk_ids = topk_ids.data;
  call.topk_ids_stride = topk_ids.strides[0];
  call.ids_are_64_bit = topk_ids.dtype == d.i64;
  call.w1_bias = rows_of(w1_bias);
  call.w2_bias = rows_of(w2_bias);
  call.expert_map = reinterpret_cast<const int32_t*>(expert_map.data);
  if (num_tokens) call.num_tokens = *reinterpret_cast<const int32_t*>(num_tokens.data);
  call.alpha = float(a.swiglu_alpha);
  call.beta = float(a.swiglu_beta);
  call.limit = float(a.swiglu_limit.value_or(std::numeric_limits<double>::infinity()));
  call.weight_on_input = a.apply_router_weight_on_input;
  call.activation_dtype = mxfp8 ? ActivationDtype::mxfp8 : ActivationDtype::bf16;
  call.out = static_cast<char*>(result.data_ptr());
  call.out_stride = out ? out.strides[0] : hidden;
  call.out_kind = kind_of(result_dtype);
  fused_moe(call);
  return result;
}

Tensor fused_moe_refused(const Arguments& a, std::optional<ScalarType> out_dtype, const std::optional<Tensor>& out) {
  std::array<StableIValue, 21> stack{
      box(a.hidden_states), box(a.w1), box(a.w1_scale), box(a.w2), box(a.w2_scale), box(a.topk_weights),
      box(a.topk_ids), box(a.hidden_states_scale), box(a.w1_bias), box(a.w2_bias), box(a.expert_map),
      box(a.num_tokens), box(a.swiglu_alpha), box(a.swiglu_beta), box(a.swiglu_limit),
      box(a.apply_router_weight_on_input), box(a.layout), box(a.activation_dtype), box(a.backend), box(out_dtype),
      box(out)};
  refuse("mxfp8moe::_refused_fused_moe", stack, 1);
  return unbox<Tensor>(stack[0]);
}

#define MXFP8MOE_FUSED_MOE_PARAMETERS                                                                                 \
  const Tensor &hidden_states, const Tensor &w1, const Tensor &w1_scale, const Tensor &w2, const Tensor &w2_scale,    \
      const Tensor &topk_weights, const Tensor &topk_ids, std::optional<Tensor> hidden_states_scale,                  \
      std::optional<Tensor> w1_bias, std::optional<Tensor> w2_bias, std::optional<Tensor> expert_map,                 \
      std::optional<Tensor> num_tokens, double swiglu_alpha, double swiglu_beta, std::optional<double> swiglu_limit,  \
      bool apply_router_weight_on_input, std::string layout, std::string activation_dtype, std::string backend
#define MXFP8MOE_FUSED_MOE_ARGUMENTS                                                                            \
  {                                                                                                             \
    hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids, hidden_states_scale, w1_bias, w2_bias,   \
        expert_map, num_tokens, swiglu_alpha, swiglu_beta, swiglu_limit, apply_router_weight_on_input, layout,  \
        activation_dtype, backend                                                                               \
  }

Tensor fused_moe_functional(MXFP8MOE_FUSED_MOE_PARAMETERS, std::optional<ScalarType> out_dtype) {
  const Arguments arguments MXFP8MOE_FUSED_MOE_ARGUMENTS;
  if (auto result = fused_moe_if_taken(arguments, std::nullopt, out_dtype)) return std::move(*result);
  return fused_moe_refused(arguments, out_dtype, std::nullopt);
}

void fused_moe_out(MXFP8MOE_FUSED_MOE_PARAMETERS, const Tensor& out) {
  const Arguments arguments MXFP8MOE_FUSED_MOE_ARGUMENTS;
  // As FusedMoe.check in Python says it; to the op that refuses, a call without `out` is one of the other overload.
  if (!out.defined()) throw std::runtime_error("fused_moe: out is None; it takes a tensor");
  if (!fused_moe_if_taken(arguments, out, std::nullopt)) fused_moe_refused(arguments, std::nullopt, out);
  const View view(out);
  written({&view});
}

// out[rows[i] + columns[j] + k] = source[i, j * run + k], run = C / columns.numel(): see layouts.Permutation.offsets.
// source [N, C], rows [N], columns [C / run]; all contiguous, offsets within out.
void scatter_rows(const Tensor& source_, const Tensor& rows_, const Tensor& columns_, const Tensor& out_) {
  const View source(source_), rows(rows_), columns(columns_), out(out_);
  const bool takes = source.dim == 2 && source.dtype == dtypes().u8 && source.contiguous() &&
      rows.is({source.sizes[0]}) && rows.dtype == dtypes().i64 && rows.contiguous() && columns.dim == 1 &&
      columns.dtype == dtypes().i64 && columns.contiguous() && columns.numel > 0 &&
      source.sizes[1] % columns.numel == 0 && out.dtype == dtypes().u8 && out.contiguous();
  if (!takes) throw std::runtime_error("mxfp8moe::_scatter_rows: arguments of a wrong shape, dtype or stride");
  const int64_t count = source.sizes[0], width = source.sizes[1], pieces = columns.numel, run = width / pieces;
  const auto* row = reinterpret_cast<const int64_t*>(rows.data);
  const auto* column = reinterpret_cast<const int64_t*>(columns.data);
  if (count == 0 || width == 0) return;
  const auto [low_row, high_row] = std::minmax_element(row, row + count);
  const auto [low_column, high_column] = std::minmax_element(column, column + pieces);
  if (*low_row + *low_column < 0 || *high_row + *high_column + run > out.numel)
    throw std::runtime_error("mxfp8moe::_scatter_rows: an offset lies outside of out");

  // Neighbouring rows are written one after the other: in every layout that interleaves rows they share cache lines.
  constexpr int64_t kRows = 16, kItemRows = 8 * kRows, kPrefetch = 64;
  const int64_t items = (count + kItemRows - 1) / kItemRows;
  const int64_t threads = source.numel < 65536 ? 1 : torch::stable::get_num_threads();
  const auto scatter = [&](auto copy) {
    for_each_item(items, threads, [&](int64_t item) {
      const int64_t end = std::min(count, (item + 1) * kItemRows);
      for (int64_t first = item * kItemRows; first < end; first += kRows) {
        const int64_t n = std::min(end - first, kRows);
        char* to[kRows];
        for (int64_t i = 0; i < n; ++i) to[i] = out.data + row[first + i];
        const uint8_t* from = source.bytes() + first * width;
        for (int64_t j = 0; j < pieces; ++j) {
          const int64_t offset = column[j];
          for (int64_t i = 0; i < n; ++i) copy(to[i] + offset, from + i * width + j * run);
          if (run == 16 && j % (kPrefetch / 16) == 0)  // the rows after these: too many streams for the processor to see
            for (int64_t i = 0; i < n; ++i) __builtin_prefetch(from + (i + kRows) * width + j * 16, 0, 2);
        }
      }
    });
  };
  if (run == 16) {
    scatter([](char* to, const uint8_t* from) { std::memcpy(to, from, 16); });
  } else if (run == 1) {
    scatter([](char* to, const uint8_t* from) { *to = char(*from); });
  } else {
    scatter([run](char* to, const uint8_t* from) { std::memcpy(to, from, size_t(run)); });
  }
}

STABLE_TORCH_LIBRARY_IMPL(mxfp8moe, CPU, m) {
  m.impl("quantize_1x32", TORCH_BOX(&quantize_1x32));
  m.impl("quantize_1x32.out", TORCH_BOX(&quantize_1x32_out));
  m.impl("dequantize_1x32", TORCH_BOX(&dequantize_1x32));
  m.impl("fused_moe", TORCH_BOX(&fused_moe_functional));
  m.impl("fused_moe.out", TORCH_BOX(&fused_moe_out));
  m.impl("_scatter_rows", TORCH_BOX(&scatter_rows));
}

PyObject* capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(kernels().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* capabilities(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* found : supported()) {
    PyObject* name = names == nullptr ? nullptr : PyUnicode_FromString(found->name);
    if (name == nullptr || PyList_Append(names, name) != 0) {
      Py_XDECREF(name);
      Py_XDECREF(names);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"capability", capability, METH_NOARGS, "The instruction set in use: 'avx512', 'avx2' or 'portable'."},
    {"capabilities", capabilities, METH_NOARGS, "The instruction sets that this processor runs, the best first."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The C++ kernels of torch_mxfp8moe.", -1, methods,
                      nullptr,               nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* result = PyModule_Create(&module);
  if (result == nullptr || mxfp8moe::add_signature(result)) return result;
  Py_DECREF(result);
  return nullptr;
}
