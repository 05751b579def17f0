// What the kernels of a chunk of tokens share: matrix instructions, barriers between copies and products, and the order in
// which activations lie for them.
//
// A `Tiles` buffer holds one f16 vector for each token of a chunk. Vectors are filled up with zeros to a multiple of 128
// values and cut into blocks of 64; a block of all tokens is contiguous:
//
//   half at [column block][token, filled up to a multiple of 8][64]
//
// so that one bulk copy brings a tile of tokens to shared memory as the matrix instructions read it: the 16-byte pieces of
// a token's 128 bytes stand at their index xor (token % 8), which keeps the eight rows of a fragment in different banks.
// Within 128 values the order is that in which a lane decodes packed weights: a product of sums does not care in which
// order it adds. Lane t of four decodes values 16 (t % 2) .. + 15 and 32 + 16 (t % 2) .. + 15 of unit t / 2, four consecutive
// values of each 16 per step of the matrix instruction.
#pragma once

#include "common.cuh"

// Hopper's warpgroup instructions exist on sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUP_MMA 1
#else
#define WARPGROUP_MMA 0
#endif

constexpr int STEP_VALUES = 128;  // columns of one step of a product
constexpr int BLOCK_VALUES = 64;  // columns of one block of a Tiles buffer
constexpr int WARPGROUP = 128;

// Bytes of one step of N tokens in shared memory: two blocks of N tokens x 128 bytes.
template <int N>
constexpr int TOKEN_BYTES = N * STEP_VALUES * 2;

__host__ __device__ constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Places are unsigned: divisions by constants are then shifts.
struct Tiles {
    half *data;
    int tokens;  // rounded up to a multiple of 8

    // Where 16-byte piece `piece` (of 8) of a block of a token starts.
    __device__ __forceinline__ half *piece(unsigned block, unsigned token, unsigned piece) const {
        return data + (size_t(block) * tokens + token) * BLOCK_VALUES + (piece ^ token % 8) * 8;
    }

    // Where values `column` + odd and `column` + odd + 2 stand, side by side. `column` is a multiple of 4.
    __device__ __forceinline__ half2 *pair(unsigned token, unsigned column, unsigned odd) const {
        const unsigned v = column % STEP_VALUES;
        const unsigned lane = v / 64 * 2 + v / 16 % 2, step = v / 4 % 4 * 2 + v / 32 % 2;
        return reinterpret_cast<half2 *>(piece(column / STEP_VALUES * 2 + step / 4, token, step % 4 * 2 + odd) + 2 * lane);
    }

    // Stores values `column` .. + 3.
    __device__ __forceinline__ void store(unsigned token, unsigned column, float4 v) const {
        *pair(token, column, 0) = __floats2half2_rn(v.x, v.z);
        *pair(token, column, 1) = __floats2half2_rn(v.y, v.w);
    }
};

__device__ __forceinline__ uint32_t shared_address(const void *at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// The same value, which all lanes share, from a register of another lane: it is kept, and not computed again wherever it is used.
__device__ __forceinline__ uint32_t keep(uint32_t value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ uint32_t bits(half2 value) { return *reinterpret_cast<const uint32_t *>(&value); }
__device__ __forceinline__ half2 as_half2(uint32_t value) { return *reinterpret_cast<const half2 *>(&value); }

// A barrier in shared memory on which threads wait for copies and arrivals.
struct Barrier {
    uint32_t at;  // address in shared memory, of 8 bytes

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
    }
    // After the last init, by the thread that called it.
    static __device__ __forceinline__ void publish() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
    }
    // Arrives once the calling thread's asynchronous copies so far have.
    __device__ __forceinline__ void arrive_after_copies() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
    }
    // Waits for the end of the phase of this parity.
    __device__ __forceinline__ void wait(int parity) const {
        uint32_t done = 0;
        while (!done) {
#if __CUDA_ARCH__ >= 900
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(at), "r"(parity) : "memory");
#elif __CUDA_ARCH__ >= 800
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(at), "r"(parity) : "memory");
#endif
        }
    }
};

// A value in shared memory.
template <typename T>
__device__ __forceinline__ T load_shared(uint32_t from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t word[sizeof(T) / 4];
    if constexpr (sizeof(T) == 16) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(from) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(from) : "memory");
    } else {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(from) : "memory");
    }
    return *reinterpret_cast<T *>(word);
}

// c += a b for a warp: 16 x 16 (rows of a) times 16 x 8, f16 with f32 sums.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of f16 from shared memory; lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Makes what ordinary accesses wrote to shared memory, as this thread sees it, visible to warpgroup products.
__device__ __forceinline__ void publish_shared() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Keeps the compiler from computing an operand later than here, between products under way.
__device__ __forceinline__ void settle(uint32_t &operand) { asm volatile("" : "+r"(operand)::"memory"); }

#if WARPGROUP_MMA
// Registers and shared memory written before are ready for the products that follow.
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// The descriptor of a matrix in shared memory whose rows of 128 bytes are swizzled as Tiles are (128-byte swizzle, eight
// rows every 1,024 bytes). 16 columns further is + 2.
// Transposed, where rows run along N: further 64 columns stand `block_bytes` on; 16 rows further is + 128.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t block_bytes = 16) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(block_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// c += a b for a warpgroup: 64 x 16 (each warp's 16 rows of a as in `mma`) times 16 x N; c as N / 8 results of `mma`.
// TRANSPOSED: the rows of b in shared memory run along N.
template <int TRANSPOSED = 0>
__device__ __forceinline__ void warpgroup_mma(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, %21;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
          "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANSPOSED));
}

template <int TRANSPOSED = 0>
__device__ __forceinline__ void warpgroup_mma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
          "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
          "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANSPOSED));
}

template <int TRANSPOSED = 0>
__device__ __forceinline__ void warpgroup_mma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
          "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
          "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]),
          "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),
          "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]),
          "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]),
          "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TRANSPOSED));
}
// The same with a in shared memory, and c = a b where `add` is false.
__device__ __forceinline__ void warpgroup_mma(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0; }"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
          "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
          "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
          "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]),
          "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),
          "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]),
          "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]),
          "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
        : "l"(a), "l"(b), "r"(int(add)));
}
#endif

// Moves registers between the warpgroups of a block; every warp of a warpgroup calls it.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
#if WARPGROUP_MMA
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
#if WARPGROUP_MMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Copies `bytes` (a multiple of 16) to `to` in shared memory; `full` counts them. One thread calls it.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *global, int bytes, const Barrier &full) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(global), "r"(bytes), "r"(full.at) : "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(const Barrier &full, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(full.at), "r"(bytes) : "memory");
#endif
}

// Copies BYTES (4, 8 or 16, both sides so aligned) to `to` in shared memory without passing through registers; zeros where `valid`
// is false. AHEAD: what follows is wanted soon; the memory is read in larger pieces than a lane's.
template <int BYTES, bool AHEAD = false>
__device__ __forceinline__ void copy_or_zero(uint32_t to, const void *global, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16 && AHEAD) {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    } else if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes) : "memory");
    }
}

// Ends a group of such copies (it may be empty).
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
