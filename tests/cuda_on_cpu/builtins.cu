// One row of 64 results for each built-in, in a block of two warps of which the second has 12 lanes.

extern "C" __global__ void builtins(unsigned long long* rows, unsigned* counters) {
    const unsigned t = threadIdx.x, full = 0xffffffffu;
    int row = 0;
    const auto put = [&](unsigned long long value) { rows[64 * row++ + t] = value; };

    put(__shfl_sync(full, t, 3));
    put(__shfl_sync(full, t, 9, 8));
    put(__shfl_up_sync(full, t, 2));
    put(__shfl_up_sync(full, t, 2, 8));
    put(__shfl_down_sync(full, t, 2, 8));
    put(__shfl_xor_sync(full, t, 1));
    put(__double_as_longlong(__shfl_xor_sync(full, 1.5 * t, 2)));
    put(__float_as_uint(__shfl_sync(full, __uint_as_float(0x7f800001u + t), 0)));
    put(__shfl_sync(full, (1ull << 40) + t, 1));
    put(t % 2 ? __shfl_xor_sync(0xaaaaaaaau, t, 2) : __ballot_sync(0x55555555u, t % 4 == 0));
    put(__ballot_sync(full, t % 3 == 0));
    put(__any_sync(full, t == 40));
    put(__all_sync(full, t != 40));
    put(__syncthreads_count(t % 5 == 0));
    put(__syncthreads_or(t == 43));
    put(__syncthreads_and(t != 43));
    __syncwarp();

    put(__popc(t) + 100 * __popcll(~0ull << t));
    put(__clz(t) + 100 * __clzll(t));
    put(__ffs(t) + 100 * __ffsll(1ll << t));
    put(__brev(t));
    put(__brevll(t));
    put(__umulhi(t << 28, 48));
    put(__umul64hi((unsigned long long)t << 60, 48));
    put(__funnelshift_r(t, 1, t) + __funnelshift_l(1u << 31, t, 1));
    put(min(t, 20u) + 100 * max(int(t), 30));
    put(__double_as_longlong(fmax(min(0.5 * t, 7.0), __longlong_as_double(0x7ff8000000000000))));
    put(__float_as_uint(__fadd_rn(__fmul_rn(0.1f, t), 0.3f)));
    put(__float_as_uint(__fmaf_rn(0.1f, t, 0.3f)));
    const uint4 vector = make_uint4(t, 1, 2, 3);
    put(__ldg(&vector).x + __ldcs(&vector).y + __ldcg(&vector).z + sizeof(uint2) + alignof(uint4) + alignof(double2));

    atomicAdd(counters + 0, t);
    atomicMax(counters + 1, t);
    atomicMin(counters + 2, t);
    atomicOr(counters + 3, 1u << t % 32);
    atomicAnd(counters + 4, ~(1u << t % 32));
    atomicXor(counters + 5, t);
    atomicInc(counters + 6, 9);
    atomicDec(counters + 7, 9);
    atomicSub(counters + 8, 1);
    if (atomicCAS(counters + 9, 0, 1) == 0) atomicExch(counters + 10, 77);
}
