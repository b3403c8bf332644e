// The operators scalelong_native::add_layer_norm_forward and _backward: checks, threads and scratch memory around the
// kernels.

#include "layer_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <optional>

#include "host.h"

namespace {

using namespace scalelong;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// From the shape alone, so that the number of threads does not change a bit of the result. Blocks of a few rows would
// be bound by their sums, and a few blocks leave threads idle.
constexpr int64_t MIN_ROWS_PER_BLOCK = 16, MAX_BLOCKS = 64;

// Outputs from this size on are written past the caches.
constexpr int64_t STREAM_BYTES = 4 << 20;

bool is_floating(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

void* dense(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_floating(x), "add_layer_norm: ", name, " is none of float32, bfloat16 and float16");
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "add_layer_norm: ", name, " is no contiguous tensor on the CPU");
  STD_TORCH_CHECK(x.numel() == size, "add_layer_norm: ", name, " has ", x.numel(), " elements instead of ", size);
  return x.data_ptr();
}

void* dense(const Optional& x, int64_t size, const char* name) {
  return x.has_value() ? dense(*x, size, name) : nullptr;
}

template <class MaybeTensor>
float* floats(const MaybeTensor& x, int64_t size, const char* name) {
  void* data = dense(x, size, name);
  STD_TORCH_CHECK(!data || Optional(x)->scalar_type() == ScalarType::Float, "add_layer_norm: ", name, " is no float32");
  return static_cast<float*>(data);
}

struct Parameters {
  const Optional&weight, &bias, &gain, &shift, &gate, &cosine, &sine;
};

// num_samples is 1 where nothing belongs to a sample.
AddLayerNorm describe(const Tensor& x, int64_t num_samples, const Parameters& parameters, const Tensor& mean,
                      const Tensor& rstd) {
  STD_TORCH_CHECK(x.dim() > 0 && x.numel() > 0 && num_samples > 0, "add_layer_norm: x is empty");
  AddLayerNorm norm{};
  norm.D = x.size(x.dim() - 1);
  norm.B = num_samples;
  const int64_t num_rows = x.numel() / norm.D, size = norm.B * norm.D;
  STD_TORCH_CHECK(num_rows % norm.B == 0, "add_layer_norm: ", num_rows, " rows do not divide into samples");
  norm.T = num_rows / norm.B;
  const int64_t even = (num_rows / MAX_BLOCKS + ROWS_TOGETHER) / ROWS_TOGETHER * ROWS_TOGETHER;
  norm.rows_per_block = std::max(MIN_ROWS_PER_BLOCK, even);
  norm.num_blocks = (norm.T + norm.rows_per_block - 1) / norm.rows_per_block;
  norm.streams = x.numel() * size_of(type_of(x)) >= STREAM_BYTES;
  norm.x = dense(x, x.numel(), "x");
  norm.weight = floats(parameters.weight, norm.D, "weight");
  norm.bias = floats(parameters.bias, norm.D, "bias");
  norm.gain = floats(parameters.gain, size, "gain");
  norm.shift = floats(parameters.shift, size, "shift");
  norm.gate = floats(parameters.gate, size, "gate");
  STD_TORCH_CHECK(parameters.cosine.has_value() == parameters.sine.has_value() &&
                      (!parameters.cosine.has_value() || norm.D % 2 == 0),
                  "add_layer_norm: angles have a cosine and a sine, and turn pairs of features");
  norm.cosine = floats(parameters.cosine, size / 2, "cosine");
  norm.sine = floats(parameters.sine, size / 2, "sine");
  norm.mean = floats(mean, num_rows, "mean");
  norm.rstd = floats(rstd, num_rows, "rstd");
  return norm;
}

AddLayerNormKernels kernels_of(Type stream, Type branch, Type y) {
  static const auto find = SCALELONG_CHOOSE(find_add_layer_norm);
  const AddLayerNormKernels kernels = find(stream, branch, y);
  STD_TORCH_CHECK(kernels.forward, "add_layer_norm: there is no kernel for these dtypes of x, branch and y");
  return kernels;
}

void each_block(const AddLayerNorm& norm, AddLayerNormKernels::Rows rows) {
  in_parallel(norm.B * norm.num_blocks, norm.rows_per_block * norm.D, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[SCRATCH_ROWS * norm.D]);
    rows(norm, begin, end, scratch.get());
  });
}

void add_layer_norm_forward(Optional stream, Tensor y, Tensor mean, Tensor rstd, Tensor x, Optional branch,
                            Optional weight, Optional bias, Optional gain, Optional shift, Optional gate,
                            Optional cosine, Optional sine, int64_t num_samples, double eps) {
  AddLayerNorm norm = describe(x, num_samples, {weight, bias, gain, shift, gate, cosine, sine}, mean, rstd);
  const Type type = type_of(x), y_type = type_of(y), branch_type = branch.has_value() ? type_of(*branch) : type;
  STD_TORCH_CHECK(branch.has_value() == stream.has_value(), "add_layer_norm: a branch makes a stream");
  STD_TORCH_CHECK(!stream.has_value() || type_of(*stream) == type, "add_layer_norm: the stream has the dtype of x");
  norm.eps = static_cast<float>(eps);
  norm.branch = dense(branch, x.numel(), "branch");
  norm.stream = dense(stream, x.numel(), "stream");
  norm.y = dense(y, x.numel(), "y");
  each_block(norm, kernels_of(type, branch_type, y_type).forward);
}

void add_layer_norm_backward(Optional dx, Optional dbranch, Optional dweight, Optional dbias, Optional dgain,
                             Optional dshift, Optional dgate, Optional dangle, Optional dstream, Tensor dy,
                             Tensor stream, Tensor mean, Tensor rstd, Optional branch, Optional weight, Optional bias,
                             Optional gain, Optional shift, Optional gate, Optional cosine, Optional sine,
                             int64_t num_samples) {
  AddLayerNorm norm = describe(stream, num_samples, {weight, bias, gain, shift, gate, cosine, sine}, mean, rstd);
  const int64_t size = norm.B * norm.D;
  const Type type = type_of(stream), branch_type = dbranch.has_value()  ? type_of(*dbranch)
                                                   : branch.has_value() ? type_of(*branch)
                                                                        : type;
  for (const Optional& x : {dx, dstream}) {
    STD_TORCH_CHECK(!x.has_value() || type_of(*x) == type, "add_layer_norm: dx and dstream have the dtype of x");
  }
  STD_TORCH_CHECK(!branch.has_value() || type_of(*branch) == branch_type, "add_layer_norm: dbranch is not as branch");
  STD_TORCH_CHECK(!dgate.has_value() || branch.has_value(), "add_layer_norm: the gradient of gate needs branch");
  norm.dy = dense(dy, stream.numel(), "dy");
  norm.dstream = dense(dstream, stream.numel(), "dstream");
  norm.branch = dense(branch, stream.numel(), "branch");
  norm.dx = dense(dx, stream.numel(), "dx");
  norm.dbranch = dense(dbranch, stream.numel(), "dbranch");
  norm.dweight = floats(dweight, norm.D, "dweight");
  norm.dbias = floats(dbias, norm.D, "dbias");
  norm.dgain = floats(dgain, size, "dgain");
  norm.dshift = floats(dshift, size, "dshift");
  STD_TORCH_CHECK(!dangle.has_value() || cosine.has_value(), "add_layer_norm: there are no angles");
  norm.dgate = floats(dgate, size, "dgate");
  norm.dangle = floats(dangle, size / 2, "dangle");
  const bool has_sums = norm.dweight || norm.dbias || norm.dgain || norm.dshift || norm.dgate || norm.dangle;
  const std::unique_ptr<float[]> sums(has_sums ? new float[norm.B * norm.num_blocks * NUM_SUMS * norm.D] : nullptr);
  norm.sums = sums.get();
  const AddLayerNormKernels kernels = kernels_of(type, branch_type, type_of(dy));
  each_block(norm, kernels.backward);
  if (!has_sums) return;
  in_parallel(norm.D, norm.B * norm.num_blocks * NUM_SUMS, [&](int64_t begin, int64_t end) {
    kernels.parameters_D(norm, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalelong_native, library) {
  library.def(
      "add_layer_norm_forward(Tensor(a!)? stream, Tensor(b!) y, Tensor(c!) mean, Tensor(d!) rstd, Tensor x, "
      "Tensor? branch, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, Tensor? gate, Tensor? cosine, "
      "Tensor? sine, int num_samples, float eps) -> ()");
  library.def(
      "add_layer_norm_backward(Tensor(a!)? dx, Tensor(b!)? dbranch, Tensor(c!)? dweight, Tensor(d!)? dbias, "
      "Tensor(e!)? dgain, Tensor(f!)? dshift, Tensor(g!)? dgate, Tensor(h!)? dangle, Tensor? dstream, Tensor dy, "
      "Tensor stream, Tensor mean, Tensor rstd, Tensor? branch, Tensor? weight, Tensor? bias, Tensor? gain, "
      "Tensor? shift, Tensor? gate, Tensor? cosine, Tensor? sine, int num_samples) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalelong_native, CPU, library) {
  library.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  library.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}
