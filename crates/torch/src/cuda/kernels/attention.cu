// Attention of one new token a row over the blocks of the cache.
//
// GROUP query heads of one key head are computed together, so that each key and value is read once for all of them. A
// warp takes a block of the cache at a time: for scores a lane is a token, for sums of values it is a part of the width.

#define WARPS 4
// Elements of a head that a lane sums.
#define PART ((HEAD_DIM + WARP - 1) / WARP)

struct Softmax {
    float max[GROUP], total[GROUP], sums[GROUP][PART];
};

__device__ inline void weigh_block(
    Softmax& s, const float (*queries)[HEAD_DIM], const Element* key, const Element* value, int tokens) {
    const int lane = threadIdx.x % WARP;
    float scores[GROUP], weights[GROUP];
    for (int g = 0; g < GROUP; ++g) scores[g] = 0.0f;
#pragma unroll 8
    for (int i = 0; i < HEAD_DIM; ++i) {
        const float k = read(key[i * BLOCK_TOKENS + lane]);
        for (int g = 0; g < GROUP; ++g) scores[g] += queries[g][i] * k;
    }
    for (int g = 0; g < GROUP; ++g) {
        // Places behind the last token hold anything, even what is no number.
        const float score = lane < tokens ? scores[g] : MINUS_INFINITY;
        const float max = fmaxf(s.max[g], warp_max(score));
        const float kept = expf(s.max[g] - max);
        weights[g] = lane < tokens ? expf(score - max) : 0.0f;
        s.total[g] = s.total[g] * kept + warp_sum(weights[g]);
        for (int p = 0; p < PART; ++p) s.sums[g][p] *= kept;
        s.max[g] = max;
    }
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) {
        float v[PART];
#if HEAD_DIM % 32 == 0 && (PART & (PART - 1)) == 0
        const Pack<PART> part = *(const Pack<PART>*)(value + t * HEAD_DIM + lane * PART);
        for (int p = 0; p < PART; ++p) v[p] = read(part.at[p]);
#else
        for (int p = 0; p < PART; ++p) {
            const int i = lane * PART + p;
            v[p] = i < HEAD_DIM ? read(value[t * HEAD_DIM + i]) : 0.0f;
        }
#endif
        for (int g = 0; g < GROUP; ++g) {
            const float weight = __shfl_sync(EVERY_LANE, weights[g], t);
            for (int p = 0; p < PART; ++p) s.sums[g][p] += weight * v[p];
        }
    }
}

// q: [B, N, HEAD_DIM], rows `q_stride` elements apart; keys: [P, K, HEAD_DIM, BLOCK_TOKENS], values:
// [P, K, BLOCK_TOKENS, HEAD_DIM] of one layer; table: the blocks of one row behind those of the other, those of its prompt
// first; runs: [B, 4], blocks of the prompt, its tokens, the tokens behind it, and where in the table the row begins. Grid:
// rows, key heads times the parts that the query heads of one are computed in, splits of the blocks.
//
// With one split the result goes to output, [B, N, HEAD_DIM]. Otherwise every split leaves its unscaled sums in partial,
// [B, N, splits, HEAD_DIM], and its maximum and total in states, [B, N, splits, 2], for combine_splits.
extern "C" __global__ void attend_blocks(
    const Element* q, long long q_stride, const Element* keys, const Element* values, const int* table, const int* runs,
    Element* output, float* partial, float* states, int kv_heads, float scale) {
    const int parts = gridDim.y / kv_heads, splits = gridDim.z;
    const int row = blockIdx.x, key_head = blockIdx.y / parts;
    const int heads = gridDim.y * GROUP, head = blockIdx.y * GROUP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __shared__ float queries[GROUP][HEAD_DIM];
    __shared__ float warp_states[WARPS][GROUP][2];
    __shared__ float warp_sums[WARPS][GROUP][HEAD_DIM];
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += blockDim.x) {
        queries[i / HEAD_DIM][i % HEAD_DIM] = read(q[row * q_stride + head * HEAD_DIM + i]) * scale;
    }
    __syncthreads();

    const int prompt_blocks = runs[4 * row], prompt_tokens = runs[4 * row + 1], own_tokens = runs[4 * row + 2];
    table += runs[4 * row + 3];
    const int blocks = prompt_blocks + (own_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const int share = (blocks + splits - 1) / splits;
    const int first = blockIdx.z * share, end = first + share < blocks ? first + share : blocks;
    Softmax s;
    for (int g = 0; g < GROUP; ++g) {
        s.max[g] = MINUS_INFINITY;
        s.total[g] = 0.0f;
        for (int p = 0; p < PART; ++p) s.sums[g][p] = 0.0f;
    }
    for (int j = first + warp; j < end; j += WARPS) {
        const int left = j < prompt_blocks ? prompt_tokens - j * BLOCK_TOKENS
                                           : own_tokens - (j - prompt_blocks) * BLOCK_TOKENS;
        const long long block = table[j];
        const size_t start = (size_t)(block * kv_heads + key_head) * HEAD_DIM * BLOCK_TOKENS;
        weigh_block(s, queries, keys + start, values + start, left < BLOCK_TOKENS ? left : BLOCK_TOKENS);
    }
    for (int g = 0; g < GROUP; ++g) {
        if (lane == 0) warp_states[warp][g][0] = s.max[g], warp_states[warp][g][1] = s.total[g];
        for (int p = 0; p < PART; ++p) {
            const int i = lane * PART + p;
            if (i < HEAD_DIM) warp_sums[warp][g][i] = s.sums[g][p];
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += blockDim.x) {
        const int g = i / HEAD_DIM, place = i % HEAD_DIM;
        float max = MINUS_INFINITY, total = 0.0f, sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) max = fmaxf(max, warp_states[w][g][0]);
        for (int w = 0; w < WARPS; ++w) {
            // A warp without a block has no maximum, and nothing to add.
            if (warp_states[w][g][1] == 0.0f) continue;
            const float weight = expf(warp_states[w][g][0] - max);
            total += weight * warp_states[w][g][1];
            sum += weight * warp_sums[w][g][place];
        }
        const size_t of_head = (size_t)row * heads + head + g;
        if (splits == 1) {
            output[of_head * HEAD_DIM + place] = write(sum / total);
            continue;
        }
        const size_t of_split = of_head * splits + blockIdx.z;
        partial[of_split * HEAD_DIM + place] = sum;
        if (place == 0) states[2 * of_split] = max, states[2 * of_split + 1] = total;
    }
}

// Brings the splits of attend_blocks together. Grid: rows, query heads.
extern "C" __global__ void combine_splits(const float* partial, const float* states, Element* output, int splits) {
    const size_t of_head = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    partial += of_head * splits * HEAD_DIM, states += of_head * splits * 2;
    float max = MINUS_INFINITY, total = 0.0f;
    for (int s = 0; s < splits; ++s) max = fmaxf(max, states[2 * s]);
    for (int s = 0; s < splits; ++s) total += states[2 * s + 1] * expf(states[2 * s] - max);
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        float sum = 0.0f;
        for (int s = 0; s < splits; ++s) sum += partial[s * HEAD_DIM + i] * expf(states[2 * s] - max);
        output[of_head * HEAD_DIM + i] = write(sum / total);
    }
}
