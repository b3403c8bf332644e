// The operators scalelong_native::group_norm_forward and _backward: threads, scratch memory and the choice of the
// instruction set around the kernels. Written against torch's stable ABI, so that one build runs on later versions.

#include "group_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "host.h"

namespace {

using namespace scalelong;
using torch::stable::Tensor;

// Outputs from this size on are written past the caches.
constexpr int64_t STREAM_BYTES = 4 << 20;
// What a walk over images in channels last reads: small enough to be found in the last cache the second time, by all
// threads together or by one thread.
constexpr int64_t WALK_BYTES = 2 << 20, OWN_WALK_BYTES = 1 << 20;
// Beyond this, backward computes dz twice rather than hold a group of it.
constexpr int64_t MAX_SCRATCH_BYTES = 8 << 20;
constexpr int64_t MIN_ROWS_PER_BLOCK = 64, MAX_BLOCKS = 16;
constexpr int64_t WIDEST_VECTOR = 16;

constexpr auto FLOAT = torch::headeronly::ScalarType::Float;

float* floats(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<float*>(x->data_ptr()) : nullptr;
}

struct Parameters {
  const std::optional<Tensor>&s, &scale, &weight, &bias, &gain, &shift;
};

// Whether the elements lie in one block, in the order of the layout.
bool is_dense(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.is_contiguous();
  int64_t stride = 1;
  if (x.numel() == 0) return true;  // whatever its strides say
  const auto lies_next = [&](int64_t dim) {
    const bool does = x.size(dim) <= 1 || x.stride(dim) == stride;
    stride *= x.size(dim);
    return does;
  };
  bool all = lies_next(1);
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) all = lies_next(dim) && all;
  return lies_next(0) && all;
}

// x is of the same images as h and has so many channels.
void check_activation(const char* name, const Tensor& x, const Tensor& h, int64_t num_channels, bool channels_last) {
  bool fits = x.dim() == h.dim() && x.size(0) == h.size(0) && x.size(1) == num_channels;
  for (int64_t dim = 2; fits && dim < h.dim(); ++dim) fits = x.size(dim) == h.size(dim);
  STD_TORCH_CHECK(fits, "group_norm: ", name, " does not have the shape that h gives it");
  check_tensor(name, x, h.scalar_type(), x.numel());
  STD_TORCH_CHECK(is_dense(x, channels_last), "group_norm: ", name, " is not dense in the layout of h");
}

// A parameter or its gradient, where there is one.
void check_floats(const char* name, const std::optional<Tensor>& x, int64_t numel) {
  if (x.has_value()) check_contiguous(name, *x, FLOAT, numel);
}

void check_arguments(const Tensor& h, const Parameters& parameters, int64_t groups, int64_t act, const Tensor& mean,
                     const Tensor& rstd, bool channels_last) {
  const auto& [s, scale, weight, bias, gain, shift] = parameters;
  STD_TORCH_CHECK(h.dim() >= 2 && h.numel() + (s.has_value() ? s->numel() : 0) > 0, "group_norm: no elements");
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::gelu_tanh), "group_norm: no activation ", act);
  const int64_t N = h.size(0), Ch = h.size(1), Cs = s.has_value() ? s->size(1) : 0, C = Ch + Cs;
  STD_TORCH_CHECK(groups > 0 && C % groups == 0, "group_norm: ", C, " channels in ", groups, " groups");
  check_activation("h", h, h, Ch, channels_last);
  if (s.has_value()) check_activation("s", *s, h, Cs, channels_last);
  if (scale.has_value()) {
    const bool fits = scale->dim() == 0 || (scale->dim() == 1 && scale->size(0) == Cs) ||
                      (scale->dim() == 2 && scale->size(0) == N && (scale->size(1) == Cs || scale->size(1) == 1));
    STD_TORCH_CHECK(fits, "group_norm: scale is not of (), (Cs), (N, Cs) or (N, 1)");
    check_contiguous("scale", *scale, FLOAT, scale->numel());
  }
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "group_norm: weight and bias, or neither");
  check_floats("weight", weight, C);
  check_floats("bias", bias, C);
  check_floats("gain", gain, N * C);
  check_floats("shift", shift, N * C);
  check_contiguous("mean", mean, FLOAT, N * groups);
  check_contiguous("rstd", rstd, FLOAT, N * groups);
}

GroupNorm describe(const Tensor& h, const Parameters& parameters, double float_scale, int64_t groups, int64_t act,
                   const Tensor& mean, const Tensor& rstd, bool channels_last) {
  check_arguments(h, parameters, groups, act, mean, rstd, channels_last);
  GroupNorm norm{};
  norm.N = h.size(0);
  norm.Ch = h.size(1);
  norm.Cs = parameters.s.has_value() ? parameters.s->size(1) : 0;
  norm.P = 1;  // not from the number of elements, which is 0 where h has no channels
  for (int64_t dim = 2; dim < h.dim(); ++dim) norm.P *= h.size(dim);
  norm.G = groups;
  norm.type = type_of(h);
  norm.act = static_cast<Act>(act);
  norm.h = h.data_ptr();
  norm.s = parameters.s.has_value() ? parameters.s->data_ptr() : nullptr;
  norm.float_scale = static_cast<float>(float_scale);
  norm.scale = floats(parameters.scale);
  if (parameters.scale.has_value()) {  // (), (Cs), (N, Cs) or (N, 1), contiguous
    const Tensor& scale = *parameters.scale;
    const bool has_samples = scale.dim() == 2, has_channels = scale.dim() > 0 && (!has_samples || scale.size(1) > 1);
    norm.scale_stride_n = has_samples ? scale.size(1) : 0;
    norm.scale_stride_c = has_channels ? 1 : 0;
  }
  norm.weight = floats(parameters.weight);
  norm.bias = floats(parameters.bias);
  norm.gain = floats(parameters.gain);
  norm.shift = floats(parameters.shift);
  norm.mean = static_cast<float*>(mean.data_ptr());
  norm.rstd = static_cast<float*>(rstd.data_ptr());
  norm.streams = norm.N * (norm.Ch + norm.Cs) * norm.P * size_of(norm.type) >= STREAM_BYTES;
  return norm;
}

// Kept by each thread, because mapping fresh pages at every call costs more than filling them.
float* scratch_of_thread(int64_t size) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t capacity = 0;
  if (capacity < size) {
    memory.reset();
    memory.reset(new float[size]);
    capacity = size;
  }
  return memory.get();
}

// How many images and groups make a walk.
struct WalkSize {
  int64_t images, groups;

  int64_t along_images(const GroupNorm& norm) const { return (norm.N + images - 1) / images; }
  int64_t along_groups(const GroupNorm& norm) const { return (norm.G + groups - 1) / groups; }
  int64_t num_walks(const GroupNorm& norm) const { return along_images(norm) * along_groups(norm); }
};

// Whole images, or of one that is too large whole groups, whose channels begin at a vector.
WalkSize size_walk(const GroupNorm& norm, int64_t bytes_per_channel, int64_t bytes) {
  const int64_t C = norm.Ch + norm.Cs, D = C / norm.G, step = std::lcm(D, WIDEST_VECTOR) / D;
  const int64_t num_parts = std::max<int64_t>(1, (C * bytes_per_channel + bytes - 1) / bytes);
  return {std::clamp<int64_t>(bytes / (C * bytes_per_channel), 1, norm.N),
          std::min(norm.G, ((norm.G + num_parts - 1) / num_parts + step - 1) / step * step)};
}

// Calls f(walk, num_images) until all images and groups have been walked. ``keeps_dz`` asks for memory for it.
template <class F>
void each_walk(const GroupNorm& norm, int64_t bytes_per_element, bool keeps_dz, const F& f) {
  const int64_t D = (norm.Ch + norm.Cs) / norm.G, bytes_per_channel = norm.P * bytes_per_element;
  // Walks of its own let a thread go on without waiting for the others, which takes a scheduler's time slice at each step
  // where other programs share the processor; they must be small and many enough.
  const WalkSize own = size_walk(norm, bytes_per_channel, OWN_WALK_BYTES);
  const bool alone = own.num_walks(norm) >= 2 * int64_t(torch::stable::get_num_threads()) &&
                     own.images * own.groups * D * bytes_per_channel <= WALK_BYTES;
  const WalkSize size = alone ? own : size_walk(norm, bytes_per_channel, WALK_BYTES);
  const int64_t num_walks = size.num_walks(norm), num_groups = size.images * size.groups;
  const int64_t dz_size = num_groups * D * norm.P;
  const auto run = [&](int64_t begin, int64_t end) {
    Walk walk{};
    // From the shape alone, so that the number of threads does not change a bit of the result.
    walk.rows_per_block = std::max(MIN_ROWS_PER_BLOCK, (norm.P + MAX_BLOCKS - 1) / MAX_BLOCKS);
    walk.num_blocks = (norm.P + walk.rows_per_block - 1) / walk.rows_per_block;
    walk.channel_stride = (size.groups * D + 2 * (WIDEST_VECTOR - 1)) / WIDEST_VECTOR * WIDEST_VECTOR;
    const int64_t channels = size.images * walk.channel_stride;
    const std::unique_ptr<float[]> partials(new float[channels * walk.num_blocks * NUM_PARTIALS]);
    const std::unique_ptr<float[]> values(new float[channels * NUM_CHANNEL_VALUES]);
    const std::unique_ptr<GroupSums[]> group_sums(new GroupSums[num_groups]);
    walk.partials = partials.get();
    walk.channel_values = values.get();
    walk.group_sums = group_sums.get();
    if (keeps_dz && dz_size * int64_t(sizeof(float)) <= MAX_SCRATCH_BYTES) walk.dz = scratch_of_thread(dz_size);
    for (int64_t i = begin; i < end; ++i) {
      walk.first_n = i / size.along_groups(norm) * size.images;
      walk.first_g = i % size.along_groups(norm) * size.groups;
      walk.num_groups = std::min(size.groups, norm.G - walk.first_g);
      f(walk, std::min(size.images, norm.N - walk.first_n));
    }
  };
  alone ? torch::stable::parallel_for(0, num_walks, 1, run) : run(0, num_walks);
}

// Runs the steps of a walk, each over its unit of work.
struct Steps {
  using Step = GroupNormKernels::WalkStep;

  const GroupNorm& norm;
  const Walk& walk;
  int64_t images, D, width;  // D channels a group, width elements a vector

  void over_blocks(Step step) const { run(step, images * walk.num_blocks, walk.rows_per_block * walk.num_groups * D); }
  void over_vectors(Step step) const { run(step, images * walk.channel_stride / width, width * walk.num_blocks); }
  void over_groups(Step step) const { run(step, images * walk.num_groups, D); }
  void over_images(Step step) const { run(step, images, norm.Cs); }

  void run(Step step, int64_t num_units, int64_t elements_per_unit) const {
    in_parallel(num_units, elements_per_unit, [&](int64_t begin, int64_t end) { step(norm, walk, begin, end); });
  }
};

GroupNormKernels kernels_of(const GroupNorm& norm) {
  static const auto find = SCALELONG_CHOOSE(find_group_norm);
  return find(norm.type, norm.act);
}

void forward(const GroupNorm& norm, bool channels_last) {
  const GroupNormKernels kernels = kernels_of(norm);
  const int64_t D = (norm.Ch + norm.Cs) / norm.G;
  if (!channels_last) {
    in_parallel(norm.N * norm.G, D * norm.P, [&](int64_t begin, int64_t end) { kernels.forward(norm, begin, end); });
    return;
  }
  each_walk(norm, size_of(norm.type), false, [&](const Walk& walk, int64_t images) {
    const Steps steps{norm, walk, images, D, kernels.width};
    steps.over_blocks(kernels.moments_B);
    steps.over_vectors(kernels.merge_moments_V);
    steps.over_groups(kernels.statistics_G);
    steps.over_blocks(kernels.activate_B);
  });
}

void backward(const GroupNorm& norm, bool channels_last) {
  const GroupNormKernels kernels = kernels_of(norm);
  const int64_t C = norm.Ch + norm.Cs, D = C / norm.G;
  const bool has_dx = norm.dh || norm.ds, keeps_dz = has_dx && norm.act != Act::none;
  if (channels_last) {
    each_walk(norm, 2 * size_of(norm.type), keeps_dz, [&](const Walk& walk, int64_t images) {
      const Steps steps{norm, walk, images, D, kernels.width};
      steps.over_groups(kernels.load_statistics_G);
      steps.over_blocks(kernels.sums_B);
      steps.over_vectors(kernels.merge_sums_V);
      steps.over_groups(kernels.group_sums_G);
      if (has_dx) steps.over_blocks(kernels.gradients_B);
      if (norm.dscale) {
        steps.over_vectors(kernels.merge_sums_V);
        steps.over_images(kernels.sum_dscale_N);
      }
    });
  } else {
    const bool holds_dz = keeps_dz && D * norm.P * 4 <= MAX_SCRATCH_BYTES;
    in_parallel(norm.N * norm.G, D * norm.P, [&](int64_t begin, int64_t end) {
      kernels.backward(norm, begin, end, holds_dz ? scratch_of_thread(D * norm.P) : nullptr);
    });
  }
  if (norm.dweight || norm.dbias || norm.gain) {
    in_parallel(C, norm.N, [&](int64_t begin, int64_t end) { kernels.parameters_C(norm, begin, end); });
  }
}

// From one gradient a channel of each image to the shape that scale has.
void sum_to_scale(const GroupNorm& norm, float* dscale, int64_t size) {
  const std::unique_ptr<double[]> sums(new double[size]());
  for (int64_t n = 0; n < norm.N; ++n) {
    for (int64_t c = 0; c < norm.Cs; ++c) {
      sums[n * norm.scale_stride_n + c * norm.scale_stride_c] += norm.dscale[n * norm.Cs + c];
    }
  }
  std::copy(sums.get(), sums.get() + size, dscale);
}

void group_norm_forward(Tensor y, Tensor mean, Tensor rstd, Tensor h, std::optional<Tensor> s,
                        std::optional<Tensor> scale, double float_scale, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, std::optional<Tensor> gain, std::optional<Tensor> shift,
                        int64_t groups, double eps, int64_t act, bool channels_last) {
  const Parameters parameters{s, scale, weight, bias, gain, shift};
  GroupNorm norm = describe(h, parameters, float_scale, groups, act, mean, rstd, channels_last);
  check_activation("y", y, h, norm.Ch + norm.Cs, channels_last);
  norm.eps = static_cast<float>(eps);
  norm.y = y.data_ptr();
  forward(norm, channels_last);
}

// Of dh to dshift those are given whose gradients are wanted.
void group_norm_backward(std::optional<Tensor> dh, std::optional<Tensor> ds, std::optional<Tensor> dscale,
                         std::optional<Tensor> dweight, std::optional<Tensor> dbias, std::optional<Tensor> dgain,
                         std::optional<Tensor> dshift, Tensor dy, Tensor h, std::optional<Tensor> s,
                         std::optional<Tensor> scale, double float_scale,
                         std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> gain,
                         std::optional<Tensor> shift, Tensor mean, Tensor rstd, int64_t groups, int64_t act,
                         bool channels_last) {
  const Parameters parameters{s, scale, weight, bias, gain, shift};
  GroupNorm norm = describe(h, parameters, float_scale, groups, act, mean, rstd, channels_last);
  const int64_t C = norm.Ch + norm.Cs, num_sums = norm.N * C;
  check_activation("dy", dy, h, C, channels_last);
  if (dh.has_value()) check_activation("dh", *dh, h, norm.Ch, channels_last);
  if (ds.has_value()) check_activation("ds", *ds, h, norm.Cs, channels_last);
  STD_TORCH_CHECK(!dscale.has_value() || (ds.has_value() && scale.has_value()), "group_norm: dscale without scale or ds");
  check_floats("dscale", dscale, scale.has_value() ? scale->numel() : 0);
  check_floats("dweight", dweight, C);
  check_floats("dbias", dbias, C);
  check_floats("dgain", dgain, num_sums);
  check_floats("dshift", dshift, num_sums);
  norm.dy = dy.data_ptr();
  norm.dh = dh.has_value() ? dh->data_ptr() : nullptr;
  norm.ds = ds.has_value() ? ds->data_ptr() : nullptr;
  norm.dweight = floats(dweight);
  norm.dbias = floats(dbias);
  const std::unique_ptr<float[]> scratch(new float[2 * num_sums + norm.N * norm.Cs]);
  norm.sum_dz_xhat = dgain.has_value() ? floats(dgain) : scratch.get();
  norm.sum_dz = dshift.has_value() ? floats(dshift) : scratch.get() + num_sums;
  norm.dscale = dscale.has_value() ? scratch.get() + 2 * num_sums : nullptr;
  backward(norm, channels_last);
  if (dscale.has_value()) sum_to_scale(norm, floats(dscale), dscale->numel());
}

}  // namespace

STABLE_TORCH_LIBRARY(scalelong_native, library) {
  library.def(
      "group_norm_forward(Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor h, Tensor? s, Tensor? scale, "
      "float float_scale, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, int groups, float eps, int act, "
      "bool channels_last) -> ()");
  library.def(
      "group_norm_backward(Tensor(a!)? dh, Tensor(b!)? ds, Tensor(c!)? dscale, Tensor(d!)? dweight, Tensor(e!)? dbias, "
      "Tensor(f!)? dgain, Tensor(g!)? dshift, Tensor dy, Tensor h, Tensor? s, Tensor? scale, float float_scale, "
      "Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, "
      "Tensor mean, Tensor rstd, int groups, int act, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalelong_native, CPU, library) {
  library.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  library.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}
