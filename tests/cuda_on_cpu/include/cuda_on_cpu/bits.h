// A value's bytes as an integer and back.
#pragma once

namespace cuda_on_cpu {

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
    return __builtin_bit_cast(To, from);
}

template <unsigned bytes> struct UnsignedOf;
template <> struct UnsignedOf<4> { using type = unsigned; };
template <> struct UnsignedOf<8> { using type = unsigned long long; };
template <class T> using Bits = typename UnsignedOf<sizeof(T)>::type;

// A parameter whose type follows from the other arguments, so that literals convert.
template <class T> struct Exactly { using type = T; };
template <class T> using exactly = typename Exactly<T>::type;

}  // namespace cuda_on_cpu
