// Selection by magnitude and update of weights on B, for NVRTC: no header is needed.
//
// VALUE_BITS is the width of a weight: 16 (IEEE half), 32 (float), 64 (double), or 8 for a mask.
// INDEX_BITS is the width of flat indices: 32, or 64 for tensors of 2^31 entries and more.
// Non-negative floats have the order of their bit patterns, so that selection works on integers and
// never does arithmetic on weights. tests/cuda_passes.py implements the same passes in NumPy, for
// tests without a GPU; keep both in agreement. All scalars have 64 bits, as in Python.

typedef long long int64;
typedef unsigned long long uint64;

#if INDEX_BITS == 64
typedef int64 Index;
#else
typedef int Index;
#endif

#if VALUE_BITS == 64
typedef uint64 Key;
typedef double Value;
typedef double Real;
#define MAGNITUDE 0x7fffffffffffffffULL
#define NOT_FINITE 0x7ff0000000000000ULL
#elif VALUE_BITS == 32
typedef unsigned int Key;
typedef float Value;
typedef float Real;
#define MAGNITUDE 0x7fffffffU
#define NOT_FINITE 0x7f800000U
#elif VALUE_BITS == 16
typedef unsigned short Key;
typedef unsigned short Value;
typedef float Real;
#define MAGNITUDE 0x7fffU
#define NOT_FINITE 0x7c00U
#elif VALUE_BITS == 8
typedef unsigned char Key;
#define MAGNITUDE 0xffU
#define NOT_FINITE 0x100U
#else
#error "VALUE_BITS must be 8, 16, 32 or 64"
#endif

// _module.py defines THREADS, the threads of a block; TILE, the consecutive entries that a block
// counts or collects; and MAX_BINS, the bins of a histogram.
#define WARP 32

// The state that passes share.
struct State {
    uint64 key;        // known leading digits of the k-th largest magnitude's key
    int64 rank;        // its rank, from 1, among keys with these digits; finally, ties to take
    int64 non_finite;  // number of entries that are NaN or infinite
};

// Count the digits in bits [shift, shift + bits) of the keys that start with the known digits.
extern "C" __global__ void histogram(
    const Key* values, int64 size, int64 shift, int64 bits, int64 first, State* state,
    uint64* counts
) {
    __shared__ unsigned int local_counts[MAX_BINS];
    int bins = 1 << bits;
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) local_counts[bin] = 0;
    __syncthreads();
    uint64 prefix = state->key >> (shift + bits);
    int64 step = (int64)gridDim.x * blockDim.x;
    int last = -1;
    unsigned int run = 0, non_finite = 0;
    for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        Key key = values[i] & MAGNITUDE;
        non_finite += key >= NOT_FINITE;
        if (!first && (uint64)key >> (shift + bits) != prefix) continue;
        int digit = (int)((uint64)key >> shift) & (bins - 1);
        // Runs of equal digits, mostly of zeros, are added at once to avoid contention.
        if (digit == last) {
            ++run;
            continue;
        }
        if (run) atomicAdd(&local_counts[last], run);
        last = digit;
        run = 1;
    }
    if (run) atomicAdd(&local_counts[last], run);
    if (first && non_finite) atomicAdd((uint64*)&state->non_finite, (uint64)non_finite);
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x)
        if (local_counts[bin]) atomicAdd(&counts[bin], (uint64)local_counts[bin]);
}

// Find the next digit of the k-th largest key, and its rank among keys with this digit. One block.
extern "C" __global__ void choose(int64 shift, int64 bits, State* state, uint64* counts) {
    __shared__ int64 sums[THREADS];
    int bins = 1 << bits;
    int share = (bins + THREADS - 1) / THREADS;
    int top = bins - (int)threadIdx.x * share;  // thread 0 has the largest digits
    int64 sum = 0;
    for (int bin = top - 1; bin >= top - share && bin >= 0; --bin) sum += (int64)counts[bin];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int64 rank = state->rank;
        int thread = 0;
        while (thread < THREADS - 1 && sums[thread] < rank) rank -= sums[thread++];
        int bin = bins - thread * share - 1;
        while (bin > 0 && (int64)counts[bin] < rank) rank -= (int64)counts[bin--];
        state->key |= (uint64)bin << shift;
        state->rank = rank;
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = 0;
}

// Count the entries above the threshold and at it in each tile.
extern "C" __global__ void count(
    const Key* values, int64 size, const State* state, int64* above, int64* ties
) {
    __shared__ unsigned int tile_above, tile_ties;
    if (threadIdx.x == 0) tile_above = tile_ties = 0;
    __syncthreads();
    Key threshold = (Key)state->key;
    int64 start = (int64)blockIdx.x * TILE;
    unsigned int my_above = 0, my_ties = 0;
    for (int offset = threadIdx.x; offset < TILE && start + offset < size; offset += blockDim.x) {
        Key key = values[start + offset] & MAGNITUDE;
        my_above += key > threshold;
        my_ties += key == threshold;
    }
    if (my_above) atomicAdd(&tile_above, my_above);
    if (my_ties) atomicAdd(&tile_ties, my_ties);
    __syncthreads();
    if (threadIdx.x == 0) {
        above[blockIdx.x] = tile_above;
        ties[blockIdx.x] = tile_ties;
    }
}

// Write ascending indices, or flags, of the selected entries: all above the threshold, and the first
// ones at it. `above` and `ties` are running sums over the tiles.
extern "C" __global__ void collect(
    const Key* values, int64 size, const State* state, const int64* above, const int64* ties,
    Index* indices, unsigned char* flags
) {
    __shared__ unsigned int warps_above[THREADS / WARP], warps_ties[THREADS / WARP];
    Key threshold = (Key)state->key;
    int64 max_ties = state->rank;
    int64 before_above = blockIdx.x ? above[blockIdx.x - 1] : 0;
    int64 before_ties = blockIdx.x ? ties[blockIdx.x - 1] : 0;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned int lower = (1U << lane) - 1;
    int64 start = (int64)blockIdx.x * TILE;
    for (int strip = 0; strip < TILE && start + strip < size; strip += THREADS) {
        int64 i = start + strip + threadIdx.x;
        bool inside = i < size;
        Key key = inside ? (Key)(values[i] & MAGNITUDE) : (Key)0;
        bool is_above = inside && key > threshold, is_tie = inside && key == threshold;
        unsigned int bits_above = __ballot_sync(0xffffffffU, is_above);
        unsigned int bits_ties = __ballot_sync(0xffffffffU, is_tie);
        if (lane == 0) {
            warps_above[warp] = __popc(bits_above);
            warps_ties[warp] = __popc(bits_ties);
        }
        __syncthreads();
        int64 my_above = before_above + __popc(bits_above & lower);
        int64 my_ties = before_ties + __popc(bits_ties & lower);
        for (int other = 0; other < THREADS / WARP; ++other) {
            before_above += warps_above[other];
            before_ties += warps_ties[other];
            if (other < warp) {
                my_above += warps_above[other];
                my_ties += warps_ties[other];
            }
        }
        bool selected = is_above || (is_tie && my_ties < max_ties);
        int64 position = my_above + (my_ties < max_ties ? my_ties : max_ties);
        if (selected && indices) indices[position] = (Index)i;
        if (inside && flags) flags[i] = selected;
        __syncthreads();
    }
}

// Write values (count,) at indices into a vector.
extern "C" __global__ void scatter(
    const Index* indices, const Key* values, int64 count, Key* out
) {
    int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 k = (int64)blockIdx.x * blockDim.x + threadIdx.x; k < count; k += step)
        out[indices[k]] = values[k];
}

#if VALUE_BITS >= 16

#if VALUE_BITS == 16
// Conversions of IEEE half, rounding to nearest even.
__device__ inline Real load(Value half) {
    unsigned int sign = (unsigned int)(half & 0x8000U) << 16, magnitude = half & 0x7fffU, bits;
    if (magnitude >= 0x7c00U) {
        bits = sign | 0x7f800000U | (magnitude & 0x3ffU) << 13;
    } else if (magnitude >= 0x400U) {
        bits = sign | ((magnitude << 13) + 0x38000000U);
    } else {  // zero and subnormal: multiples of 2^-24
        float scaled = (float)magnitude * 5.9604644775390625e-8f;
        return sign ? -scaled : scaled;
    }
    return __uint_as_float(bits);
}

__device__ inline Value store(Real value) {
    unsigned int bits = __float_as_uint(value), sign = bits >> 16 & 0x8000U;
    bits &= 0x7fffffffU;
    if (bits > 0x7f800000U) return (Value)(sign | 0x7e00U);
    if (bits >= 0x477ff000U) return (Value)(sign | 0x7c00U);  // rounds to infinity
    if (bits < 0x38800000U) {  // subnormal: adding 0.5 puts the digits to be kept at the end
        unsigned int rounded = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000U;
        return (Value)(sign | rounded);
    }
    bits += 0xfffU + (bits >> 13 & 1U);
    return (Value)(sign | (bits - 0x38000000U) >> 13);
}
#else
__device__ inline Real load(Value value) { return value; }
__device__ inline Value store(Real value) { return value; }
#endif

// An entry of B: its weight, the sum of the gradients of loss and penalty, and whether it moves.
// `on_active` and `on_exploring` are the penalty's coefficients on A and on the rest of B.
struct Entry {
    Real value, gradient;
    bool moves;
};

__device__ inline Entry read(
    Value param, Value gradient, bool active, double on_active, double on_exploring, int64 l1,
    int64 exploring
) {
    Real value = load(param);
    Real factor = (Real)(active ? on_active : on_exploring);
    Real direction = l1 ? (Real)((value > 0) - (value < 0)) : value;
    bool moves = exploring || active;
    return {value, moves ? load(gradient) + factor * direction : (Real)0, moves};
}

// The rules read and write dense params (a copy) and read dense gradients at the indices of B. Their
// state, old and new, is a vector over B. B has `count` indices, the first `forward` of which are A;
// unless `exploring`, the others do not move.
extern "C" __global__ void sgd(
    const Index* indices, int64 forward, int64 count, double on_active, double on_exploring, int64 l1,
    int64 exploring, Value* params, const Value* gradients,
    const Value* velocity, Value* new_velocity, const double* lr, double momentum, int64 nesterov,
    double weight_decay
) {
    int64 step = (int64)gridDim.x * blockDim.x;
    Real rate = (Real)*lr, factor = (Real)momentum;
    for (int64 k = (int64)blockIdx.x * blockDim.x + threadIdx.x; k < count; k += step) {
        int64 i = indices[k];
        Entry entry =
            read(params[i], gradients[i], k < forward, on_active, on_exploring, l1, exploring);
        Real gradient = entry.gradient + (Real)weight_decay * entry.value;
        if (velocity) {
            Real next_velocity = load(velocity[k]) * factor + gradient;
            new_velocity[k] = store(next_velocity);
            gradient = nesterov ? gradient + next_velocity * factor : next_velocity;
        }
        if (entry.moves) params[i] = store(entry.value - rate * gradient);
    }
}

// `scale` is the learning rate over the mean's bias correction, and `root` the square root of the
// square's. If an entry's age is below `limit`, its displacement is scaled by factors[age + 1] over
// the factor of the number of updates; other displacements keep their bits.
extern "C" __global__ void adam(
    const Index* indices, int64 forward, int64 count, double on_active, double on_exploring, int64 l1,
    int64 exploring, Value* params, const Value* gradients,
    const Value* mean, Value* new_mean, const Value* square, Value* new_square, const short* ages,
    int64 limit, const double* factors, const double* factor, const double* lr, const double* scale,
    const double* root, double beta1, double beta2, double eps, double weight_decay, int64 decoupled
) {
    int64 step = (int64)gridDim.x * blockDim.x;
    Real keep_mean = (Real)beta1, keep_square = (Real)beta2;
    Real add_mean = (Real)(1 - beta1), add_square = (Real)(1 - beta2);
    Real rate = (Real)*scale, shrink = (Real)(*lr * weight_decay), divisor = (Real)*root;
    for (int64 k = (int64)blockIdx.x * blockDim.x + threadIdx.x; k < count; k += step) {
        int64 i = indices[k];
        Entry entry =
            read(params[i], gradients[i], k < forward, on_active, on_exploring, l1, exploring);
        Real gradient = entry.gradient;
        if (!decoupled) gradient = entry.gradient + (Real)weight_decay * entry.value;
        Real next_mean = load(mean[k]) * keep_mean + gradient * add_mean;
        Real next_square = load(square[k]) * keep_square + gradient * gradient * add_square;
        new_mean[k] = store(next_mean);
        new_square[k] = store(next_square);
        Real next = entry.value - rate * (next_mean / (sqrt(next_square) / divisor + (Real)eps));
        if (decoupled) next -= shrink * entry.value;
        if (ages && ages[k] < limit)
            next = entry.value + (next - entry.value) * (Real)(factors[ages[k] + 1] / *factor);
        if (entry.moves) params[i] = store(next);
    }
}

#endif
