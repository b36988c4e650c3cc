// What follows from the logits of a training pass, and the update of the weights.

// The gradient of one row, over its logits. The logarithm of a probability plus the entropy is the distance of its logit
// from the mean logit.
template <int N>
__device__ inline void write_slopes(
    const float* row, Element* slopes, int vocabulary, Part all, int target, float inverse_temperature, float slope,
    float entropy_slope) {
    const float scale = -slope / all.sum, entropy_scale = -entropy_slope / all.sum, mean = all.moment / all.sum;
    for (int i = threadIdx.x * N; i < vocabulary; i += blockDim.x * N) {
        const Pack<N, float> pack = *(const Pack<N, float>*)(row + i);
        Pack<N> by_logits;
        for (int e = 0; e < N; ++e) {
            const float distance = scaled(pack.at[e], inverse_temperature) - all.max, weight = expf(distance);
            float by_logit = weight * scale;
            // Where nothing is left of the probability nothing is left of the product, however far the logit.
            if (entropy_scale != 0.0f && weight > 0.0f) by_logit += weight * entropy_scale * (distance - mean);
            if (i + e == target) by_logit += slope;
            by_logits.at[e] = write(by_logit);
        }
        *(Pack<N>*)(slopes + i) = by_logits;
    }
}

// Log-prob of the target of every row, and entropy of the row, of softmax(logits * inverse_temperature). With `by_logprob`, d
// loss / d log-prob, and maybe `by_entropy`, d loss / d entropy, the gradient by the logits goes to `slopes`, which may be
// the logits themselves where elements are float32.
//
// logits, slopes: [rows, vocabulary]; all others: [rows]. One block a row. `packed`: as in draw.
extern "C" __global__ void target_scores(
    const float* logits, Element* slopes, const long long* targets, const float* by_logprob, const float* by_entropy,
    float* logprobs, float* entropies, int vocabulary, float inverse_temperature, int packed) {
    const int N = LOGITS, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    __shared__ Part parts[WARP];
    const float* row = logits + (size_t)blockIdx.x * vocabulary;
    const int target = (int)targets[blockIdx.x];
    const float of_target = scaled(row[target], inverse_temperature);
    const int share = ((vocabulary + warps - 1) / warps + N - 1) / N * N, start = warp * share;
    const int end = start + share < vocabulary ? start + share : vocabulary;
    const Part mine = packed ? part_of<N>(row, start, end, inverse_temperature)
                             : part_of<1>(row, start, end, inverse_temperature);
    if (threadIdx.x % WARP == 0) parts[warp] = mine;
    __syncthreads();
    Part all = {MINUS_INFINITY, 0.0f, 0.0f};
    for (int w = 0; w < warps; ++w) all.max = fmaxf(all.max, parts[w].max);
    for (int w = 0; w < warps; ++w) {
        const Part part = rescaled(parts[w], all.max);
        all.sum += part.sum, all.moment += part.moment;
    }
    if (threadIdx.x == 0) {
        logprobs[blockIdx.x] = of_target - all.max - logf(all.sum);
        entropies[blockIdx.x] = logf(all.sum) - all.moment / all.sum;
    }
    if (!by_logprob) return;
    const float slope = by_logprob[blockIdx.x] * inverse_temperature;
    const float entropy_slope = by_entropy ? by_entropy[blockIdx.x] * inverse_temperature : 0.0f;
    slopes += (size_t)blockIdx.x * vocabulary;
    if (packed) write_slopes<N>(row, slopes, vocabulary, all, target, inverse_temperature, slope, entropy_slope);
    else write_slopes<1>(row, slopes, vocabulary, all, target, inverse_temperature, slope, entropy_slope);
}

// AdamW in place. With `compute`, the bfloat16 weights, too, rounded away from zero where what is cut off exceeds the
// threshold of the element, which is `first + i` among all weights.
//
// All buffers: [count].
extern "C" __global__ void adamw(
    float* weights, float* moment1, float* moment2, const float* gradients, unsigned short* compute, long long count,
    long long first, float keep, float beta1, float beta2, float epsilon, float step_size, float root_correction,
    float grad_scale) {
    const long long threads = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
        const float gradient = gradients[i] * grad_scale;
        const float m = beta1 * moment1[i] + (1.0f - beta1) * gradient;
        const float v = beta2 * moment2[i] + (1.0f - beta2) * gradient * gradient;
        const float weight = weights[i] * keep - step_size * (m / (sqrtf(v) * root_correction + epsilon));
        moment1[i] = m, moment2[i] = v, weights[i] = weight;
        if (compute) {
            const unsigned threshold = (unsigned)(first + i) * 0x9e3779b9u >> 16;
            compute[i] = (unsigned short)((__float_as_uint(weight) + threshold) >> 16);
        }
    }
}
