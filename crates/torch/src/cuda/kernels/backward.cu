// The backward of the small operations of a layer, and rotation by itself.

// Sums over a row: of squares, and of x * gradient * weight.
template <int N>
__device__ inline void row_sums(
    const Element* x, const Element* weight, const Element* gradient, int width, float* squares, float* along) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        const Pack<N> row = *(const Pack<N>*)(x + i), slope = *(const Pack<N>*)(gradient + i);
        for (int e = 0; e < N; ++e) {
            const float value = read(row.at[e]);
            *squares += value * value;
            *along += value * read(slope.at[e]) * read(weight[i + e]);
        }
    }
}

// What a thread keeps in registers of the gradient by the weight: of so many strides of the block.
#define MOST_STRIDES 2

// Gradient by a row of x. Adds the gradient by the weight to `by_weight`: with STRIDES, registers that hold N elements for
// each stride of the block that the thread takes part in; without, the row of the block in memory, which is set at its
// `first` row.
template <int N, int STRIDES>
__device__ inline void row_slopes(
    const Element* x, const Element* weight, const Element* gradient, const Element* past, Element* by_x, float* by_weight,
    int width, float scale, float along, bool first) {
    const int stride = blockDim.x * N, start = threadIdx.x * N;
    const auto slopes = [&](int i, float* to, bool is_first) {
        Pack<N> row = *(const Pack<N>*)(x + i), beside;
        const Pack<N> slope = *(const Pack<N>*)(gradient + i);
        if (past) beside = *(const Pack<N>*)(past + i);
        for (int e = 0; e < N; ++e) {
            const float unit = read(row.at[e]) * scale, by_output = read(slope.at[e]);
            to[e] = (is_first ? 0.0f : to[e]) + by_output * unit;
            const float by_unit = by_output * read(weight[i + e]);
            row.at[e] = write((by_unit - unit * along) * scale + (past ? read(beside.at[e]) : 0.0f));
        }
        *(Pack<N>*)(by_x + i) = row;
    };
    if constexpr (STRIDES > 0) {
#pragma unroll
        for (int k = 0; k < STRIDES; ++k) {
            if (start + k * stride < width) slopes(start + k * stride, by_weight + k * N, false);
        }
    } else {
        for (int i = start; i < width; i += stride) slopes(i, by_weight + i, first);
    }
}

// The rows of a block. A block's row of `by_weight` is written once where it fits into registers: to add to it in memory for
// every row would be scattered reads and writes of float32, several times what the rest of the kernel moves.
template <int N, int STRIDES>
__device__ inline void rows_backward(
    const Element* x, const Element* weight, const Element* gradient, const Element* past, Element* by_x, float* by_weight,
    int rows, int width, float epsilon, float* scratch) {
    float sums[STRIDES > 0 ? STRIDES * N : 1];
    for (int i = 0; i < STRIDES * N; ++i) sums[i] = 0.0f;
    for (int r = blockIdx.x; r < rows; r += gridDim.x) {
        const size_t start = (size_t)r * width;
        const Element *row = x + start, *slope = gradient + start, *beside = past ? past + start : nullptr;
        float squares = 0.0f, along = 0.0f;
        row_sums<N>(row, weight, slope, width, &squares, &along);
        const float scale = rsqrtf(block_sum(squares, scratch) / width + epsilon);
        // The mean of the gradient by the unit row times that row.
        along = block_sum(along, scratch) * scale / width;
        // Each thread adds to the same columns for every row.
        float* to = STRIDES > 0 ? sums : by_weight;
        row_slopes<N, STRIDES>(row, weight, slope, beside, by_x + start, to, width, scale, along, r == blockIdx.x);
    }
#pragma unroll
    for (int k = 0; k < STRIDES; ++k) {
        const int i = (k * blockDim.x + threadIdx.x) * N;
        for (int e = 0; e < N; ++e) {
            if (i < width) by_weight[i + e] = sums[k * N + e];
        }
    }
}

// Gradient by x of x / rms(x) * weight, plus `past` where there is one; the gradient by the weight, summed over the rows of
// a block, goes to the block's row of `by_weight`. No more blocks than rows.
//
// x, gradient, past, by_x: [rows, width]; weight: [width]; by_weight: [blocks, width]. Blocks take rows in turn. `packed`: as
// in add_rms_norm.
extern "C" __global__ void rms_norm_backward(
    const Element* x, const Element* weight, const Element* gradient, const Element* past, Element* by_x, float* by_weight,
    int rows, int width, float epsilon, int packed) {
    const int N = 16 / sizeof(Element);
    __shared__ float scratch[WARP];
    by_weight += (size_t)blockIdx.x * width;
    const bool fits = width <= MOST_STRIDES * (packed ? N : 1) * (int)blockDim.x;
#define ROWS_BACKWARD(N, STRIDES) \
    rows_backward<N, STRIDES>(x, weight, gradient, past, by_x, by_weight, rows, width, epsilon, scratch)
    if (packed && fits) ROWS_BACKWARD(N, MOST_STRIDES);
    else if (packed) ROWS_BACKWARD(N, 0);
    else if (fits) ROWS_BACKWARD(1, MOST_STRIDES);
    else ROWS_BACKWARD(1, 0);
#undef ROWS_BACKWARD
}

// Adds the sum of each column to `sums`. A block has as many columns as a warp has lanes, its warps take rows in turn.
//
// rows: [count, width] float32; sums: [width] float32.
extern "C" __global__ void add_column_sums(const float* rows, float* sums, int count, int width) {
    __shared__ float parts[WARP][WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < width) {
        for (int r = warp; r < count; r += warps) sum += rows[(size_t)r * width + column];
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
        for (int w = 1; w < warps; ++w) sum += parts[w][lane];
        sums[column] += sum;
    }
}

template <int N>
__device__ inline void gate_slopes(Element* gate_up, const Element* gradient, Element* activation, int width) {
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * N; i < width; i += gridDim.y * blockDim.x * N) {
        Pack<N> gates = *(const Pack<N>*)(gate_up + i), ups = *(const Pack<N>*)(gate_up + width + i), product;
        const Pack<N> slopes = *(const Pack<N>*)(gradient + i);
        for (int e = 0; e < N; ++e) {
            const float gate = read(gates.at[e]), up = read(ups.at[e]), slope = read(slopes.at[e]);
            const float sigmoid = 1.0f / (1.0f + expf(-gate)), silu = gate * sigmoid;
            product.at[e] = write(silu * up);
            gates.at[e] = write(slope * up * (sigmoid + silu * (1.0f - sigmoid)));
            ups.at[e] = write(slope * silu);
        }
        *(Pack<N>*)(activation + i) = product;
        *(Pack<N>*)(gate_up + i) = gates;
        *(Pack<N>*)(gate_up + width + i) = ups;
    }
}

// Backward of silu_gate: the gradient takes the place of gates and ups; activation = silu(gate) * up.
//
// gate_up: [rows, 2 width], gates first; gradient, activation: [rows, width]. Blocks as in silu_gate.
extern "C" __global__ void silu_gate_backward(
    Element* gate_up, const Element* gradient, Element* activation, int width, int packed) {
    gate_up += (size_t)blockIdx.x * 2 * width;
    gradient += (size_t)blockIdx.x * width, activation += (size_t)blockIdx.x * width;
    if (packed) gate_slopes<16 / sizeof(Element)>(gate_up, gradient, activation, width);
    else gate_slopes<1>(gate_up, gradient, activation, width);
}

// Turns heads in place, forwards (`direction` 1) or back (-1): element i together with element i + HEAD_DIM / 2.
//
// x: [tokens, heads, HEAD_DIM], tokens `stride` elements apart; cosines, sines: [tokens, HEAD_DIM / 2]. One block a token.
extern "C" __global__ void rotate(
    Element* x, const float* cosines, const float* sines, int heads, long long stride, float direction) {
    const int half = HEAD_DIM / 2;
    x += blockIdx.x * stride;
    cosines += (size_t)blockIdx.x * half, sines += (size_t)blockIdx.x * half;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        Element* pair = x + i / half * HEAD_DIM + i % half;
        const float cosine = cosines[i % half], sine = sines[i % half] * direction;
        const float first = read(pair[0]), second = read(pair[half]);
        pair[0] = write(first * cosine - second * sine);
        pair[half] = write(second * cosine + first * sine);
    }
}

// Sums, for each row, of its copies among the rows of two tensors: the backward of picking rows by index, any number of times
// each. Sums are float32, rounded once, and in one order.
//
// first, second: [copies, width]; starts: [rows + 1], where in `copies` the copies of a row begin; sums: [rows, width]. Grid:
// rows, the two tensors.
extern "C" __global__ void sum_copies(
    const Element* first, const Element* second, const int* starts, const int* copies, Element* first_sums,
    Element* second_sums, int width) {
    const Element* from = blockIdx.y ? second : first;
    Element* to = (blockIdx.y ? second_sums : first_sums) + (size_t)blockIdx.x * width;
    const int start = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int c = start; c < end; ++c) sum += read(from[(size_t)copies[c] * width + i]);
        to[i] = write(sum);
    }
}
