// The products of the step kernel: y[r] = sum over c of W[r, c] * a[c], with what comes before and behind, to the same
// bits as gemv.cuh computes them: the same tiles, the same lanes, partial sums added in the same order.
#pragma once

#include "../types/all.cuh"
#include "packet.cuh"
#include "ring.cuh"

namespace step {

enum StepKind { EMBED, QKV, ATTEND, ADD_TO_HIDDEN, GATE, GATE_INPUTS, LOGITS };

// How a matrix is cut along its columns.
struct Slices {
    int units, count;
    uint32_t inverse;  // of `count`

    __device__ __forceinline__ explicit Slices(const StepProduct &stage)
        : units(unit_count(stage.columns)),
          count(stage.slices),
          inverse(stage.slices_inverse) {}

    // The row pair that a tile belongs to.
    __device__ __forceinline__ int pair_of(int tile) const { return count == 1 ? tile : __umulhi(tile, inverse); }
};

// Bytes of a row of floats that lie together in an entry, where two rows do not fit into one.
constexpr int FLOAT_PIECE = SLOT_BYTES / 2 / FLOAT_ROUND * FLOAT_ROUND;

// Asks for rows of floats of which two do not fit into an entry: of a row for each warp the first pieces, two of them
// an entry, then the second ones, so that what a warp waits for comes in turn.
__device__ __forceinline__ void stream_pieces(Producer &producer, const StepMatrix &matrix) {
    const int stride = matrix.entry_bytes;
    for (int first = 0; first < matrix.rows; first += CONSUMERS) {
        for (int at = 0; at < stride; at += FLOAT_PIECE) {
            const int bytes = min(stride - at, FLOAT_PIECE);
            for (int row = first; row < min(first + CONSUMERS, matrix.rows); row += 2) {
                const uint8_t *from = matrix.weights + size_t(row) * stride + at;
                const bool both = row + 1 < matrix.rows;
                producer.begin(both ? 2 * bytes : bytes);
                producer.copy(0, from, bytes);
                if (both) producer.copy(FLOAT_PIECE, from + stride, bytes);
                producer.end();
            }
        }
    }
}

// Asks for a block's share of a matrix, entry by entry.
__device__ __forceinline__ void stream(Producer &producer, const StepMatrix &matrix, const Slices &slices) {
    if (matrix.entry_tiles == 0) return stream_pieces(producer, matrix);
    const uint8_t *from = matrix.weights;
    const int entry_tiles = matrix.entry_tiles, entry_bytes = matrix.entry_bytes, lacking = matrix.lacking;
    int tile = 0;
    for (int left = matrix.bytes; left > 0;) {
        int bytes = entry_bytes;
        if (lacking > 0) {
            bytes -= (slices.pair_of(tile + entry_tiles) - slices.pair_of(tile)) * lacking;
            tile += entry_tiles;
        }
        bytes = min(left, bytes);
        producer.begin(bytes);
        producer.copy(0, from, bytes);
        producer.end();
        from += bytes;
        left -= bytes;
    }
}

// A thread that consumes, and how far its warp is.
struct Consumer {
    int thread, warp, lane;
    uint32_t epoch;   // of what the stage reads
    int entries = 0;  // of the ring, of all stages before
    int turn = 0;     // the warp that takes the next tile

    // A stage.
    __device__ __forceinline__ void begin() {
        thread = this_thread();
        warp = warp_uniform(thread / WARP);
        lane = thread % WARP;
    }
    // A part of a stage, where heads of D values need all registers.
    template <int D>
    __device__ __forceinline__ void begin() {
        if (D > 128) begin();
    }
    // For what the stage reads, and the epoch of what it writes.
    __device__ __forceinline__ Wait wait() const { return {epoch}; }
    __device__ __forceinline__ uint32_t now() const { return epoch + 1; }
    // The first of the things that come next, in turn, which is this warp's.
    __device__ __forceinline__ int first() const { return warp >= turn ? warp - turn : warp - turn + CONSUMERS; }
    __device__ __forceinline__ void pass(int things, int in_entries) {
        turn = (turn + things) % CONSUMERS;
        entries += in_entries;
    }
};

// Tiles of an entry of the ring.
template <typename Layout>
constexpr int ENTRY_TILES =
    SLOT_BYTES / Layout::tile_bytes(SLICE_UNITS) < SHARES ? SLOT_BYTES / Layout::tile_bytes(SLICE_UNITS) : SHARES;

// What `gather` has brought of unit `unit`.
__device__ __forceinline__ void load_unit(const StepParams &p, int unit, int4 (&q)[4], float (&scale)[2]) {
    // Two groups of an odd number of words: lanes that read pairs of words do so from different banks.
    uint32_t word[2 * GROUP_WORDS];
#pragma unroll
    for (int i = 0; i < GROUP_WORDS; i++) {
        const uint2 pair = shared_at<const uint2>(p.vector)[unit * GROUP_WORDS + i];
        word[2 * i] = pair.x, word[2 * i + 1] = pair.y;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t *piece = word + i / 2 * GROUP_WORDS + i % 2 * 4;
        q[i] = int4{int(piece[0]), int(piece[1]), int(piece[2]), int(piece[3])};
    }
#pragma unroll
    for (int i = 0; i < 2; i++) scale[i] = __uint_as_float(word[i * GROUP_WORDS + SCALE_WORD]);
}

// The products of a tile's two rows.
template <typename Type>
__device__ __forceinline__ float2 dots(const uint8_t *weights, int n, int lane, const typename Type::Activations &a) {
    return {Type::dot(weights, n, 0, lane, a), Type::dot(weights, n, 1, lane, a)};
}

// partial[s][i] of the rows i of a block's share, `pitch` values from one slice to the next.
template <typename Type>
__device__ __forceinline__ void multiply(const StepParams &p, Consumer &consumer, const Slices &slices,
                                         const StepMatrix &matrix, int partial, int pitch) {
    using Layout = typename Type::Layout;
    constexpr int TILES = ENTRY_TILES<Layout>;
    const int tiles = matrix.pairs * slices.count, lacking = matrix.lacking, warp_lane = consumer.lane;
    // A single tile of a short row is shorter.
    const int tile_bytes = Layout::tile_bytes(min(slices.units, SLICE_UNITS));
    const int first = consumer.first();
    const int pair = slices.pair_of(first), pair_step = slices.pair_of(CONSUMERS);
    const int slice_step = CONSUMERS - pair_step * slices.count;
    int slice = first - pair * slices.count;
    // Where the sums go, and how far to the next, whose slice is `slice_step` on, or so many back in the next pair.
    float *sums = shared_at<float>(partial) + slice * pitch + pair * TILE_ROWS + warp_lane / 16;
    const int sums_step = slice_step * pitch + pair_step * TILE_ROWS, next_pair = TILE_ROWS - slices.count * pitch;
    int tile = first % TILES;  // of its entry
    Place place = Ring::place(p, consumer.entries + first / TILES);
    typename Type::Activations a = {};  // or it would be kept from one call to the next
    int held = -1, n = 0, lane = 0;
#pragma unroll 1
    for (int i = first; i < tiles; i += CONSUMERS) {
        if (slice != held) {
            n = min(slices.units - slice * SLICE_UNITS, SLICE_UNITS);
            lane = min(warp_lane, n - 1);  // lanes without a unit multiply another's by zero
            int4 q[4];
            float scale[2];
            load_unit(p, slice * SLICE_UNITS + lane, q, scale);
            if (warp_lane >= n) {
#pragma unroll
                for (int4 &piece : q) piece = int4{};
            }
            a.prepare(q, scale[0], scale[1]);
            held = slice;
        }
        int offset = tile * tile_bytes;
        if (lacking > 0) offset -= (slices.pair_of(i) - slices.pair_of(i - tile)) * lacking;
        const uint8_t *weights = Ring::entry(place) + offset;
        Ring::wait(place);
        // Where nothing lacks, all places in the tile are constants.
        const float2 both =
            n == SLICE_UNITS ? dots<Type>(weights, SLICE_UNITS, warp_lane, a) : dots<Type>(weights, n, lane, a);
        const bool upper = warp_lane & 16;
        float sum = (upper ? both.y : both.x) + __shfl_xor_sync(~0u, upper ? both.x : both.y, 16);
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (warp_lane % 16 == 0) *sums = sum;
        // Behind a store of what all lanes' reads of the tile have led to: so they have ended. The last tile of an
        // entry stands for those that it lacks.
        if (elect()) Ring::release(place, tile == TILES - 1 ? SHARES - tile : 1);
        slice = min(uint32_t(slice + slice_step), uint32_t(slice + slice_step - slices.count));
        sums += slice < slice_step ? sums_step + next_pair : sums_step;
        int entries = CONSUMERS / TILES;
        if constexpr (CONSUMERS % TILES > 0) {
            tile += CONSUMERS % TILES;
            if (tile >= TILES) tile -= TILES, entries++;
        }
        Ring::advance(p, place, entries);
    }
    const int entries = (tiles + TILES - 1) / TILES, lacking_tiles = entries * TILES - tiles;
    if (lacking_tiles > 0 && (tiles - 1 - first) % CONSUMERS == 0 && elect()) {
        Ring::release(Ring::place(p, consumer.entries + entries - 1), SHARES - TILES + lacking_tiles);
    }
    consumer.pass(tiles, entries);
}

// Rows of floats have one slice. Several are an entry of the ring, or pieces of two are.
template <typename Type>
__device__ __forceinline__ void float_multiply(const StepParams &p, Consumer &consumer, const StepMatrix &matrix,
                                               const StepProduct &stage, int partial) {
    using Value = typename Type::Value;
    constexpr int PIECE = FLOAT_PIECE / int(sizeof(Value));
    const int columns = stage.columns, rows = matrix.rows, stride = Type::stride(columns);
    const int in_entry = matrix.entry_tiles, pieces = in_entry ? 1 : (stride + FLOAT_PIECE - 1) / FLOAT_PIECE;
    const float *a = shared_at<const float>(stage.unquantized);
#pragma unroll 1
    for (int i = consumer.first(); i < rows; i += CONSUMERS) {
        float sum = 0.f;
#pragma unroll 1
        for (int k = 0; k < pieces; k++) {
            int entry, offset, shares, end = columns;
            if (in_entry) {
                const int row = i % in_entry;
                entry = i / in_entry, offset = row * stride;
                // The last row of an entry stands for those that it lacks.
                shares = row == in_entry - 1 || i == rows - 1 ? SHARES - row : 1;
            } else {
                const int turn = i % CONSUMERS, first = i - turn, together = min(rows - first, CONSUMERS);
                entry = first / 2 * pieces + k * ((together + 1) / 2) + turn / 2, offset = turn % 2 * FLOAT_PIECE;
                shares = (turn | 1) < together ? SHARES / 2 : SHARES;
                end = min((k + 1) * PIECE, columns);
            }
            const Place place = Ring::place(p, consumer.entries + entry);
            Ring::wait(place);
            add_products(sum, reinterpret_cast<const Value *>(Ring::entry(place) + offset), a + k * PIECE,
                         end - k * PIECE, consumer.lane, [](const uint4 *from) { return *from; });
            give_back(place, shares);
        }
        sum = warp_sum(sum);
        if (consumer.lane == 0) shared_at<float>(partial)[i] = sum;
    }
    // Of the last rows there may be too many pieces for a warp that has none to know without waiting that they have
    // come.
    if (!in_entry) sync_consumers();
    consumer.pass(rows, in_entry ? (rows + in_entry - 1) / in_entry : (rows + 1) / 2 * pieces);
}

__device__ __forceinline__ void multiply(const StepParams &p, Consumer &consumer, const StepProduct &stage,
                                         const StepMatrix &matrix, int partial) {
    switch (matrix.type) {
#define MULTIPLY(NAME, TYPE, NUMBER) \
    case NUMBER: multiply<TYPE>(p, consumer, Slices(stage), matrix, partial, stage.rows); break;
        QUANTIZED_TYPES(MULTIPLY)
#undef MULTIPLY
        default:
            for_float(matrix.type,
                      [&](auto type) { float_multiply<decltype(type)>(p, consumer, matrix, stage, partial); });
    }
}

// Clears the second half of the vector's last unit where it has none.
__device__ __forceinline__ void end_vector(const StepParams &p, const Consumer &consumer, int groups) {
    if (groups % 2 == 1 && consumer.thread < GROUP_WORDS) {
        shared_at<uint32_t>(p.vector)[groups * GROUP_WORDS + consumer.thread] = 0;
    }
}

// Quantizes the vector that a stage reads, which came as plain values; a barrier is to follow.
__device__ __forceinline__ void gather_plain(const StepParams &p, const Consumer &consumer, const StepProduct &stage) {
    const int columns = stage.columns, groups = (columns + ACTIVATION_GROUP - 1) / ACTIVATION_GROUP;
    for (int group = consumer.warp; group < groups; group += CONSUMERS) {
        const int column = group * ACTIVATION_GROUP + consumer.lane;
        float value = 0.f;
        take<1>(
            consumer.wait(), [&](int) { return column < columns; }, [&](int) { return p.qkv + column; },
            [&](int, const ValuePacket &packet) { value = packet.value; });
        const float largest = warp_max_magnitude(value);
        uint32_t *words = shared_at<uint32_t>(p.vector) + group * GROUP_WORDS;
        reinterpret_cast<int8_t *>(words)[consumer.lane] = quantize(value, largest);
        if (consumer.lane == 0) words[SCALE_WORD] = __float_as_uint(group_scale(largest));
        if (stage.floats && column < columns) shared_at<float>(stage.unquantized)[column] = value;
    }
    end_vector(p, consumer, groups);
}

// Brings the vector that a stage reads into shared memory as packets arrive, with its squares where it is a norm's; a
// barrier is to follow.
__device__ __forceinline__ void gather(const StepParams &p, const Consumer &consumer, const StepVector &from,
                                       const StepProduct &stage, bool normed) {
    constexpr int AT_ONCE = 4;
    static_assert(CONSUMER_THREADS % GROUP_PACKETS == 0);
    const int columns = stage.columns, groups = (columns + ACTIVATION_GROUP - 1) / ACTIVATION_GROUP;
    const int part = consumer.thread % GROUP_PACKETS;  // of a group: the same in all of a thread's packets
    const bool wanted = part < SQUARES_PACKET || normed;
    uint32_t *to = part < SQUARES_PACKET ? shared_at<uint32_t>(p.vector) + PACKET_WORDS * part
                                         : shared_at<uint32_t>(stage.squares);
    const int pitch = part < SQUARES_PACKET ? GROUP_WORDS : PACKET_WORDS;
    for (int first = consumer.thread; first < groups * GROUP_PACKETS; first += AT_ONCE * CONSUMER_THREADS) {
        const uint4 *packets = from.groups + first;
        take<AT_ONCE>(
            consumer.wait(), [&](int i) { return wanted && first + i * CONSUMER_THREADS < groups * GROUP_PACKETS; },
            [&](int i) { return packets + i * CONSUMER_THREADS; },
            [&](int i, const Packet &packet) {
                const int group = (first + i * CONSUMER_THREADS) / GROUP_PACKETS;
#pragma unroll
                for (int j = 0; j < PACKET_WORDS; j++) to[group * pitch + j] = packet.word[j];
            });
    }
    end_vector(p, consumer, groups);
    if (stage.floats) {
        for (int first = consumer.thread; first < columns; first += AT_ONCE * CONSUMER_THREADS) {
            take<AT_ONCE>(
                consumer.wait(), [&](int i) { return first + i * CONSUMER_THREADS < columns; },
                [&](int i) { return from.values + first + i * CONSUMER_THREADS; },
                [&](int i, const ValuePacket &packet) {
                    shared_at<float>(stage.unquantized)[first + i * CONSUMER_THREADS] = packet.value;
                });
        }
    }
}

// 1 / rms of the vector whose groups' sums of squares these are; in the order of RmsScale of gemv.cuh.
__device__ __forceinline__ float rms_scale(int squares, int lane, int columns, float epsilon) {
    float sum = 0.f;
    for (int i = lane; i < columns / ACTIVATION_GROUP; i += WARP)
        sum += shared_at<const float>(squares)[i * PACKET_WORDS];
    return rsqrtf(warp_sum(sum) / columns + epsilon);
}

}  // namespace step
