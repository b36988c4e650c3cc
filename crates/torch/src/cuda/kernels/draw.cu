// From logits to tokens: temperature, top-k, top-p, min-p, noise, and the log-prob of what was chosen.
//
// One block a row. The vocabulary is cut into tiles, a warp takes one at a time: their maxima, sums of exponentials and
// sums for the entropy are found in one pass over the logits. The draw inverts the cumulative distribution: first over
// tiles, then over the tokens of one tile. Only filters need more passes: their last token is found bit by bit in
// histograms of weights, never by sorting.
//
// Logits are float32 whatever the elements are: in bfloat16 those between 16 and 32 are 0.125 apart, which is more than
// the log-probs of the learner and of the rollout may differ.
//
// Every sum is taken in an order that depends on the vocabulary alone, and those of a histogram are of integers, so a row's
// token does not depend on its company.

#define MOST_TILES 256
#define BUCKETS 1024
// Weights lie between 0 and 1; as integers they are so many of these. The sum of 2^21 of them fits.
#define UNITS 4398046511104.0f

struct RowOptions {
    unsigned long long noise_key, position;
    double top_p;
    float inverse_temperature, min_p;
    unsigned top_k, padding;
};

struct Drawn {
    long long token;
    float logprob, sampled_logprob, entropy;
    unsigned padding;
};

// What a warp knows of a part of the row: its maximum, and with weights e^(x - max) their sum, and the sum of weights times
// (x - max).
struct Part {
    float max, sum, moment;
};

__device__ inline unsigned long long mix(unsigned long long value) {
    unsigned long long z = value + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The uniform number in [0, 1) that picks the token at a position; the same bits as on the host.
__device__ inline double uniform(unsigned long long key, unsigned long long position) {
    return (double)(mix(key ^ mix(position)) >> 11) / 9007199254740992.0;
}

// The scaled logit; never fused with an addition, so that it has the same bits in every pass.
__device__ inline float scaled(float logit, float inverse_temperature) { return __fmul_rn(logit, inverse_temperature); }

// Logits that a thread reads at once where rows begin at multiples of 16 bytes.
#define LOGITS 4

// Moves a part to a maximum that is no smaller.
__device__ inline Part rescaled(Part part, float max) {
    Part moved = {max, 0.0f, 0.0f};
    if (part.sum > 0.0f) {
        const float by = part.max - max, kept = expf(by);
        moved.sum = part.sum * kept;
        moved.moment = (part.moment + by * part.sum) * kept;
    }
    return moved;
}

template <int N>
__device__ inline Part part_of(const float* row, int start, int end, float inverse_temperature) {
    Part part = {MINUS_INFINITY, 0.0f, 0.0f};
    for (int i = start + threadIdx.x % WARP * N; i < end; i += WARP * N) {
        const Pack<N, float> pack = *(const Pack<N, float>*)(row + i);
        float x[N], max = part.max;
        for (int e = 0; e < N; ++e) {
            x[e] = scaled(pack.at[e], inverse_temperature);
            max = fmaxf(max, x[e]);
        }
        if (max == MINUS_INFINITY) continue;
        if (max > part.max) part = rescaled(part, max);
        for (int e = 0; e < N; ++e) {
            const float weight = expf(x[e] - max);
            part.sum += weight;
            // What has no weight has no logit either.
            if (weight > 0.0f) part.moment += weight * (x[e] - max);
        }
    }
    const float max = warp_max(part.max);
    part = rescaled(part, max);
    return {max, warp_sum(part.sum), warp_sum(part.moment)};
}

// Where a search of ordered sums ended: the first place whose running sum passes the target, and what was left of the
// target there. The place is the number of sums when none does.
struct Found {
    int place;
    double left;
};

// Searches `count` numbers in shared memory; called by one warp, every lane gets the answer.
__device__ inline Found find(const double* sums, int count, double target) {
    const int lane = threadIdx.x % WARP, share = (count + WARP - 1) / WARP;
    const int first = lane * share, end = first + share < count ? first + share : count;
    double mine = 0.0;
    for (int i = first; i < end; ++i) mine += sums[i];
    double until = mine;
    for (int distance = 1; distance < WARP; distance *= 2) {
        const double other = __shfl_up_sync(EVERY_LANE, until, distance);
        if (lane >= distance) until += other;
    }
    const unsigned passed = __ballot_sync(EVERY_LANE, until > target);
    const int owner = passed ? __ffs(passed) - 1 : WARP - 1;
    Found found = {count, 0.0};
    if (passed && lane == owner) {
        double left = target - (until - mine);
        int i = first;
        // The last one of the share is taken when rounding lets none pass.
        while (i + 1 < end && left >= sums[i]) left -= sums[i++];
        found = {i, left};
    }
    found.place = __shfl_sync(EVERY_LANE, found.place, owner);
    found.left = __shfl_sync(EVERY_LANE, found.left, owner);
    return found;
}

// The last token that may be drawn: all that weigh more may, and the first `equal` of those that weigh the same; and the
// number and mass of all that may.
struct Last {
    unsigned bits, equal, count;
    unsigned long long mass;
};

// The mass of a bucket lies in two words: an atomic addition of 64 bits to shared memory is a loop that spins until no other
// thread has come in between, one of 32 bits is a single instruction.
struct Histogram {
    unsigned counts[BUCKETS], low_masses[BUCKETS], high_masses[BUCKETS];
    // What lies before the bucket that was found.
    unsigned bucket, count;
    unsigned long long mass;
};

__device__ inline unsigned long long units(float weight) { return (unsigned long long)(weight * UNITS); }

__device__ inline unsigned long long mass_of(const Histogram& h, int bucket) {
    return (unsigned long long)h.high_masses[bucket] << 32 | h.low_masses[bucket];
}

// Adds one token. Whoever makes the low word run over carries, so the sum is exact in any order.
__device__ inline void count_token(Histogram& h, int bucket, unsigned long long mass) {
    const unsigned low = (unsigned)mass, before = atomicAdd(&h.low_masses[bucket], low);
    const unsigned high = (unsigned)(mass >> 32) + (before + low < before);
    atomicAdd(&h.counts[bucket], 1u);
    if (high != 0) atomicAdd(&h.high_masses[bucket], high);
}

// Whether a set of so many tokens with such a mass is as large as may be.
__device__ inline bool is_full(unsigned count, unsigned long long mass, unsigned most, unsigned long long limit) {
    return count > 0 && (count >= most || mass >= limit);
}

// Finds the bucket, from the heaviest, within which the set becomes full; called by one warp. Bucket BUCKETS: none.
__device__ inline void find_bucket(Histogram& h, unsigned most, unsigned long long limit) {
    const int lane = threadIdx.x % WARP, share = BUCKETS / WARP;
    // Lane 0 has the heaviest buckets.
    const int heaviest = BUCKETS - 1 - lane * share;
    unsigned count = 0;
    unsigned long long mass = 0;
    for (int i = 0; i < share; ++i) count += h.counts[heaviest - i], mass += mass_of(h, heaviest - i);
    unsigned count_until = count;
    unsigned long long mass_until = mass;
    for (int distance = 1; distance < WARP; distance *= 2) {
        const unsigned other_count = __shfl_up_sync(EVERY_LANE, count_until, distance);
        const unsigned long long other_mass = __shfl_up_sync(EVERY_LANE, mass_until, distance);
        if (lane >= distance) count_until += other_count, mass_until += other_mass;
    }
    const unsigned before = h.count;
    const unsigned long long mass_before = h.mass;
    __syncwarp();
    const unsigned full =
        __ballot_sync(EVERY_LANE, is_full(before + count_until, mass_before + mass_until, most, limit));
    const int owner = full ? __ffs(full) - 1 : WARP - 1;
    if (lane != owner) return;
    count = before + count_until - (full ? count : 0), mass = mass_before + mass_until - (full ? mass : 0);
    int bucket = full ? heaviest : BUCKETS;
    if (full) {
        while (!is_full(count + h.counts[bucket], mass + mass_of(h, bucket), most, limit)) {
            count += h.counts[bucket], mass += mass_of(h, bucket);
            --bucket;
        }
    }
    h.bucket = bucket, h.count = count, h.mass = mass;
}

// The longest prefix of the ranking by weight, equal ones by index, whose members all come before the set is full.
__device__ inline Last prefix(
    Histogram& h, const float* row, int vocabulary, float inverse_temperature, float max, unsigned most,
    unsigned long long limit) {
    unsigned bits = 0;
    if (threadIdx.x == 0) h.count = 0, h.mass = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        for (int i = threadIdx.x; i < BUCKETS; i += blockDim.x) h.counts[i] = h.low_masses[i] = h.high_masses[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
            const float weight = expf(scaled(row[i], inverse_temperature) - max);
            const unsigned found = __float_as_uint(weight);
            if (found == 0 || (shift < 20 && found >> (shift + 10) != bits)) continue;
            count_token(h, (found >> shift) % BUCKETS, units(weight));
        }
        __syncthreads();
        if (threadIdx.x < WARP) find_bucket(h, most, limit);
        __syncthreads();
        if (h.bucket == BUCKETS) {
            const Last all = {0, 0, h.count, h.mass};
            __syncthreads();
            return all;
        }
        bits = bits << 10 | h.bucket;
    }
    Last last = {bits, h.counts[h.bucket], h.count, h.mass};
    const unsigned long long each = units(__uint_as_float(bits));
    // As many of these equals as it takes; the set was not full before them.
    if (most - last.count < last.equal) last.equal = most - last.count;
    if (limit > last.mass && each > 0) {
        const unsigned long long enough = (limit - last.mass - 1) / each + 1;
        if (enough < last.equal) last.equal = (unsigned)enough;
    }
    if (limit <= last.mass) last.equal = 1;
    last.count += last.equal, last.mass += last.equal * each;
    __syncthreads();
    return last;
}

// logits: [B, vocabulary]; options, drawn: one a row. `tile`: tokens of a tile, a multiple of 256, so that there are no
// more than MOST_TILES. `packed`: rows begin at multiples of 16 bytes.
extern "C" __global__ void draw(
    const float* logits, const RowOptions* options, Drawn* drawn, int vocabulary, int tile, int packed) {
    __shared__ float tile_max[MOST_TILES], tile_sum[MOST_TILES], tile_moment[MOST_TILES];
    __shared__ double masses[MOST_TILES];
    __shared__ unsigned equals[MOST_TILES];
    __shared__ double total_sum, total_moment, kept_sum;
    __shared__ Histogram histogram;
    const RowOptions o = options[blockIdx.x];
    const float* row = logits + (size_t)blockIdx.x * vocabulary;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int tiles = (vocabulary + tile - 1) / tile;
    const float inverse = o.inverse_temperature;

    for (int t = warp; t < tiles; t += warps) {
        const int start = t * tile, end = start + tile < vocabulary ? start + tile : vocabulary;
        const Part part = packed ? part_of<LOGITS>(row, start, end, inverse) : part_of<1>(row, start, end, inverse);
        if (lane == 0) tile_max[t] = part.max, tile_sum[t] = part.sum, tile_moment[t] = part.moment;
    }
    __syncthreads();
    float max = MINUS_INFINITY;
    for (int t = lane; t < tiles; t += WARP) max = fmaxf(max, tile_max[t]);
    max = warp_max(max);
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
        const Part part = rescaled({tile_max[t], tile_sum[t], tile_moment[t]}, max);
        masses[t] = part.sum;
        tile_moment[t] = part.moment;
        equals[t] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        total_sum = 0.0, total_moment = 0.0;
        for (int t = 0; t < tiles; ++t) total_sum += masses[t], total_moment += tile_moment[t];
        kept_sum = total_sum;
    }
    __syncthreads();

    Last last = {0, 0, 0xffffffffu, 0};
    const bool cuts = o.top_k != 0 || o.top_p < 1.0 || o.min_p > 0.0f;
    if (o.top_k != 0 || o.top_p < 1.0) {
        last = prefix(histogram, row, vocabulary, inverse, max, o.top_k ? o.top_k : 0xffffffffu, ~0ull);
        if (o.top_p < 1.0) {
            const unsigned long long limit = (unsigned long long)ceil(o.top_p * (double)last.mass);
            last = prefix(histogram, row, vocabulary, inverse, max, last.count, limit);
        }
    }
    const float last_weight = __uint_as_float(last.bits);
    const unsigned equal = last_weight >= o.min_p ? last.equal : 0;
    if (cuts) {
        for (int t = warp; t < tiles; t += warps) {
            const int start = t * tile, end = start + tile < vocabulary ? start + tile : vocabulary;
            float sum = 0.0f;
            unsigned same = 0;
            for (int base = start; base < end; base += WARP) {
                const int i = base + lane;
                const float weight = i < end ? expf(scaled(row[i], inverse) - max) : 0.0f;
                if (weight > last_weight && weight >= o.min_p) sum += weight;
                same += __popc(__ballot_sync(EVERY_LANE, weight > 0.0f && weight == last_weight));
            }
            sum = warp_sum(sum);
            if (lane == 0) masses[t] = sum, equals[t] = same;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned before = 0;
            kept_sum = 0.0;
            for (int t = 0; t < tiles; ++t) {
                // From here on: how many equals come before the tile.
                const unsigned same = equals[t], room = equal > before ? equal - before : 0;
                equals[t] = before;
                before += same;
                masses[t] += (double)last_weight * (same < room ? same : room);
                kept_sum += masses[t];
            }
        }
        __syncthreads();
    }
    if (warp != 0) return;

    Found found = find(masses, tiles, uniform(o.noise_key, o.position) * kept_sum);
    // Rounding may put the target on the very end: then it is the last tile that has any mass.
    if (found.place >= tiles) found = {tiles - 1, kept_sum};
    while (found.place > 0 && !(masses[found.place] > 0.0)) found = {found.place - 1, kept_sum};
    const int start = found.place * tile, end = start + tile < vocabulary ? start + tile : vocabulary;
    unsigned before = equals[found.place];
    double left = found.left;
    int token = -1, possible = start;
    for (int base = start; base < end && token < 0; base += WARP) {
        const int i = base + lane;
        float weight = i < end ? expf(scaled(row[i], inverse) - max) : 0.0f;
        if (cuts) {
            const unsigned same = __ballot_sync(EVERY_LANE, weight > 0.0f && weight == last_weight);
            const unsigned rank = before + __popc(same & ((1u << lane) - 1));
            const bool stays = weight > last_weight || (weight == last_weight && rank < equal);
            if (!stays || weight < o.min_p) weight = 0.0f;
            before += __popc(same);
        }
        double until = weight;
        for (int distance = 1; distance < WARP; distance *= 2) {
            const double other = __shfl_up_sync(EVERY_LANE, until, distance);
            if (lane >= distance) until += other;
        }
        const unsigned some = __ballot_sync(EVERY_LANE, weight > 0.0f);
        const unsigned passed = __ballot_sync(EVERY_LANE, weight > 0.0f && until > left);
        if (passed) token = base + __ffs(passed) - 1;
        if (some) possible = base + 31 - __clz(some);
        left -= __shfl_sync(EVERY_LANE, until, WARP - 1);
    }
    if (token < 0) token = possible;
    if (lane != 0) return;
    const double distance = (double)scaled(row[token], inverse) - (double)max, log_total = log(total_sum);
    Drawn result;
    result.token = token;
    result.logprob = (float)(distance - log_total);
    result.sampled_logprob = (float)(distance - log(kept_sum));
    result.entropy = (float)(log_total - total_moment / total_sum);
    result.padding = 0;
    drawn[blockIdx.x] = result;
}
