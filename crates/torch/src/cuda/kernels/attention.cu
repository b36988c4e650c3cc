// Attention of one new token a row over the blocks of the cache.
//
// GROUP query heads of one key head are computed together, so that each key and value is read once for all of them. A
// warp takes a block of the cache at a time.

#define WARPS 4
// Elements that a lane moves at once, and lanes that a row of a block takes then: of keys the tokens of one place of the
// width, of values the width of one token.
#define LANE_ELEMENTS ((int)(16 / sizeof(Element)))
#define KEY_LANES (BLOCK_TOKENS / LANE_ELEMENTS)
#define VALUE_LANES (HEAD_DIM / LANE_ELEMENTS)
// Where a row of values takes 1, 2, 4 .. 32 whole lanes, a block is read 16 bytes a lane. Decoding waits for memory: with
// one element a lane a warp has too few bytes on their way, whatever is unrolled, for the compiler sinks such loads to
// their uses.
#define WIDE_LANES \
    (HEAD_DIM % (BF16 ? 8 : 4) == 0 && HEAD_DIM / (BF16 ? 8 : 4) <= 32 && \
     (HEAD_DIM / (BF16 ? 8 : 4) & (HEAD_DIM / (BF16 ? 8 : 4) - 1)) == 0)
// Loads that are on their way together, and how many times so many are unrolled: less where registers would not hold it.
#define CROWDED (HEAD_DIM > 128 && GROUP > 4)
#define LOADS (CROWDED ? 4 : 8)
#define BATCHES_UNROLLED (CROWDED ? 1 : 8)
// Blocks of a multiprocessor that registers are rationed for: as many as cost no spill.
#define BLOCKS_AT_ONCE (BF16 && HEAD_DIM <= 128 && GROUP > 1 && GROUP < 4 ? 3 : 2)

#if WIDE_LANES
// Elements of a head that a lane sums. Lanes with the same elements take the tokens of a block in turns.
#define PART LANE_ELEMENTS
#else
#define PART ((HEAD_DIM + WARP - 1) / WARP)
#endif

// What a warp has of the heads: maxima are of all its lanes, totals are those of the tokens of a lane alone.
struct Softmax {
    float max[GROUP], total[GROUP], sums[GROUP][PART];
};

// Takes the scores of a block, one token a lane and at least one that is there, into the softmax. Returns the weights of
// the lane's token. Heads are side by side within each exchange, for one alone waits for five of them.
__device__ inline void weigh_scores(Softmax& s, const float* scores, bool is_there, float* weights) {
    float max[GROUP];
    // Places after the last token hold anything, even NaN. Their weight becomes 0.
    for (int g = 0; g < GROUP; ++g) weights[g] = max[g] = is_there ? scores[g] : MINUS_INFINITY;
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        for (int g = 0; g < GROUP; ++g) max[g] = fmaxf(max[g], __shfl_xor_sync(EVERY_LANE, max[g], distance));
    }
    for (int g = 0; g < GROUP; ++g) {
        max[g] = fmaxf(max[g], s.max[g]);
        const float kept = expf(s.max[g] - max[g]);
        weights[g] = expf(weights[g] - max[g]);
        s.total[g] = s.total[g] * kept + weights[g];
        for (int p = 0; p < PART; ++p) s.sums[g][p] *= kept;
        s.max[g] = max[g];
    }
}

#if WIDE_LANES
// Adds up over lanes that are `distance` apart and halves what each of them has: the upper lane keeps the upper half.
template <int N>
__device__ inline void halve(float* x, int distance) {
    const bool upper = threadIdx.x & distance;
    for (int i = 0; i < N / 2; ++i) {
        const float given = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
        x[i] = kept + __shfl_xor_sync(EVERY_LANE, given, distance);
    }
}

__device__ inline void weigh_block(
    Softmax& s, const float (*queries)[HEAD_DIM], const Element* key, const Element* value, int tokens) {
    const int N = LANE_ELEMENTS, lane = threadIdx.x % WARP;
    const int first_token = lane % KEY_LANES * N, first_row = lane / KEY_LANES;
    const int value_row = lane / VALUE_LANES, value_part = lane % VALUE_LANES * N;
    const int KEY_ROWS = WARP / KEY_LANES, KEY_LOADS = HEAD_DIM / KEY_ROWS;
    const int VALUE_ROWS = WARP / VALUE_LANES, VALUE_LOADS = BLOCK_TOKENS / VALUE_ROWS;
    const int KEY_BATCH = KEY_LOADS < LOADS ? KEY_LOADS : LOADS, VALUE_BATCH = VALUE_LOADS < LOADS ? VALUE_LOADS : LOADS;

    // Scores of N tokens, of the rows of the lane alone.
    float parts[GROUP][N];
    for (int g = 0; g < GROUP; ++g)
        for (int e = 0; e < N; ++e) parts[g][e] = 0.0f;
    // Tokens that are not there are not read.
    if (first_token < tokens) {
#pragma unroll(BATCHES_UNROLLED)
        for (int start = 0; start < KEY_LOADS; start += KEY_BATCH) {
            Pack<LANE_ELEMENTS> packs[KEY_BATCH];
#pragma unroll
            for (int j = 0; j < KEY_BATCH; ++j) {
                const int row = (start + j) * KEY_ROWS + first_row;
                packs[j] = *(const Pack<LANE_ELEMENTS>*)(key + row * BLOCK_TOKENS + first_token);
            }
#pragma unroll
            for (int j = 0; j < KEY_BATCH; ++j) {
                const int row = (start + j) * KEY_ROWS + first_row;
                float k[N];
                for (int e = 0; e < N; ++e) k[e] = read(packs[j].at[e]);
                for (int g = 0; g < GROUP; ++g) {
                    const float query = queries[g][row];
                    for (int e = 0; e < N; ++e) parts[g][e] += query * k[e];
                }
            }
        }
    }
    Pack<LANE_ELEMENTS> packs[VALUE_BATCH];
    const auto load = [&](int start) {
#pragma unroll
        for (int j = 0; j < VALUE_BATCH; ++j) {
            const int token = (start + j) * VALUE_ROWS + value_row;
            // What is not there may be NaN, and zero times NaN is not zero.
            packs[j] = Pack<LANE_ELEMENTS>();
            if (token < tokens) packs[j] = *(const Pack<LANE_ELEMENTS>*)(value + token * HEAD_DIM + value_part);
        }
    };
    // On their way while the scores are brought together.
    load(0);

    // One token a lane: `first_token` and the lane's own row of the rows that the warp reads at once.
    float scores[GROUP], weights[GROUP];
    for (int g = 0; g < GROUP; ++g) {
#if BF16
        halve<8>(parts[g], 16), halve<4>(parts[g], 8), halve<2>(parts[g], 4);
#else
        halve<4>(parts[g], 16), halve<2>(parts[g], 8);
#endif
        scores[g] = parts[g][0];
    }
    weigh_scores(s, scores, first_token + first_row < tokens, weights);
#pragma unroll(BATCHES_UNROLLED)
    for (int start = 0; start < VALUE_LOADS; start += VALUE_BATCH) {
        if (start > 0) load(start);
#pragma unroll
        for (int j = 0; j < VALUE_BATCH; ++j) {
            const int token = (start + j) * VALUE_ROWS + value_row;
            float v[N];
            for (int e = 0; e < N; ++e) v[e] = read(packs[j].at[e]);
            for (int g = 0; g < GROUP; ++g) {
                const float weight = __shfl_sync(EVERY_LANE, weights[g], token % N * KEY_LANES + token / N);
                for (int e = 0; e < N; ++e) s.sums[g][e] += weight * v[e];
            }
        }
    }
}

// Brings the sums of lanes with the same elements together, and says where the lane's begin; HEAD_DIM: nowhere.
__device__ inline int merge_lanes(Softmax& s) {
    const int lane = threadIdx.x % WARP;
    for (int distance = VALUE_LANES; distance < WARP; distance *= 2) {
        for (int g = 0; g < GROUP; ++g)
            for (int p = 0; p < PART; ++p) s.sums[g][p] += __shfl_xor_sync(EVERY_LANE, s.sums[g][p], distance);
    }
    return lane < VALUE_LANES ? lane * PART : HEAD_DIM;
}
#else
// One element a lane: for scores a lane is a token, for sums of values it is a part of the width.
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
    weigh_scores(s, scores, lane < tokens, weights);
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) {
        float v[PART];
        for (int p = 0; p < PART; ++p) {
            const int i = lane * PART + p;
            v[p] = i < HEAD_DIM ? read(value[t * HEAD_DIM + i]) : 0.0f;
        }
        for (int g = 0; g < GROUP; ++g) {
            const float weight = __shfl_sync(EVERY_LANE, weights[g], t);
            for (int p = 0; p < PART; ++p) s.sums[g][p] += weight * v[p];
        }
    }
}

__device__ inline int merge_lanes(Softmax&) { return threadIdx.x % WARP * PART; }
#endif

// q: [B, N, HEAD_DIM], rows `q_stride` elements apart; keys: [P, K, HEAD_DIM, BLOCK_TOKENS], values:
// [P, K, BLOCK_TOKENS, HEAD_DIM] of one layer, both at multiples of 16 bytes; table: the blocks of one row after those of
// the other, those of its prompt first; runs: [B, 4], blocks of the prompt, its tokens, the tokens after it, and where in
// the table the row begins. Grid: rows, key heads times the parts that the query heads of one are computed in, splits of
// the blocks.
//
// With one split the result goes to output, [B, N, HEAD_DIM]. Otherwise every split leaves its unscaled sums in partial,
// [B, N, splits, HEAD_DIM], and its maximum and total in states, [B, N, splits, 2], for combine_splits.
extern "C" __launch_bounds__(WARPS * WARP, BLOCKS_AT_ONCE) __global__ void attend_blocks(
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
    // Read a turn ahead: a block would wait for its place first otherwise.
    long long next = first + warp < end ? table[first + warp] : 0;
    for (int j = first + warp; j < end; j += WARPS) {
        const int left = j < prompt_blocks ? prompt_tokens - j * BLOCK_TOKENS
                                           : own_tokens - (j - prompt_blocks) * BLOCK_TOKENS;
        const size_t start = (size_t)(next * kv_heads + key_head) * HEAD_DIM * BLOCK_TOKENS;
        if (j + WARPS < end) next = table[j + WARPS];
        weigh_block(s, queries, keys + start, values + start, left < BLOCK_TOKENS ? left : BLOCK_TOKENS);
    }
    const int begin = merge_lanes(s);
    for (int g = 0; g < GROUP; ++g) {
        const float total = warp_sum(s.total[g]);
        if (lane == 0) warp_states[warp][g][0] = s.max[g], warp_states[warp][g][1] = total;
        for (int p = 0; p < PART; ++p) {
            if (begin + p < HEAD_DIM) warp_sums[warp][g][begin + p] = s.sums[g][p];
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
