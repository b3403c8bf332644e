// Compiled once for each instruction set.

#include "conv3x3.h"
#include "vector.h"

namespace scalelong::SCALELONG_ISA {

namespace {

// A tile of VECTORS vectors of output channels by INPUTS input channels fills most registers.
constexpr int VECTORS = 2;
constexpr int INPUTS = WIDTH == 16 ? 12 : 6;
constexpr int OUTPUTS = VECTORS * WIDTH;
constexpr int TAPS = 9;
constexpr int TILE = INPUTS * OUTPUTS;
// Pixels summed at a time, so that the panels of both operands stay in the first-level cache meanwhile.
constexpr int64_t BLOCK = 512;

inline int64_t num_panels(int64_t num_channels, int64_t panel) { return (num_channels + panel - 1) / panel; }

// Pixel (n, y, x) of channels [c, c + PANEL), of which ``left`` exist.
template <int PANEL>
INLINED inline void pack_row(const Images& images, int64_t n, int64_t y, int64_t width, int64_t c, float* row) {
  const int64_t left = images.num_channels - c < PANEL ? images.num_channels - c : PANEL;
  const float* pixels = images.data + n * images.stride_n + y * images.stride_y + c * images.stride_c;
  if (images.stride_c == 1 && left == PANEL) {
    for (int64_t x = 0; x < width; ++x) memcpy(row + x * PANEL, pixels + x * images.stride_x, PANEL * sizeof(float));
    return;
  }
  for (int k = 0; k < PANEL; ++k) {
    const float* channel = pixels + k * images.stride_c;
    for (int64_t x = 0; x < width; ++x) row[x * PANEL + k] = k < left ? channel[x * images.stride_x] : 0.0f;
  }
}

void pack_input(const Images& images, const Size& size, float* panels, int64_t begin, int64_t end) {
  const int64_t rows = size.height + 2, width = size.width + 2;
  for (int64_t panel = 0; panel < num_panels(images.num_channels, INPUTS); ++panel) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / rows, y = r % rows - 1;
      float* row = panels + (panel * size.num_images * rows + r) * width * INPUTS;
      if (y < 0 || y == size.height) {
        memset(row, 0, width * INPUTS * sizeof(float));
        continue;
      }
      memset(row, 0, INPUTS * sizeof(float));
      pack_row<INPUTS>(images, n, y, size.width, panel * INPUTS, row + INPUTS);
      memset(row + (width - 1) * INPUTS, 0, INPUTS * sizeof(float));
    }
  }
}

void pack_output(const Images& images, const Size& size, float* panels, int64_t begin, int64_t end) {
  for (int64_t panel = 0; panel < num_panels(images.num_channels, OUTPUTS); ++panel) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = panels + (panel * size.num_images * size.height + r) * size.width * OUTPUTS;
      pack_row<OUTPUTS>(images, r / size.height, r % size.height, size.width, panel * OUTPUTS, row);
    }
  }
}

// sums += the products of COUNT pixels.
template <int COUNT>
INLINED inline void add_pixels(const float* input, const float* output, Floats (&sums)[INPUTS][VECTORS]) {
#pragma GCC unroll 8
  for (int pixel = 0; pixel < COUNT; ++pixel) {
    Floats dout[VECTORS];
    for (int v = 0; v < VECTORS; ++v) dout[v] = load(output + pixel * OUTPUTS + v * WIDTH);
    for (int c = 0; c < INPUTS; ++c) {
      for (int v = 0; v < VECTORS; ++v) sums[c][v] += input[pixel * INPUTS + c] * dout[v];
    }
  }
}

// tile += the sum over ``num_rows`` rows of pixels; the rows of the input begin at input + starts[row].
INLINED inline void add_products(const float* input, const int64_t* starts, const float* output, int64_t num_rows,
                                 int64_t width, float* tile) {
  Floats sums[INPUTS][VECTORS] = {};  // added to the tile at the end: sums of sums round less
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* pixels = input + starts[r];
    int64_t left = width;
    // By eights, because a processor guesses the end of a loop of few turns right, of many wrong: 15 cycles a row.
    for (; left >= 8; left -= 8, pixels += 8 * INPUTS, output += 8 * OUTPUTS) add_pixels<8>(pixels, output, sums);
    if (left >= 4) {
      add_pixels<4>(pixels, output, sums);
      left -= 4, pixels += 4 * INPUTS, output += 4 * OUTPUTS;
    }
    for (; left > 0; --left, pixels += INPUTS, output += OUTPUTS) add_pixels<1>(pixels, output, sums);
  }
  for (int c = 0; c < INPUTS; ++c) {
    for (int v = 0; v < VECTORS; ++v) {
      float* const place = tile + c * OUTPUTS + v * WIDTH;
      const Floats total = load(place) + sums[c][v];
      memcpy(place, &total, sizeof(Floats));
    }
  }
}

// Of output channels [first, first + count) and input channels [begin, end).
void write_weights(const float* tiles, int64_t num_inputs, int64_t first, int64_t count, int64_t begin, int64_t end,
                   float* dweight) {
  for (int64_t o = 0; o < count; ++o) {
    for (int64_t c = begin; c < end; ++c) {
      for (int tap = 0; tap < TAPS; ++tap) {
        const float* tile = tiles + (c / INPUTS * TAPS + tap) * TILE;
        dweight[((first + o) * num_inputs + c) * TAPS + tap] = tile[c % INPUTS * OUTPUTS + o];
      }
    }
  }
}

// What all pairs of panels share.
struct Operands {
  const float *input_panels, *output_panels;
  Size size;
  int64_t num_inputs, num_outputs;
  float *tiles, *dweight, *dbias;
};

// The pairs of one panel of the output's gradient with the panels [begin, end) of the input. The order in which a tile
// sums its pixels does not depend on that range.
void sum_panel(const Operands& operands, int64_t panel, int64_t begin, int64_t end) {
  const Size& size = operands.size;
  const int64_t padded_width = size.width + 2, padded_height = size.height + 2;
  const int64_t num_rows = size.num_images * size.height;
  const int64_t rows_of_block = BLOCK / size.width > 1 ? BLOCK / size.width : 1;
  const float* output = operands.output_panels + panel * num_rows * size.width * OUTPUTS;
  float* own = operands.tiles + panel * num_panels(operands.num_inputs, INPUTS) * TAPS * TILE;
  memset(own + begin * TAPS * TILE, 0, (end - begin) * TAPS * TILE * sizeof(float));
  Floats bias[VECTORS] = {};
  int64_t starts[BLOCK];
  for (int64_t row = 0; row < num_rows; row += rows_of_block) {
    const int64_t rows = num_rows - row < rows_of_block ? num_rows - row : rows_of_block;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = (row + r) / size.height, y = (row + r) % size.height;
      starts[r] = (n * padded_height + y) * padded_width * INPUTS;
    }
    for (int64_t p = begin; p < end; ++p) {
      const float* input = operands.input_panels + p * size.num_images * padded_height * padded_width * INPUTS;
      for (int tap = 0; tap < TAPS; ++tap) {
        const int64_t shift = (tap / 3 * padded_width + tap % 3) * INPUTS;
        add_products(input + shift, starts, output, rows, size.width, own + (p * TAPS + tap) * TILE);
      }
    }
    if (begin == 0) {
      Floats sums[VECTORS] = {};
      for (const float* pixel = output; pixel < output + rows * size.width * OUTPUTS; pixel += OUTPUTS) {
        for (int v = 0; v < VECTORS; ++v) sums[v] += load(pixel + v * WIDTH);
      }
      for (int v = 0; v < VECTORS; ++v) bias[v] += sums[v];
    }
    output += rows * size.width * OUTPUTS;
  }
  const int64_t first = panel * OUTPUTS;
  const int64_t count = operands.num_outputs - first < OUTPUTS ? operands.num_outputs - first : OUTPUTS;
  const int64_t last_input = end * INPUTS < operands.num_inputs ? end * INPUTS : operands.num_inputs;
  write_weights(own, operands.num_inputs, first, count, begin * INPUTS, last_input, operands.dweight);
  if (begin == 0) memcpy(operands.dbias + first, bias, count * sizeof(float));
}

void sum(const float* input_panels, const float* output_panels, const Size& size, int64_t num_inputs,
         int64_t num_outputs, float* tiles, float* dweight, float* dbias, int64_t begin, int64_t end) {
  const Operands operands{input_panels, output_panels, size, num_inputs, num_outputs, tiles, dweight, dbias};
  const int64_t num_input_panels = num_panels(num_inputs, INPUTS);
  for (int64_t pair = begin; pair < end;) {
    const int64_t panel = pair / num_input_panels, first = pair % num_input_panels;
    const int64_t left = end - pair, rest = num_input_panels - first, count = left < rest ? left : rest;
    sum_panel(operands, panel, first, first + count);
    pair += count;
  }
}

}  // namespace

Conv3x3Kernels find_conv3x3() { return {INPUTS, OUTPUTS, pack_input, pack_output, sum}; }

}  // namespace scalelong::SCALELONG_ISA
