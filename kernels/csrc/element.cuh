// Elements of the pool (bfloat16, or float16 with LORA_FP16 defined), how they are loaded, and how launches overlap.
// Includes no header of the toolkit, so that NVRTC needs nothing but these files.
#pragma once

using Element = unsigned short;

// Two elements in 32 bits, the first one in the low half.
__device__ __forceinline__ float2 unpack2(unsigned bits) {
#ifdef LORA_FP16
  float2 values;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(bits));
  return values;
#else
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
#endif
}

__device__ __forceinline__ unsigned pack2(float first, float second) {
  unsigned bits;
#ifdef LORA_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
#endif
  return bits;
}

// Two numbers as elements, and what these leave out.
__device__ __forceinline__ void split2(float first, float second, unsigned& high, unsigned& low) {
  high = pack2(first, second);
  const float2 kept = unpack2(high);
  low = pack2(first - kept.x, second - kept.y);
}

// Whether v = A x may be too large for an element (float16 ends at 65,504), or so small that it keeps few of its bits. A power of
// two then brings it to where an element keeps most, before it is multiplied on tensor cores, and the fp32 sums are brought back.
#ifdef LORA_FP16
constexpr bool kMustScale = true;
#else
constexpr bool kMustScale = false;  // bfloat16 has the range of fp32
#endif

// Powers of two: the one that brings `largest` to between 2^14 and 2^15, and the one that takes that back. largest >= 0.
__device__ __forceinline__ float2 scale_and_back(float largest) {
  const unsigned exponent = max(__float_as_uint(largest) >> 23, 15u);  // biased by 127; of what is smaller, 2^126 is enough
  return make_float2(__uint_as_float((268u - exponent) << 23), __uint_as_float((exponent - 14u) << 23));
}

// The largest of four neighbouring lanes.
__device__ __forceinline__ float largest_of_four(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

// Weights do not change while a step runs and are read once: past L1, which is for the activations. Zeros if not `is_inside`.
__device__ __forceinline__ uint4 load_weights(const Element* address, bool is_inside) {
  uint4 value;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address), "r"(static_cast<unsigned>(is_inside)));
  return value;
}

// Activations are written by the launch before, which may still run when this one starts: never through the read-only path.
__device__ __forceinline__ uint4 load_activations(const Element* address, bool is_inside) {
  uint4 value;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address), "r"(static_cast<unsigned>(is_inside))
      : "memory");
  return value;
}

// Programmatic dependent launch: the next launch may become resident now; this one may touch what the launch before wrote (and
// overwrite what it read) only once that has finished. Both do nothing for launches without the attribute.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
