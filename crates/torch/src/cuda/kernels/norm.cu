// Residual addition and root-mean-square norm.

template <int N>
__device__ inline float add_squares(const Element* x, const Element* y, Element* sum, int width) {
    float squares = 0.0f;
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        Pack<N> left = *(const Pack<N>*)(x + i);
        if (y) {
            const Pack<N> right = *(const Pack<N>*)(y + i);
            for (int e = 0; e < N; ++e) left.at[e] = write(read(left.at[e]) + read(right.at[e]));
            *(Pack<N>*)(sum + i) = left;
        }
        // The norm is of the sum as it is kept, rounded.
        for (int e = 0; e < N; ++e) squares += read(left.at[e]) * read(left.at[e]);
    }
    return squares;
}

template <int N>
__device__ inline void scale_row(const Element* x, const Element* weight, Element* output, int width, float scale) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        Pack<N> row = *(const Pack<N>*)(x + i);
        for (int e = 0; e < N; ++e) row.at[e] = write(read(row.at[e]) * scale * read(weight[i + e]));
        *(Pack<N>*)(output + i) = row;
    }
}

// sum = x + y, output = sum / rms(sum) * weight. Without `y` the norm is that of `x`, and `sum` is not written.
//
// x, y, sum, output: [rows, width]; weight: [width]. One block a row. `packed`: rows begin at multiples of 16 bytes and
// `width` is a multiple of 16 bytes.
extern "C" __global__ void add_rms_norm(
    const Element* x, const Element* y, const Element* weight, Element* sum, Element* output, int width, float epsilon,
    int packed) {
    const int N = 16 / sizeof(Element);
    __shared__ float scratch[WARP];
    const size_t start = (size_t)blockIdx.x * width;
    x += start, output += start;
    if (y) y += start, sum += start;
    const float mine = packed ? add_squares<N>(x, y, sum, width) : add_squares<1>(x, y, sum, width);
    const float scale = rsqrtf(block_sum(mine, scratch) / width + epsilon);
    // Each thread reads what it wrote itself.
    const Element* row = y ? sum : x;
    if (packed) scale_row<N>(row, weight, output, width, scale);
    else scale_row<1>(row, weight, output, width, scale);
}
