// 2^x in float32 on the `Vector` of the including file.
#pragma once

namespace {

// 2^x for x up to 127, relative error below 2e-7; 2^-126 for anything smaller, NaN for NaN.
//
// x = n + f with n whole and |f| <= 1/2; (2^f - 1) / f by the polynomial of degree 5 that meets it at
// Chebyshev's points.
[[gnu::always_inline]] inline Vector::Reg exp2(Vector::Reg x) {
    using V = Vector;
    x = V::max(V::set(-126.0f), x);
    const V::Reg n = V::round(x), f = V::sub(x, n);
    V::Reg p = V::set(0.000154531629f);
    p = V::fma(p, f, V::set(0.00133908634f));
    p = V::fma(p, f, V::set(0.00961808256f));
    p = V::fma(p, f, V::set(0.0555035711f));
    p = V::fma(p, f, V::set(0.240226508f));
    p = V::fma(p, f, V::set(0.693147188f));
    p = V::fma(p, f, V::set(1.0f));
    return V::scale_by_power_of_two(p, n);
}

} // namespace
