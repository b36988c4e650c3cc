// The gated activation of the feed-forward block.

template <int N>
__device__ inline void gate_row(const Element* gate_up, Element* output, int width) {
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * N; i < width; i += gridDim.y * blockDim.x * N) {
        const Pack<N> gate = *(const Pack<N>*)(gate_up + i), up = *(const Pack<N>*)(gate_up + width + i);
        Pack<N> product;
        for (int e = 0; e < N; ++e) {
            const float x = read(gate.at[e]);
            product.at[e] = write(x / (1.0f + expf(-x)) * read(up.at[e]));
        }
        *(Pack<N>*)(output + i) = product;
    }
}

// output = silu(gate) * up.
//
// gate_up: [rows, 2 width], gates first; output: [rows, width]. Blocks: rows, and as many a row as there are columns for.
extern "C" __global__ void silu_gate(const Element* gate_up, Element* output, int width, int packed) {
    gate_up += (size_t)blockIdx.x * 2 * width, output += (size_t)blockIdx.x * width;
    if (packed) gate_row<16 / sizeof(Element)>(gate_up, output, width);
    else gate_row<1>(gate_up, output, width);
}
