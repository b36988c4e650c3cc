// What all kernels share. The text before it defines BF16 (0 or 1), HEAD_DIM and GROUP.
//
// Elements are bfloat16 or float32, and everything is computed in float32. bfloat16 is taken apart by hand, so that no
// header is needed where the kernels are compiled.

#define WARP 32
#define EVERY_LANE 0xffffffffu
// Tokens of a block of the cache.
#define BLOCK_TOKENS 32
#define MINUS_INFINITY __uint_as_float(0xff800000u)

#if BF16
struct Element {
    unsigned short bits;
};

__device__ inline float read(Element x) { return __uint_as_float((unsigned)x.bits << 16); }

// Rounds to the nearest, ties to even.
__device__ inline Element write(float value) {
    unsigned bits = __float_as_uint(value);
    Element rounded;
    rounded.bits = value != value ? 0x7fc0 : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return rounded;
}
#else
typedef float Element;

__device__ inline float read(Element x) { return x; }
__device__ inline Element write(float value) { return value; }
#endif

// Elements that one thread reads at once.
template <int N, class T = Element>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

__device__ inline float warp_sum(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(EVERY_LANE, x, distance);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(EVERY_LANE, x, distance));
    return x;
}

// Sum over the threads of a block, whose number is a multiple of a warp; every thread gets the same bits.
__device__ inline float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
