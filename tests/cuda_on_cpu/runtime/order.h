// In which order the lanes of a warp, the warps of a block and the blocks run: ascending, reversed or shuffled.
#pragma once
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace cuda_on_cpu {

// Bits of a launch's `order`; with `shuffled`, the bits from `seed_shift` up are a seed.
enum OrderBits : std::uint64_t { reversed_warps = 1, reversed_lanes = 2, reversed_blocks = 4, shuffled = 8 };
constexpr unsigned seed_shift = 4;

// splitmix64
inline std::uint64_t next_random(std::uint64_t& state) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

// The gang that runs as number `turn` of `count`; shuffled by a multiplication with a number prime to count.
inline std::uint64_t gang_at(std::uint64_t turn, std::uint64_t count, std::uint64_t order) {
    if (order & shuffled) {
        std::uint64_t state = order;
        std::uint64_t factor = next_random(state) % count, shift = next_random(state) % count;
        while (std::gcd(factor, count) != 1) ++factor;
        turn = static_cast<std::uint64_t>((static_cast<unsigned __int128>(factor) * turn + shift) % count);
    }
    return order & reversed_blocks ? count - 1 - turn : turn;
}

class Order {
public:
    using Sequence = std::vector<unsigned>;

    void start(std::uint64_t order, std::uint64_t salt, unsigned warp_count, unsigned block_count) {
        shuffled_ = order & shuffled;
        state_ = order ^ salt << 32;
        fill(lanes_, 32, order & reversed_lanes);
        fill(warps_, warp_count, order & reversed_warps);
        fill(blocks_, block_count, order & reversed_blocks);
    }

    // Each call is one pass, shuffled anew.
    const Sequence& lanes() { return pass(lanes_); }
    const Sequence& warps() { return pass(warps_); }
    const Sequence& blocks() { return pass(blocks_); }

private:
    static void fill(Sequence& sequence, unsigned count, bool reversed) {
        sequence.resize(count);
        for (unsigned i = 0; i < count; ++i) sequence[i] = reversed ? count - 1 - i : i;
    }

    const Sequence& pass(Sequence& sequence) {
        if (shuffled_) {
            for (std::size_t left = sequence.size(); left > 1; --left) {
                std::swap(sequence[left - 1], sequence[next_random(state_) % left]);
            }
        }
        return sequence;
    }

    bool shuffled_ = false;
    std::uint64_t state_ = 0;
    Sequence lanes_, warps_, blocks_;
};

}  // namespace cuda_on_cpu
