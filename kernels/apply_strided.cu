// Elementwise over arrays of any strides, with or without a mask: a thread works on eight elements in the order of
// (sample, channel, position). See elementwise.cuh.
#include "elementwise.cuh"
#include "strided.cuh"

using Acc = Format<ELEMENT>::Acc;

// Blocks of a multiprocessor, or more, that registers are left for.
constexpr int BLOCKS = 4;

extern "C" __global__ void __launch_bounds__(256, BLOCKS) apply_strided(const __grid_constant__ Parameters p) {
    const long long elements = p.samples * p.channels * p.positions;
    const long long octet = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned passed = 0;
    for (int j = 0; j < OCTET; ++j) {
        const long long e = octet * OCTET + j;
        if (e >= elements) break;
        const long long row = e / p.positions, position = e % p.positions, n = row / p.channels, c = row % p.channels;
        const auto offset = [&](const Operand& o) {
            return o.pointer ? n * o.sample + c * o.channel + position_offset(o, position) : 0;
        };
        const Offsets at{offset(p.x), offset(p.g), offset(p.y), offset(p.r)};
        Element<Acc> element{};
        if (is_present(p, n, position)) {
            element = load_element<ELEMENT>(p, at, READS_BITS && load_bit(p, n, c, position));
            compute<ELEMENT>(element, load_coefficients<Acc>(p, c));
        }
        store_element<ELEMENT>(p, at, element);
        passed |= static_cast<unsigned>(element.passed) << j;
    }
    if (WRITES_BITS && octet * OCTET < elements)
        reinterpret_cast<unsigned char*>(p.bits)[octet] = static_cast<unsigned char>(passed);
}
