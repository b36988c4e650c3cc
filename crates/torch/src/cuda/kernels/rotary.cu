// Norms of heads, rotary position embedding, and the way of new keys and values into the cache.

#define HALF (HEAD_DIM / 2)
#define PAIRS ((HALF + WARP - 1) / WARP)

// projected: [T, N + 2 K, HEAD_DIM], queries, keys, values; q_norm, k_norm: [HEAD_DIM] or null; cos, sin: [T, HALF]
// float32; slots: [T, 2], block and place of each token; keys: [P, K, HEAD_DIM, BLOCK_TOKENS], values:
// [P, K, BLOCK_TOKENS, HEAD_DIM] of one layer. Writes rotated queries [T, N, HEAD_DIM] to q and rotated keys
// [T, K, HEAD_DIM] to k, the latter for whoever attends to them without the cache. One block a token, one warp a head.
extern "C" __global__ void rotate_store(
    const Element* projected, const Element* q_norm, const Element* k_norm, const float* cos, const float* sin,
    const int* slots, Element* q, Element* k, Element* keys, Element* values, int heads, int kv_heads, float epsilon) {
    const int token = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int every = heads + 2 * kv_heads;
    const long long block = slots[2 * token];
    const int place = slots[2 * token + 1];
    cos += (size_t)token * HALF, sin += (size_t)token * HALF;
    for (int head = warp; head < every; head += warps) {
        const Element* from = projected + ((size_t)token * every + head) * HEAD_DIM;
        if (head >= heads + kv_heads) {
            Element* value = values + ((block * kv_heads + head - heads - kv_heads) * BLOCK_TOKENS + place) * HEAD_DIM;
            for (int i = lane; i < HEAD_DIM; i += WARP) value[i] = from[i];
            continue;
        }
        float low[PAIRS], high[PAIRS], squares = 0.0f;
        for (int p = 0; p < PAIRS; ++p) {
            const int i = lane + p * WARP;
            low[p] = i < HALF ? read(from[i]) : 0.0f;
            high[p] = i < HALF ? read(from[i + HALF]) : 0.0f;
            squares += low[p] * low[p] + high[p] * high[p];
        }
        const Element* norm = head < heads ? q_norm : k_norm;
        if (norm) {
            const float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + epsilon);
            for (int p = 0; p < PAIRS; ++p) {
                const int i = lane + p * WARP;
                if (i >= HALF) continue;
                // Rounded where the learner rounds: between norm and rotation.
                low[p] = read(write(low[p] * scale * read(norm[i])));
                high[p] = read(write(high[p] * scale * read(norm[i + HALF])));
            }
        }
        const int key_head = head - heads;
        Element* to = head < heads ? q + ((size_t)token * heads + head) * HEAD_DIM
                                   : k + ((size_t)token * kv_heads + key_head) * HEAD_DIM;
        Element* column = keys + (block * kv_heads + key_head) * HEAD_DIM * BLOCK_TOKENS + place;
        for (int p = 0; p < PAIRS; ++p) {
            const int i = lane + p * WARP;
            if (i >= HALF) continue;
            const Element first = write(low[p] * cos[i] - high[p] * sin[i]);
            const Element second = write(high[p] * cos[i] + low[p] * sin[i]);
            to[i] = first;
            to[i + HALF] = second;
            if (head >= heads) {
                column[(size_t)i * BLOCK_TOKENS] = first;
                column[(size_t)(i + HALF) * BLOCK_TOKENS] = second;
            }
        }
    }
}
