// Elementwise where channels lie one after the other: a thread keeps the coefficients of 8 channels and goes down rows,
// positions of all samples. See elementwise.cuh.
#pragma once
#include "elementwise.cuh"

using Acc = Format<ELEMENT>::Acc;

// Of channels from c on, if they are there, rows first, first + step, ... below `end`; loads of BATCH at a time.
template <bool DENSE, int BATCH>
__device__ __forceinline__ void apply_positions(const Parameters& p, long long c, long long first, long long end, int step) {
    if (c >= p.channels) return;
    Coefficients<Acc> k[OCTET];
#pragma unroll
    for (int j = 0; j < OCTET; ++j) k[j] = load_coefficients<Acc>(p, c + j);
    for (long long row = first; row < end; row += BATCH * step) {
        const auto at = [&](int i) {
            const auto offset = [&](const Operand& o) { return (row + i * step) * o.position + c; };
            return Offsets{offset(p.x), offset(p.g), offset(p.y), offset(p.r)};
        };
        const auto octet = [&](int i) { return ((row + i * step) * p.channels + c) / OCTET; };
        Octets<ELEMENT> v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (row + i * step < end) load_octets<DENSE>(p, at(i), octet(i), v[i]);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (row + i * step >= end) continue;
#pragma unroll
            for (int j = 0; j < OCTET; ++j) {
                Element<Acc> element = v[i].at(j);
                compute<ELEMENT>(element, k[j]);
                v[i].put(j, element);
            }
            store_octets<DENSE>(p, at(i), octet(i), v[i]);
        }
    }
}
