// A whole training step, or its whole gradient, of arrays whose positions lie one after the other and whose channels fit
// the second-level cache: read from memory once, reduced, and read from the cache to be made into y or dx. See
// tickets.cuh for who does what when.
//
// A piece is `span` padded tiles of `group` neighbouring channels; in a group of several, a sample has one tile and
// channels lie one after the other as well. Runs of a sample's elements are whole octets. y may be x, and dx may be dy:
// no piece of a group is written before all are reduced.
//
// Shared memory: nodes of a span, or of all rows of a group. Bytes moved: x (and dy) once from memory and once from the
// cache, y (or dx, dresidual) once. -DELEMENT=<type> -DTHREADS=256 -DCLUSTER=1 -DGROUPED=<0|1> (more than one channel)
// -DTILE_LANES=<1..32> -DTILE_ROWS=<0..8> -DTALL=<0|1>, and what elementwise.cuh asks for. Planned by `plan.ticketed`.
#include "tickets.cuh"
#include "rows.cuh"
#include "staging.cuh"
#include "walk.cuh"

using Acc = Format<ELEMENT>::Acc;

constexpr int BLOCKS = sizeof(ELEMENT) == 8 ? 1 : 2; // of a multiprocessor: as many as the planner launches
constexpr int BATCH = sizeof(ELEMENT) == 8 || WRITES_BITS ? 1 : (READS_G ? 4 : 8) / sizeof(ELEMENT); // octets under way

// The coefficients of an octet: a row has eight positions or more, so it touches two channels at most.
struct Channels {
    Coefficients<Acc> here, then;
    int left; // elements of the first

    __device__ __forceinline__ Channels(const Parameters& p, long long c, int element, int positions) {
        if (GROUPED) c += element / positions;
        left = GROUPED ? positions - element % positions : OCTET;
        here = then = load_coefficients<Acc>(p, c);
        if (GROUPED && left < OCTET) then = load_coefficients<Acc>(p, c + 1);
    }
    __device__ __forceinline__ Coefficients<Acc> at(int j) const { return GROUPED ? either(j < left, here, then) : here; }
};

__device__ __forceinline__ Octet<ELEMENT> load(const ELEMENT* p) { return load_octet(p, is_vector(p)); }

__device__ __forceinline__ void store(ELEMENT* p, const Acc (&v)[OCTET]) {
    store_octet(p, rounded<ELEMENT>(v), is_vector(p));
}

// y, or dx and dresidual, of a piece.
__device__ __forceinline__ void apply_span(const Parameters& p, const Span& s) {
    const long long sample = s.base >> p.log2_tiles, position = (s.base & ((1LL << p.log2_tiles) - 1)) * TILE;
    const long long whole = p.span >> p.log2_tiles ? p.span >> p.log2_tiles : 1;
    const long long there = p.samples - sample, channels = p.channels - s.first_channel;
    const int samples = static_cast<int>(there < whole ? there : whole);
    const long long rest = p.positions - position, room = p.span * TILE;
    const int positions = static_cast<int>(rest < room ? rest : room);
    const int run = positions * (GROUPED ? static_cast<int>(channels < s.group ? channels : s.group) : 1);
    if (run <= 0) return; // of padding
    const auto first = [&](const Operand& o) {
        return place<ELEMENT>(o, sample * o.sample + s.first_channel * o.channel + position);
    };
    const ELEMENT *x = first(p.x), *g = first(p.g);
    ELEMENT *y = first(p.y), *r = first(p.r);
    unsigned char* bits = reinterpret_cast<unsigned char*>(p.bits);
    const long long first_bit =
        p.bits_first + sample * p.bits_sample + s.first_channel * p.bits_channel + position;
    const auto byte = [&](const Walk& at) { return (first_bit + at.i * p.bits_sample) / 8 + at.j; };

    Walk ahead(threadIdx.x, THREADS, run / OCTET), here = ahead;
#pragma unroll 1
    while (here.i < samples) {
        Octets<ELEMENT> v[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k, ahead.step()) {
            if (ahead.i >= samples) continue;
            if (READS_X) to_numbers(load(x + ahead.i * p.x.sample + ahead.j * OCTET), v[k].x);
            if (READS_G) to_numbers(load(g + ahead.i * p.g.sample + ahead.j * OCTET), v[k].g);
            v[k].passed = READS_BITS ? bits[byte(ahead)] : 0;
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k, here.step()) {
            if (here.i >= samples) continue;
            const Channels c(p, s.first_channel, here.j * OCTET, positions);
#pragma unroll
            for (int j = 0; j < OCTET; ++j) {
                Element<Acc> element = v[k].at(j);
                compute<ELEMENT>(element, c.at(j));
                v[k].put(j, element);
            }
            store(y + here.i * p.y.sample + here.j * OCTET, v[k].y);
            if (WRITES_R) store(r + here.i * p.r.sample + here.j * OCTET, v[k].r);
            if (WRITES_BITS) bits[byte(here)] = static_cast<unsigned char>(v[k].passed);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ticketed(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const auto reduce = [&](const Span& s, Node<double>* nodes) {
        reduce_span(p, s, nodes);
        return s.tiles;
    };
    take_turns<Acc>(p, reinterpret_cast<Node<double>*>(memory), reduce, [&](const Span& s) { apply_span(p, s); });
}
