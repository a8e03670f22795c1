// Two counters, one inside the other.
#pragma once

// Goes through (i, j), j < extent, in steps of `stride`; without a division on the way.
struct Walk {
    int extent, over, on, i, j;
    __device__ __forceinline__ Walk(int first, int stride, int extent)
        : extent(extent), over(stride / extent), on(stride % extent), i(first / extent), j(first % extent) {}
    __device__ __forceinline__ void step() {
        i += over;
        j += on;
        if (j >= extent) {
            j -= extent;
            ++i;
        }
    }
};
